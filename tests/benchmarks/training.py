"""Tokens a CPU second, padding, memory and held-out loss of a LoRA run, ours beside plain and tuned TRL and padding to
the maximum: prints a table and writes JSON.

    python tests/benchmarks/training.py [--model 25M] [--rows 160] [--rounds 3] [--output training_benchmark.json]

The same rows, the same rank-16 adapter on all linear layers, the same 16 rows a step, the same rate; each contestant
runs in a process of its own, on one thread, and they take turns (A B C A B C). Tokens are those of the rows: padding
does not count, but its time does. CPU seconds are those of the training loop alone; memory is what the process grew by
while it ran; fixed seconds are the CPU seconds of the process that are neither the loop's nor the benchmark's own:
imports, loading, and for ours also the checks, the saved adapter, the proof and the picture. The held-out loss is
measured afterwards in the same way for all: in fp32, row by row. Weights are the bytes of the frozen base.

The model is random ("25M": a Llama of 384 x 8 with 8,192 tokens; "pocket": the shipped one), the rows are sentences of
a made-up language whose lengths follow an instruction set's. It is no test: a slow machine is not a fault.
"""
import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LENGTH, STEP_ROWS, RATE = 512, 16, 5e-3


def make_rows(n_rows, n_words, seed=0) -> list:
    "Token ids and labels: words follow one another by a rule with exceptions; lengths are those of instruction data."
    draw, rows = random.Random(seed), []
    for _ in range(n_rows):
        length = min(LENGTH, max(16, round(draw.lognormvariate(4.8, 0.72))))
        ids = [draw.randrange(8, n_words)]
        while len(ids) < length:
            ids.append((ids[-1] * 5 + 17) % (n_words - 8) + 8 if draw.random() < 0.9 else draw.randrange(8, n_words))
        n_prompt = length // 3
        rows.append((ids, [-100] * n_prompt + ids[n_prompt:]))
    return rows


def base_model(name):
    "A model in fp32, the same for every contestant."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetuning_kit.models import load_model

    if name == "pocket":
        return load_model("pocket")
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, tie_word_embeddings=True))


def trl_run(model, rows, **options):
    "Train with TRL alone; returns the adapted model and the CPU seconds of its loop."
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finetuning_kit.models import load_tokenizer

    class LoopClock(TrainerCallback):
        "CPU seconds from the first step's beginning to the last one's end."

        def on_train_begin(self, *args, **kwargs):
            self.began = time.process_time()

        def on_step_end(self, *args, **kwargs):
            self.seconds = time.process_time() - self.began

    padded = options.pop("pad_to", None)
    if options.pop("bf16_weights", False):
        model = model.to(torch.bfloat16)
    if padded:
        rows = [(ids + [0] * (padded - len(ids)), labels + [-100] * (padded - len(labels))) for ids, labels in rows]
    data = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    arguments = SFTConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True,
                          learning_rate=RATE, num_train_epochs=1, save_strategy="no", logging_steps=10**6,
                          max_length=LENGTH, dataloader_pin_memory=False, seed=1, **options)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=load_tokenizer("pocket"),
                         peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    clock = LoopClock()
    trainer.add_callback(clock)
    trainer.train()
    return trainer.model, clock.seconds


