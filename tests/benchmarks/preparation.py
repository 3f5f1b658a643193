"""Rows a second from dicts to token ids and labels: prints a table and writes JSON.

    python tests/benchmarks/preparation.py [--rows 10000] [--repeats 5] [--output preparation_benchmark.json]

One core, the pocket model's tokenizer and chat template, the rows of the pocket data made unlike each other by a
number. Three ways, which must give the same ids, and the same labels up to each row's end-of-turn token (what the chat
template writes behind it is masked by ours alone):

- row by row: a row is checked, its prompt and its whole text are rendered by the chat template and tokenized, and what
  the prompt has is masked;
- `datasets.map`: the same steps on batches of 1000, tokenized a batch at a time;
- ours: `iter_records` and `encode_batch`, which find the answers in the text, and keep control marks that somebody
  typed from becoming control tokens, which the other two do not.

The contestants take turns; each figure is a median. It is no test: a slow machine is not a fault.
"""
import argparse
import gc
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import datasets  # noqa: E402 (the number of threads is set before)

from finetuning_kit.loading import iter_records  # noqa: E402
from finetuning_kit.models import load_tokenizer  # noqa: E402
from finetuning_kit.reading import read_rows  # noqa: E402
from finetuning_kit.tokens import encode_batch  # noqa: E402


def make_rows(n_rows) -> list:
    "Different rows with an instruction, an input and an output."
    shipped = [row.data for row in read_rows("pocket")]
    return [{**row, "instruction": f"{number}. {row['instruction']}"}
            for number, row in zip(range(n_rows), shipped * (n_rows // len(shipped) + 1))]


def turns(row) -> list:
    "A row as a question and its answer, checked."
    for name in ("instruction", "output"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{name} is missing or empty")
    asked = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def mask(prompt, ids) -> list:
    "Labels of a row: -100 for what the prompt has."
    if ids[:len(prompt)] != prompt:
        raise ValueError("the prompt is no beginning of the row")
    return [-100] * len(prompt) + ids[len(prompt):]


def row_by_row(tokenizer, rows) -> list:
    "Each row for itself."
    found = []
    for row in rows:
        messages = turns(row)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt, ids = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (prompt, text))
        found.append((ids, mask(prompt, ids)))
    return found


def by_map(tokenizer, rows) -> list:
    "A batch at a time, by `datasets`."
    def prepare(batch):
        messages = [turns(dict(zip(batch, values))) for values in zip(*batch.values())]
        prompts = tokenizer.apply_chat_template([each[:1] for each in messages], add_generation_prompt=True,
                                                tokenize=False)
        texts = tokenizer.apply_chat_template(messages, tokenize=False)
        prompts, ids = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (prompts, texts))
        return {"input_ids": ids, "labels": list(map(mask, prompts, ids))}
    made = datasets.Dataset.from_list(rows)
    done = made.map(prepare, batched=True, remove_columns=made.column_names, load_from_cache_file=False)
    return list(zip(done["input_ids"], done["labels"]))


def ours(tokenizer, rows) -> list:
    "As the package prepares rows."
    encoded = encode_batch(tokenizer, [record for _, record in iter_records(rows)])
    return [(row.input_ids, row.labels) for row in encoded]


def shown(rows) -> list:
    "Ids, and labels without the line feed that ends each row."
    return [(ids, labels[:-1]) for ids, labels in rows]


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="preparation_benchmark.json")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    rows, tokenizer = make_rows(options.rows), load_tokenizer("pocket")
    ways = {"row by row": row_by_row, "datasets.map": by_map, "ours": ours}
    wanted = shown(row_by_row(tokenizer, rows[:1000]))
    for name, way in ways.items():
        if shown(way(tokenizer, rows[:1000])) != wanted:
            raise SystemExit(f"{name} gives other ids or labels than the row-by-row way")
    seconds, n_tokens = {name: [] for name in ways}, 0
    for _ in range(options.repeats):
        for name, way in ways.items():
            gc.collect()
            started = time.perf_counter()
            found = way(tokenizer, rows)
            seconds[name].append(time.perf_counter() - started)
            n_tokens = sum(len(ids) for ids, _ in found)
            del found
    print(f"{platform.processor() or platform.machine()}; Python {platform.python_version()}; one core; "
          f"{options.rows:,} rows of {n_tokens / options.rows:.0f} tokens; median of {options.repeats}\n")
    results = {name: {"rows_per_s": options.rows / statistics.median(taken)} for name, taken in seconds.items()}
    for name, result in results.items():
        result["ratio"] = result["rows_per_s"] / results["row by row"]["rows_per_s"]
        print(f"{name:14} {result['rows_per_s']:9,.0f} rows/s  {result['ratio']:.2f}")
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
