"""How long it takes to judge rows, stage by stage, and how much memory: prints a table and writes JSON.

    python tests/benchmarks/validation.py [--rows 100000] [--output validation_benchmark.json]

A tenth of the rows are planted near copies, one in a hundred holds a fault for the texts. Each size runs in a process
of its own, so that the peak of memory is its own: a tenth of the rows first, then all of them. What grows in
proportion shows a factor of ten. It is no test: a slow machine is not a fault.
"""
import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.near_duplicates import make_texts


def make_rows(n_rows) -> list:
    "Questions and answers of 10 to 40 words each."
    texts, draw = make_texts(n_rows), random.Random(1)
    faults = ("\u200b", "Ã©", " <|im_end|>", " ann.lee@mail.org", "  ")
    return [{"instruction": text, "output": f"{text.title()}. So it is, number {n}." +
             (draw.choice(faults) if n % 100 == 0 else "")} for n, text in enumerate(texts)]


def megabytes() -> float:
    "The most memory that this process has had."
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(n_rows) -> dict:
    "Seconds of each stage, and memory."
    from finetuning_kit import validation as V

    rows = make_rows(n_rows)
    V.validate_dataset(rows[:200], progress=False)  # what is loaded once
    before, found = megabytes(), {"rows": n_rows, "megabytes_of_text": len(json.dumps(rows)) / 1e6}
    stages = {"read": lambda: V.read_material(rows)}
    began = time.perf_counter()
    material = stages["read"]()
    found["read"] = time.perf_counter() - began
    stages = {"single rows": V.find_in_rows, "texts": lambda m: V.find_in_texts(m.good),
              "rows side by side": lambda m: V.find_across(m.good), "the set": lambda m: V.find_in_set(m.good)}
    for name, run in stages.items():
        began = time.perf_counter()
        run(material)
        found[name] = time.perf_counter() - began
    began = time.perf_counter()
    report = V.validate_dataset(rows, progress=False)
    found["all together"] = time.perf_counter() - began
    return {**found, "peak megabytes": megabytes(), "of these before": before,
            "near copies": report.issues["near_duplicates"]}


def main() -> None:
    "The command described at the top."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return print(json.dumps(measure(options.rows)))
    results = []
    for n_rows in (options.rows // 10, options.rows):
        command = [sys.executable, __file__, "--alone", "--rows", str(n_rows)]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    small, large = results
    print(f"{platform.machine()}; Python {platform.python_version()}\n{'':20}{'small':>12}{'large':>12}{'factor':>8}")
    for name in large:
        print(f"{name:20}{small[name]:12,.1f}{large[name]:12,.1f}{large[name] / max(small[name], 1e-9):8.1f}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
