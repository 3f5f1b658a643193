"""Rows a second of the search for near copies, and what it finds: prints a table and writes JSON.

    python tests/benchmarks/near_duplicates.py [--rows 10000] [--repeats 3] [--output near_duplicates_benchmark.json]

A tenth of the rows are planted copies with one word in twenty replaced. Ours is compared with datasketch (128 hashes,
the same shingles, threshold 0.8, candidates not checked), where that can be imported, and on a sample with all pairs
counted one by one. A pair is true when its Jaccard index is 0.8 or more. The contestants take turns; each figure is a
median. It is no test: a slow machine is not a fault.
"""
import argparse
import itertools
import json
import platform
import random
import statistics
import time
from pathlib import Path

from finetuning_kit.likeness import find_near_duplicates, normal_text

THRESHOLD = 0.8


def make_texts(n_rows, seed=0) -> list:
    "Texts of 10 to 40 words that are drawn as often as words of a language are; the last tenth are copies."
    draw = random.Random(seed)
    letters, weights = zip(*zip("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1)))
    words = ["".join(draw.choices(letters, weights, k=draw.randint(2, 10))) for _ in range(20_000)]
    shares = [1 / (rank + 10) for rank in range(len(words))]
    n_copies = n_rows // 10
    texts = [" ".join(draw.choices(words, shares, k=draw.randint(10, 40))) for _ in range(n_rows - n_copies)]
    for text in texts[:n_copies]:
        copy = text.split()
        for place in draw.sample(range(len(copy)), max(1, len(copy) // 20)):
            copy[place] = draw.choice(words)
        texts.append(" ".join(copy))
    return texts


def hard_texts(n_rows) -> dict:
    "Data sets that make a search compare everything with everything."
    long = " ".join(make_texts(20)[:3])
    side = round(n_rows ** 0.5)
    return {"one text": [long] * n_rows, "one text and a number": [f"{long} {k}" for k in range(n_rows)],
            "texts of three letters": ["".join(letters) for letters in itertools.islice(
                itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=3), n_rows)],
            "a template": [f"A train travels at {a} kilometres an hour for {b} hours. How far does it travel?"
                           for a in range(side) for b in range(side)]}


def shingles(text) -> set:
    "Pieces of five characters."
    return {text[k:k + 5] for k in range(max(1, len(text) - 4))}


def ours(texts) -> set:
    "Pairs that the package finds."
    return {(one, other) for one, other, _ in find_near_duplicates(texts, THRESHOLD)}


def datasketch(texts) -> set:
    "Pairs that datasketch finds."
    from datasketch import MinHash, MinHashLSH

    table, found = MinHashLSH(threshold=THRESHOLD, num_perm=128), set()
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([piece.encode() for piece in shingles(normal_text(text))])
        found |= {(other, number) for other in table.query(sketch)}
        table.insert(number, sketch)
    return found


def is_near(texts, pair) -> bool:
    "Is it a true pair?"
    one, other = (shingles(normal_text(texts[number])) for number in pair)
    return len(one & other) >= THRESHOLD * len(one | other) - 1e-9


def recall_on_sample(texts, n) -> tuple:
    "True pairs of the first and the last rows that ours finds, and all of them."
    sample = texts[:n // 2] + texts[-len(texts) // 10:][:n // 2]
    pieces = [shingles(normal_text(text)) for text in sample]
    true = {(a, b) for a, b in itertools.combinations(range(len(sample)), 2)
            if len(pieces[a] & pieces[b]) >= THRESHOLD * len(pieces[a] | pieces[b]) - 1e-9}
    return len(true & ours(sample)), len(true)


def measure(contestants, texts, n_repeats) -> dict:
    "Median rows a second, links and true links of each contestant."
    seconds, pairs = {name: [] for name in contestants}, {}
    for _ in range(n_repeats):
        for name, search in contestants.items():
            started = time.perf_counter()
            found = search(texts)
            seconds[name].append(time.perf_counter() - started)
            pairs[name] = found
    return {name: {"rows_per_s": len(texts) / statistics.median(seconds[name]), "links": len(found),
                   "true_links": sum(is_near(texts, pair) for pair in found)} for name, found in pairs.items()}


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="near_duplicates_benchmark.json")
    options = parser.parse_args()
    texts, contestants = make_texts(options.rows), {"ours": ours}
    try:
        datasketch(texts[:2])
        contestants["datasketch"] = datasketch
    except ImportError:
        print("datasketch cannot be imported; ours is measured alone")
    results = measure(contestants, texts, options.repeats)
    print(f"{platform.processor() or platform.machine()}; Python {platform.python_version()}; {options.rows:,} rows of "
          f"{sum(map(len, texts)) / len(texts):.0f} characters; median of {options.repeats}\n")
    for name, result in results.items():
        print(f"{name:24} {result['rows_per_s']:10,.0f} rows/s {result['links']:9,} links, "
              f"{result['true_links']:,} true")
    found, n_true = recall_on_sample(texts, 2000)
    print(f"{'of all pairs, sampled':24} {found} of {n_true} true pairs found")
    for name, hard in hard_texts(options.rows).items():
        started = time.perf_counter()
        n_links = len(ours(hard))
        results[name] = {"rows_per_s": len(hard) / (time.perf_counter() - started), "links": n_links}
        print(f"{name:24} {results[name]['rows_per_s']:10,.0f} rows/s {n_links:9,} links")
    results["sample"] = {"found": found, "true": n_true}
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