def our_run(model, rows, **options):
    "Train with the kit, every choice of speed left to it."
    from finetuning_kit.config import FineTuningConfig
    from finetuning_kit.encoding import EncodedRow
    from finetuning_kit.models import load_tokenizer
    from finetuning_kit.training import train

    options, folder, tokenizer = {"load_in_4bit": False, **options}, tempfile.mkdtemp(), load_tokenizer("pocket")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    config = FineTuningConfig(
        model_name=folder, output_dir=tempfile.mkdtemp(), max_seq_length=LENGTH, dataset_format="chat",
        lora={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        training={"learning_rate": RATE, "num_train_epochs": 1, "warmup_steps": 0, "seed": 1,
                  "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "logging_steps": 1000,
                  "save_steps": 10**6}, **options)
    encoded = [EncodedRow(ids, labels) for ids, labels in rows]
    clock = []
    run = train(config, encoded, tokenizer=tokenizer, on_event=lambda event: clock.append(time.process_time())
                if event["type"] in ("start", "step") else None)
    return run.model, clock[-1] - clock[0]


def bare_run(model, rows):
    "Train with a loop of a few lines over the same adapter and the same fast paths: what a trainer's care costs."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    from finetuning_kit.packing import plan_packs
    from finetuning_kit.speed import row_by_row

    model = get_peft_model(model.to(torch.bfloat16), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, base = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0), model.get_base_model()
    falling = get_linear_schedule_with_warmup(optimizer, 0, len(rows) // STEP_ROWS)
    began = time.process_time()
    with row_by_row(model), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(rows), STEP_ROWS):
            step = rows[start:start + STEP_ROWS]
            n_labels = sum(label != -100 for _, labels in step for label in labels[1:])
            for pack in plan_packs([len(ids) for ids, _ in step], LENGTH):
                ids, places, labels = (torch.tensor([value for index in pack for value in values(*step[index])])
                                       for values in (lambda ids, _: ids, lambda ids, _: range(len(ids)),
                                                      lambda _, labels: [-100, *labels[1:]]))
                hidden = base.model(input_ids=ids[None], position_ids=places[None], use_cache=False).last_hidden_state
                looked_at = (labels[1:] != -100).nonzero().flatten()
                logits = base.lm_head(hidden[0, looked_at]).float()
                loss = torch.nn.functional.cross_entropy(logits, labels[looked_at + 1], reduction="sum") / n_labels
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            falling.step()
            optimizer.zero_grad()
    return model, time.process_time() - began


CONTESTANTS = {
    "TRL, defaults": lambda model, rows: trl_run(model, rows, gradient_accumulation_steps=2),
    "padded to the maximum, fp32": lambda model, rows: trl_run(
        model, rows, pad_to=LENGTH, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=4,
        gradient_accumulation_steps=4),
    "padded to the maximum, bf16": lambda model, rows: trl_run(
        model, rows, pad_to=LENGTH, bf16=True, gradient_checkpointing=False, per_device_train_batch_size=4,
        gradient_accumulation_steps=4),
    "TRL, tuned": lambda model, rows: trl_run(
        model, rows, bf16_weights=True, bf16=True, gradient_checkpointing=False, packing=True, packing_strategy="bfd",
        per_device_train_batch_size=1, gradient_accumulation_steps=max(1, round(
            STEP_ROWS * sum(len(ids) for ids, _ in rows) / len(rows) / LENGTH))),
    "a bare loop": bare_run,
    "finetuning_kit": our_run,
    "finetuning_kit, 4-bit": lambda model, rows: our_run(model, rows, load_in_4bit=True),
}


class Peak(threading.Thread):
    "The most memory a process holds while it is watched, bytes."

    def __init__(self):
        super().__init__(daemon=True)
        import psutil

        self.process, self.over = psutil.Process(), threading.Event()
        self.start_bytes = self.most = self.process.memory_info().rss

    def run(self):
        while not self.over.wait(0.02):
            self.most = max(self.most, self.process.memory_info().rss)


def held_out_loss(model, rows) -> float:
    "Mean loss a token, nats."
    import torch

    model, total, n_tokens = (model if getattr(model, "is_loaded_in_4bit", False) else model.float()).eval(), 0.0, 0
    with torch.no_grad():
        for ids, labels in rows:
            n = sum(label != -100 for label in labels[1:])
            total += model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * n
            n_tokens += n
    return total / n_tokens


def one_run(name, model_name, n_rows) -> dict:
    "Train one contestant in this process."
    import warnings

    warnings.simplefilter("ignore")
    model = base_model(model_name)
    n_words = min(2000, model.config.vocab_size)
    rows, held_out = make_rows(n_rows, n_words), make_rows(32, n_words, seed=1)
    began = time.process_time()
    before, peak = held_out_loss(model, held_out), Peak()
    peak.start()
    own = time.process_time() - began
    trained, seconds = CONTESTANTS[name](model, rows)
    fixed = time.process_time() - own - seconds
    peak.over.set()
    n_tokens = sum(len(ids) for ids, _ in rows)
    weights = sum(p.numel() * p.element_size() for name, p in trained.named_parameters() if "lora_" not in name)
    return {"tokens_per_cpu_s": n_tokens / seconds, "cpu_s": seconds, "before": before,
            "peak_mb": (peak.most - peak.start_bytes) / 2**20, "fixed_s": fixed, "weights_mb": weights / 2**20,
            "held_out": held_out_loss(trained, held_out),
            "whole_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("25M", "pocket"), default="25M")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=";".join(CONTESTANTS), help="names, `;` between")
    parser.add_argument("--output", default="training_benchmark.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return print(json.dumps(one_run(options.one, options.model, options.rows)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--model", options.model, "--rows", str(options.rows), "--one"]
    results = {name: [] for name in CONTESTANTS if name in options.only.split(";")}
    for _ in range(options.rounds):
        for name in results:
            done = subprocess.run([*command, name], env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  {name}: {results[name][-1]}", file=sys.stderr)
    show(results, options)


def show(results, options) -> None:
    "Print the table and write the JSON file."
    from finetuning_kit.machine import probe_machine

    middle = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
              for name, runs in results.items()}
    first = next(iter(middle.values()))
    print(f"{probe_machine()}; Python {platform.python_version()}; {options.model}, {options.rows} rows, "
          f"median of {options.rounds}\n")
    print(f"{'':30} {'tokens/CPU s':>12} {'ratio':>6} {'memory MB':>10} {'ratio':>6} {'weights MB':>10} "
          f"{'fixed s':>8} {'held-out':>9}")
    for name, run in middle.items():
        print(f"{name:30} {run['tokens_per_cpu_s']:12,.0f} {run['tokens_per_cpu_s'] / first['tokens_per_cpu_s']:6.2f} "
              f"{run['peak_mb']:10,.0f} {run['peak_mb'] / first['peak_mb']:6.2f} {run['weights_mb']:10,.1f} "
              f"{run['fixed_s']:8.1f} {run['held_out']:9.3f}")
    print(f"{'before training':85} {first['before']:9.3f}")
    Path(options.output).write_text(json.dumps({"machine": str(probe_machine()), "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
