"""CPU seconds of answers: one prompt at a time against batches sorted by length, and whether the tokens are the same.

    python tests/benchmarks/answers.py [--model pocket] [--prompts 100] [--tokens 64] [--rounds 2] [--output FILE]

The same prompts, the same greedy settings, one thread; the contestants take turns (A B A B). "One by one" calls
Transformers' `generate` a prompt at a time; "in batches" is `collect_answers`, with a file that keeps the answers. Each
is run in fp32 and in bf16. Where the tokens of a row differ, the two tokens at the first difference are weighed: how
far apart their logits are in fp32, and how far rounding moves a logit from one shape of a batch to another.

The model is "pocket", the shipped one with its test questions, or "25M", a random Llama of 384 x 8 whose prompts have
the lengths of instruction data. It is no test: a slow machine is not a fault.
"""
import argparse
import copy
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from finetuning_kit.asking import pad_left, plain_greedy
from finetuning_kit.collecting import collect_answers
from finetuning_kit.loading import load_records
from finetuning_kit.machine import probe_machine
from finetuning_kit.models import load_model, load_tokenizer, quiet_libraries
from finetuning_kit.tokens import encode_prompt

BATCHES = (16, 32)


def make_setting(name, n_prompts):
    "A tokenizer that shows ids instead of words, a model, and prompts."
    tokenizer = load_tokenizer("pocket")
    if name == "pocket":
        model, asked = load_model("pocket"), load_records("pocket:test")[:n_prompts]
        prompts = [encode_prompt(tokenizer, record) for record in asked]
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=8192, hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=6, max_position_embeddings=2048, tie_word_embeddings=True)).eval()
        draw = random.Random(0)
        lengths = [min(400, max(8, round(draw.lognormvariate(4.0, 0.72)))) for _ in range(n_prompts)]
        prompts = [[draw.randrange(8, 8192) for _ in range(length)] for length in lengths]
    tokenizer.decode = lambda ids, **_: " ".join(map(str, ids))
    return tokenizer, model, prompts


def one_by_one(model, tokenizer, prompts, n_tokens):
    "The ids that Transformers gives a prompt at a time."
    found = []
    with plain_greedy(model, tokenizer, n_tokens) as settings, quiet_libraries():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            found.append([token for token in new[0, len(prompt):].tolist() if token not in settings.eos_token_id])
    return found


def in_batches(model, tokenizer, prompts, n_tokens, batch_size):
    "The ids that the kit gives."
    with tempfile.TemporaryDirectory() as folder:
        found = collect_answers(model, tokenizer, prompts, n_tokens, batch_size, keep_in=Path(folder) / "answers.jsonl")
    return [[int(token) for token in answer.text.split()] for answer in found.answers]


@torch.no_grad()
def weigh(model, exact, prompts, alone, together) -> dict:
    "Look at the first difference of each row: the gap between the two tokens, and what rounding does to a logit."
    gaps, exact_gaps, shifts = [], [], []
    for prompt, a, b in zip(prompts, alone, together):
        if a == b:
            continue
        at = next((n for n, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))
        ids = torch.tensor([prompt + a[:at]])
        logits, true = model(ids).logits[0, -1].float(), exact(ids).logits[0, -1]
        padded, mask = pad_left([prompt + a[:at]] * 16 + [[0] * (len(prompt) + at + 8)], 0)
        several = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0)).logits[0, -1].float()
        shifts.append((logits - several).abs().max().item())
        best = logits.topk(2)
        gaps.append((best.values[0] - best.values[1]).item())
        exact_gaps.append((true[best.indices[0]] - true[best.indices[1]]).abs().item())
    if not gaps:
        return {"rows_that_differ": 0}
    return {"rows_that_differ": len(gaps), "ties": sum(gap == 0 for gap in gaps), "largest_gap": max(gaps),
            "largest_exact_gap": max(exact_gaps), "largest_shift": max(shifts)}


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("25M", "pocket"), default="pocket")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", default="answers_benchmark.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, exact, prompts = make_setting(options.model, options.prompts)
    models = {"fp32": exact, "bf16": copy.deepcopy(exact).to(torch.bfloat16)}
    contestants = {(precision, size): (lambda precision=precision, size=size: (
        in_batches(models[precision], tokenizer, prompts, options.tokens, size) if size
        else one_by_one(models[precision], tokenizer, prompts, options.tokens)))
        for precision in models for size in (0, *BATCHES)}
    seconds, ids = {name: [] for name in contestants}, {}
    for _ in range(options.rounds):
        for name, ask in contestants.items():
            began = time.process_time()
            ids[name] = ask()
            seconds[name].append(time.process_time() - began)
            print(f"  {name}: {seconds[name][-1]:.1f} CPU s", file=sys.stderr, flush=True)
    notes = {name: weigh(models[name[0]], exact, prompts, ids[name[0], 0], ids[name])
             for name in contestants if name[1]}
    show(options, prompts, seconds, ids, notes)


def show(options, prompts, seconds, ids, notes) -> None:
    "Print the table and write the JSON file."
    lengths = sorted(map(len, prompts))
    print(f"{probe_machine()}; Python {platform.python_version()}; {options.model}, {len(prompts)} prompts of "
          f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}, "
          f"up to {options.tokens} new ones; "
          f"median of {options.rounds}\n")
    slow = statistics.median(seconds["fp32", 0])
    print(f"{'':16} {'batch':>6} {'CPU s':>8} {'tokens/CPU s':>13} {'ratio':>6} {'rows that differ':>17}")
    for (precision, size), runs in seconds.items():
        middle, n_new = statistics.median(runs), sum(len(row) for row in ids[precision, size])
        differ = notes.get((precision, size), {}).get("rows_that_differ", "")
        print(f"{precision:16} {size or 1:6} {middle:8.1f} {n_new / middle:13,.0f} {slow / middle:6.2f} {differ:>17}")
    for name, note in notes.items():
        print(name, note)
    record = [{"precision": name[0], "batch": name[1] or 1, "cpu_s": runs, **notes.get(name, {})}
              for name, runs in seconds.items()]
    told = {"machine": str(probe_machine()), "model": options.model, "runs": record}
    Path(options.output).write_text(json.dumps(told,
                                               indent=2) + "\n")


if __name__ == "__main__":
    main()
