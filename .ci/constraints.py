"""Prints constraints.txt: the newest versions that go together today, for each Python given on the command line.

    python .ci/constraints.py python3.10 python3.11 python3.12 python3.13 > constraints.txt

A package whose version differs between Pythons gets one line each, with an environment marker.
"""
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

TORCH = "2.13.0"
HEADER = f"""\
# Exact versions of everything finetuning_kit and its tests install, for Linux and Python {{pythons}}.
# Made by "make constraints"; "make test" installs them. The wide ranges for everybody else are in settings.ini.
#
# torch: the CPU build calls itself {TORCH}+cpu. It satisfies the line below, and pip prefers it by itself wherever an
# index or folder that carries it is configured (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS); it spares gigabytes of CUDA
# packages. Where only the default index is configured, the line means the CUDA build, which runs on a CPU too.
"""
OF_TORCH = re.compile(r"(nvidia|cuda)-|triton$")  # the CUDA build of torch pins these itself


def resolve(
    python: str,  # name or path of an interpreter
) -> tuple:  # its version as (3, 11), and {package: version}
    "Ask pip which versions `python` would install, without installing them."
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own, pins, report = Path(folder, "bin", "python"), Path(folder, "torch.txt"), Path(folder, "report.json")
        subprocess.run([own, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        pins.write_text(f"torch=={TORCH}\n")
        subprocess.run([own, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", report,
                        "--constraint", pins, ".[all,dev]"], check=True, stdout=sys.stderr)
        found = json.loads(report.read_text())
    versions = {re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"].split("+")[0]
                for item in found["install"]}
    return tuple(int(part) for part in found["environment"]["python_version"].split(".")), versions


def lines_of(
    name: str,  # a package
    versions: dict,  # {python version: package version} for the Pythons that install it, oldest first
) -> list:  # one line a version
    "Write one package's pins, with markers where Pythons differ."
    before = dict(zip(list(versions)[1:], versions.values()))
    starts = [python for python in versions if versions[python] != before.get(python)]
    lines = []
    for start, stop in zip(starts, [*starts[1:], None]):
        bounds = [] if start == starts[0] else [f'python_version >= "{start[0]}.{start[1]}"']
        bounds += [] if stop is None else [f'python_version < "{stop[0]}.{stop[1]}"']
        lines.append(f"{name}=={versions[start]}" + (" ; " + " and ".join(bounds) if bounds else ""))
    return lines


def main() -> None:
    "Print the whole file."
    resolved = dict(sorted(map(resolve, sys.argv[1:])))
    print(HEADER.format(pythons=", ".join(f"{major}.{minor}" for major, minor in resolved)))
    for name in sorted(set().union(*resolved.values()) - {"finetuning-kit"}):
        if not OF_TORCH.match(name):
            versions = {python: found[name] for python, found in resolved.items() if name in found}
            print(*lines_of(name, versions), sep="\n")


if __name__ == "__main__":
    main()
