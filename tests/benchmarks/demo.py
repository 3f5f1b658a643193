"""Seconds of the demo and of the start, beside the machine: prints a table and writes JSON.

    python tests/benchmarks/demo.py [--repeats 3] [--output demo_benchmark.json]

Each figure is the median over the repeats; the parts take turns (A B C A B C), so that a slow minute hits all of them.
Run it when nothing else runs. It is no test: a slow machine is not a fault.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds(*command) -> float:
    "Wall seconds of a process."
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def demo() -> dict:
    "Wall seconds of the whole demo, and of the training in it."
    from finetuning_kit.workflow import demo

    started = time.perf_counter()
    result = demo(tempfile.mkdtemp())
    return {"demo, whole": time.perf_counter() - started, "demo, training": result.run.seconds}


def one_round() -> dict:
    "Every figure once."
    module = (sys.executable, "-m", "finetuning_kit.cli")
    return {"bare python": seconds(sys.executable, "-c", ""),
            "import finetuning_kit": seconds(sys.executable, "-c", "import finetuning_kit"),
            "finetuning-kit --help": seconds(*module, "--help"), **demo()}


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="demo_benchmark.json")
    options = parser.parse_args()
    from finetuning_kit.machine import probe_machine

    rounds = [one_round() for _ in range(options.repeats)]
    table = {name: [each[name] for each in rounds] for name in rounds[0]}
    print(f"{probe_machine()}; Python {platform.python_version()}; median (least to most) of {options.repeats}\n")
    for name, values in table.items():
        print(f"{name:24} {statistics.median(values):7.2f} s   ({min(values):.2f} to {max(values):.2f})")
    Path(options.output).write_text(json.dumps({"machine": str(probe_machine()), "seconds": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
