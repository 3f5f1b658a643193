"""Runs notebooks, stores their outputs, and renders the README.

    python -m tests.notebooks nbs/060_training.ipynb                  run it in a kernel of its own, offline
    python -m tests.notebooks --store nbs/060_training.ipynb          and keep the outputs, tidied, in the notebook
    python -m tests.notebooks --store --flags "slow cuda" nbs/…      flagged cells too ("net" turns the network on)
    python -m tests.notebooks --readme                               write README.md from nbs/index.ipynb

Cells that carry `#| cuda`, `#| slow`, `#| net` or `#| eval: false` are left out unless asked for by --flags;
their stored outputs stay.
"""
import argparse
import asyncio
import copy
import itertools
import json
import os
import posixpath
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("cuda", "slow", "net")
DIRECTIVE = re.compile(r"#\|\s*(\w+):?\s*(.*)")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def read(path) -> dict:
    "The notebook as JSON."
    return json.loads(Path(path).read_text(encoding="utf-8"))


def source(cell) -> str:
    "A cell's text."
    return "".join(cell["source"])


def text(value) -> str:
    "A stored text, which may be a string or a list of lines."
    return value if isinstance(value, str) else "".join(value)


def directives(cell) -> dict:
    "nbdev's directives at the head of a cell, {name: value}."
    found = {}
    for line in source(cell).lstrip().splitlines():
        match = DIRECTIVE.match(line)
        if not match:
            break
        found[match[1]] = match[2].strip()
    return found


def code(cell) -> str:
    "A cell's text without the directives at its head."
    lines = source(cell).strip("\n").splitlines()
    return "\n".join(itertools.dropwhile(DIRECTIVE.match, lines)).strip("\n")


def is_run(cell, flags=()) -> bool:
    "Is this a code cell that a run with these flags executes?"
    found = directives(cell)
    wanted = found.get("eval") != "false" and not (found.keys() & set(FLAGS)) - set(flags)
    return cell["cell_type"] == "code" and wanted


def environment(home, root=ROOT, network=False) -> dict:
    "What a process of the tests gets: an empty home, no network, the package from the source tree."
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "offline"), str(root)])}
    online = {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(root)}
    keep = {"MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(Path(home, "matplotlib"))),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # more make small models slow on a busy machine
    return {**os.environ, **(online if network else offline), **keep, "HOME": str(home), "JUPYTER_PREFER_ENV_PATH": "1",
            "HF_HOME": str(Path(home, "huggingface")), "IPYTHONDIR": str(Path(home, "ipython"))}


def obey_signals(notebook) -> None:
    "Let Ctrl-C end the tests; nbclient would end this one kernel and let the tests go on."
    loop = asyncio.get_running_loop()
    loop.remove_signal_handler(signal.SIGINT)
    loop.remove_signal_handler(signal.SIGTERM)


def run(path, flags=(), timeout_s=600) -> dict:
    "Execute a notebook's cells in a fresh kernel, in a copy of its folder; returns the executed cells, {id: outputs}."
    import nbformat
    from nbclient import NotebookClient

    path = Path(path).resolve()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if is_run(cell, flags)]
    with tempfile.TemporaryDirectory(prefix="chapter_") as folder:
        copied, home = Path(folder, "nbs"), Path(folder, "home")
        shutil.copytree(path.parent, copied, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        home.mkdir()
        client = NotebookClient(
            notebook, timeout=timeout_s, kernel_name="python3", coalesce_streams=True, store_widget_state=False,
            record_timing=False, extra_arguments=["--IPKernelApp.log_level=ERROR"], on_notebook_start=obey_signals,
            resources={"metadata": {"path": str(copied)}})
        done = client.execute(env=environment(home, path.parent.parent, network="net" in flags))
    return {cell["id"]: tidy(cell["outputs"]) for cell in done["cells"]}


def tidy(outputs) -> list:
    "Outputs without widget views, which show nothing once the kernel is gone; their text or picture stays."
    kept = []
    for output in copy.deepcopy(outputs):
        if WIDGET_VIEW in output.get("data", {}):
            del output["data"][WIDGET_VIEW]
            if not output["data"].keys() - {"text/plain"}:
                continue
        kept.append(output)
    return kept


def store(path, outputs) -> None:
    "Write outputs into their cells, and clean the notebook as nbdev does."
    from fastcore.nbio import write_nb
    from nbdev.clean import clean_nb

    notebook = read(path)
    for cell in notebook["cells"]:
        if cell["id"] in outputs:
            cell["outputs"] = outputs[cell["id"]]
    notebook["metadata"].pop("widgets", None)
    clean_nb(notebook)
    write_nb(notebook, path)


def render(notebook, folder="nbs") -> str:
    "A notebook as Markdown: visible cells, code fenced, text and Markdown outputs; links hold from `folder`'s parent."
    def relink(match):
        target = match[2]
        local = not re.match(r"[a-z]+:|#|/", target)
        return match[1] + (posixpath.normpath(posixpath.join(folder, target)) if local else target) + ")"

    parts = []
    for cell in notebook["cells"]:
        if directives(cell).keys() & {"hide", "default_exp"} or not code(cell).strip():
            continue
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"(\]\()([^)\s]+)\)", relink, code(cell)))
            continue
        parts.append(f"```python\n{code(cell)}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            shown = text(data.get("text/markdown") or data.get("text/plain", "")).rstrip()
            parts.append(shown if "text/markdown" in data else f"```\n{shown}\n```")
    return "\n\n".join(parts).strip() + "\n"


def main() -> None:
    "The command described at the top."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="notebooks; all of nbs/ if none is given")
    parser.add_argument("--store", action="store_true", help="keep the outputs in the notebooks")
    parser.add_argument("--flags", default="", help="run the cells with these flags too")
    parser.add_argument("--readme", action="store_true", help="only write README.md")
    options = parser.parse_args()
    if options.readme:
        (ROOT / "README.md").write_text(render(read(ROOT / "nbs" / "index.ipynb")), encoding="utf-8")
        return
    for path in options.paths or sorted(ROOT.glob("nbs/*.ipynb")):
        started = time.monotonic()
        outputs = run(path, options.flags.split())
        if options.store:
            store(path, outputs)
        print(f"{path}: {len(outputs)} cells, {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
