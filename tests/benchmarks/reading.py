"""Megabytes a second and peak memory of reading a large file: prints a table and writes JSON.

    python tests/benchmarks/reading.py [--mb 200] [--repeats 3] [--output reading_benchmark.json]

Question-and-answer rows of about 700 bytes, some with letters that are not ASCII and escapes, as JSON Lines, as one
array, as gzip and as CSV. Ways:

- ours, rows: `iter_rows`, strict, every row with its file and line;
- ours, records: `iter_records`, which also finds out the shape and checks every row's columns: end to end;
- json.loads: Python's decoder line by line, which is not strict, names no file, and looks at no column;
- datasets: `load_dataset("json")` into a fresh cache, iterated as dicts.

Each measurement runs in a process of its own on one core; memory is the process's peak above what its imports take.
The contestants take turns; each figure is a median. It is no test: a slow machine is not a fault.
"""
import argparse
import gzip
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("tree", "river", "model", "weights", "Größe", "naïve", "日本", "learn", "token", "answer", "line\nbreak",
         "\"quoted\"")


def make_files(folder, n_mb) -> dict:
    "Write the same rows in four layouts; give the bytes of each, unpacked."
    import csv

    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(20, 90))) for _ in range(500)]
    paths = {name: folder / name for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.csv")}
    size, number = 0, 0
    with (open(paths["rows.jsonl"], "w") as lines, open(paths["rows.json"], "w") as array,
          gzip.open(paths["rows.jsonl.gz"], "wt", compresslevel=1) as packed,
          open(paths["rows.csv"], "w", newline="") as table):
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["prompt", "completion"])
        array.write("[")
        while size < n_mb * 1e6:
            row = {"prompt": f"{number}: {draw.choice(texts)}?", "completion": draw.choice(texts)}
            line = json.dumps(row, ensure_ascii=number % 10 == 0)
            lines.write(line + "\n")
            packed.write(line + "\n")
            array.write(",\n" * (number > 0) + line)
            writer.writerow(row.values())
            size, number = size + len(line.encode()) + 1, number + 1
        array.write("]")
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    return {**sizes, "rows.jsonl.gz": sizes["rows.jsonl"], "n_rows": number}


def our_rows(path) -> int:
    "Count rows as the package reads them."
    from finetuning_kit.reading import iter_rows

    return sum(1 for _ in iter_rows(path))


def our_records(path) -> int:
    "Count records as the package reads them."
    from finetuning_kit.loading import iter_records

    return sum(1 for _ in iter_records(path))


def plain(path) -> int:
    "Count rows as Python's decoder reads them."
    with open(path, encoding="utf-8") as file:
        return sum(1 for line in file if json.loads(line))


def by_datasets(path) -> int:
    "Count rows as `datasets` reads them."
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        made = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        return sum(1 for _ in made)


WAYS = {"ours, rows": our_rows, "ours, records": our_records, "json.loads": plain, "datasets": by_datasets}


def run_child(way, path) -> None:
    "Measure one way in this process and print what was found."
    tiny = path + ".tiny.json"
    Path(tiny).write_text('[{"prompt": "a", "completion": "b"}]' if way != "json.loads" else '{"a": 1}\n')
    WAYS[way](tiny)  # imports, and what they cost
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    n_rows = WAYS[way](path)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"n_rows": n_rows, "seconds": seconds, "mb": peak / 1024, "above_mb": (peak - before) / 1024}))


def measure(way, path) -> dict:
    "Measure one way in a process of its own, on one core."
    one = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
    done = subprocess.run([sys.executable, __file__, "--child", way, str(path)], capture_output=True, text=True,
                          env={**os.environ, **one, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="reading_benchmark.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_child(*options.child)
    with tempfile.TemporaryDirectory() as folder:
        sizes = make_files(Path(folder), options.mb)
        plan = [(way, name) for name in list(sizes)[:-1] for way in WAYS
                if way.startswith("ours") or name == "rows.jsonl"]
        taken = {each: [] for each in plan}
        for _ in range(options.repeats):
            for way, name in plan:
                taken[way, name].append(measure(way, Path(folder) / name))
    print(f"{platform.processor() or platform.machine()}; Python {platform.python_version()}; one core; "
          f"{sizes['n_rows']:,} rows; median of {options.repeats}\n")
    results = {}
    for (way, name), found in taken.items():
        assert {each["n_rows"] for each in found} == {sizes["n_rows"]}, (way, name, found)
        speed = sizes[name] / 1e6 / statistics.median(each["seconds"] for each in found)
        results[f"{way}; {name}"] = {"mb_per_s": speed, "peak_mb": max(each["mb"] for each in found),
                                     "above_mb": max(each["above_mb"] for each in found)}
        print(f"{way:14} {name:14} {sizes[name] / 1e6:6,.0f} MB {speed:7.1f} MB/s, {found[0]['mb']:6.0f} MB of memory, "
              f"{found[0]['above_mb']:6.0f} MB above the imports")
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
