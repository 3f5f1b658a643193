"""The forecast beside measured runs on a CPU: tensors, the process's growth, CPU seconds of a step. Prints a table.

    python tests/benchmarks/forecast.py [--only 25M] [--output forecast_benchmark.json]

Every run has a process of its own and one thread. It trains a few tokens first, so that libraries and kernels are
loaded, then the run proper: what the process grew by (resident memory, sampled every 3 ms) is what the system would
count against it. The same run again under a tally of every tensor says how much of that is tensors. A growth is no sum
of tensors: the C library's allocator keeps what was freed in pieces, and pages of a buffer that nobody writes to are
never there; hence both. A step's seconds are CPU seconds, the quicker of the last two of three, so that others on the
machine count less.
"""
import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

COMMON = {"batch": 4, "length": 256, "precision": "bf16", "passes": 2}
GRID = [{**COMMON, **run} for run in (
    {"model": "25M", "method": "lora", "batch": 1, "length": 128}, {"model": "25M", "method": "lora", "batch": 8},
    {"model": "25M", "method": "lora", "length": 512, "gradient_checkpointing": True},
    {"model": "25M", "method": "full"},
    {"model": "25M", "method": "full", "batch": 2, "length": 128, "precision": "fp32", "passes": 1},
    {"model": "25M", "method": "full", "gradient_checkpointing": True},
    {"model": "25M", "method": "lora", "precision": "fp32"}, {"model": "25M", "method": "dora"},
    {"model": "25M", "method": "qlora"}, {"model": "25M", "method": "ia3"},
    {"model": "pocket", "method": "lora", "length": 128}, {"model": "pocket", "method": "lora", "batch": 16},
    {"model": "pocket", "method": "full", "batch": 8, "precision": "fp32"},
    {"model": "pocket", "method": "lora", "batch": 16, "length": 512, "precision": "fp32"},
    {"model": "25M", "method": "prompt"}, {"model": "25M", "method": "freeze"}, {"model": "25M", "method": "adalora"},
    {"model": "25M", "method": "lora", "packing": True},
    {"model": "pocket", "method": "lora", "batch": 16, "gradient_checkpointing": True},
    {"model": "25M", "method": "ln_tuning", "precision": "fp32"},
    {"model": "25M", "method": "full", "optim": "adafactor"},
    {"model": "25M", "method": "lora", "batch": 8, "length": 512, "lora_dropout": 0.05},
    {"model": "25M", "method": "prefix"},
    {"model": "pocket", "method": "full", "batch": 16, "length": 128, "gradient_checkpointing": True},
    {"model": "25M", "method": "p_tuning", "batch": 2, "length": 512},
    {"model": "25M", "method": "lora", "batch": 2, "length": 1024, "precision": "fp32",
     "gradient_checkpointing": True})]


def shape_of(run):
    "The config of the model that is trained."
    from transformers import LlamaConfig

    from finetuning_kit.budget import base_shape

    return base_shape("pocket") if run["model"] == "pocket" else LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, tie_word_embeddings=True)


def config_of(run, folder="pocket"):
    "The settings of a run of three steps."
    from finetuning_kit.config import FineTuningConfig

    adapter = {"target_modules": "all-linear", "lora_dropout": run.get("lora_dropout", 0.0)}
    return FineTuningConfig(
        model_name=folder, output_dir=tempfile.mkdtemp(), max_seq_length=run["length"], dataset_format="chat",
        method=run["method"], load_in_4bit=run["method"] == "qlora",
        **({"lora": adapter} if run["method"] in ("lora", "qlora", "dora", "adalora") else {}),
        training={"max_steps": 3, "per_device_train_batch_size": run["batch"],
                  "gradient_accumulation_steps": run["passes"],
                  "gradient_checkpointing": run.get("gradient_checkpointing", False),
                  "bf16": run["precision"] == "bf16",
                  "packing": run.get("packing", False), "warmup_steps": 0, "logging_steps": 1000, "save_steps": 10**6,
                  "eval_strategy": "no", "optim": run.get("optim", "adamw_torch_fused")})


def rows_of(run):
    "Rows of the run's length; of uneven length where they are packed."
    from finetuning_kit.encoding import EncodedRow

    draw, rows = random.Random(0), []
    for _ in range(3 * run["batch"] * run["passes"]):
        n_tokens = draw.randint(run["length"] // 4, run["length"]) if run.get("packing") else run["length"]
        ids = [draw.randrange(8, 2000) for _ in range(n_tokens)]
        rows.append(EncodedRow(ids, list(ids)))
    return rows


def resident() -> int:
    "Bytes of this process that lie in memory."
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak(threading.Thread):
    "The most memory this process holds while it is watched, bytes."

    def __init__(self):
        super().__init__(daemon=True)
        self.over, self.before = threading.Event(), resident()
        self.most = self.before

    def run(self):
        while not self.over.wait(0.003):
            self.most = max(self.most, resident())


def one_run(run) -> dict:
    "Forecast and measure one run in this process."
    import ctypes
    import warnings

    import torch
    from transformers import AutoModelForCausalLM

    from finetuning_kit.budget import Tally
    from finetuning_kit.forecast import fit_on, probe_pace
    from finetuning_kit.machine import probe_machine
    from finetuning_kit.models import load_tokenizer
    from finetuning_kit.training import train

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer, shape, folder = load_tokenizer("pocket"), shape_of(run), tempfile.mkdtemp()
    small = {**run, "length": 16, "batch": 1, "passes": 1, "gradient_checkpointing": False}
    train(config_of(small), rows_of(small), tokenizer=tokenizer)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows, config, clock = rows_of(run), config_of(run, folder), []
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak = Peak()
    peak.start()
    train(config, rows, tokenizer=tokenizer, on_event=lambda event: clock.append(time.process_time())
          if event["type"] in ("start", "step") else None)
    peak.over.set()
    with Tally() as tally:
        train(config_of(run, folder), rows, tokenizer=tokenizer)
    lengths = [row.n_tokens for row in rows]
    fit = fit_on(config, shape, probe_machine(), probe_pace(run["precision"]), (len(rows), lengths))
    return {"process": peak.most, "growth": peak.most - peak.before, "memory": vars(fit.memory),
            "told": fit.budget.peak,
            "tensors": max(sum(accounts.values()) for accounts in tally.peaks.values()), "step": vars(fit.step),
            "seconds": min(later - earlier for earlier, later in zip(clock[1:], clock[2:]))}


def show(results) -> None:
    "Print the table, coverage and median errors."
    mib = 2**20
    print(f"{'run':58} {'tensors':>8} {'told':>6} {'process':>8} {'told, MiB':>20} {'step, s':>8} {'told':>18}")
    for run, got in results:
        words = " ".join(str(value) if not isinstance(value, bool) else key
                         for key, value in run.items() if key != "passes")
        low, likely, high = (got["memory"][key] / mib for key in ("low", "likely", "high"))
        print(f"{words:58} {got['tensors'] / mib:8.0f} {got['told'] / mib:6.0f} {got['process'] / mib:8.0f} "
              f"{likely:6.0f} ({low:4.0f} to {high:4.0f}) {got['seconds']:8.2f} {got['step']['likely']:5.2f} "
              f"({got['step']['low']:.2f} to {got['step']['high']:.2f})")
    for name, real, told in (("process", "process", "memory"), ("seconds", "seconds", "step")):
        inside = sum(got[told]["low"] <= got[real] <= got[told]["high"] for _, got in results)
        error = statistics.median(abs(got[told]["likely"] / got[real] - 1) for _, got in results)
        print(f"{name}: {inside} of {len(results)} inside the interval, median error {error:.1%}")
    error = statistics.median(abs(got["told"] / got["tensors"] - 1) for _, got in results)
    print(f"tensors: median error {error:.1%}")


def main() -> None:
    "Run the grid, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs that hold this word")
    parser.add_argument("--output", default="forecast_benchmark.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return print(json.dumps(one_run(json.loads(options.one))))
    results, environment = [], {**os.environ, "OMP_NUM_THREADS": "1"}
    for run in GRID:
        if options.only in json.dumps(run):
            command = [sys.executable, __file__, "--one", json.dumps(run)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{run}: {done.stderr[-2000:]}")
            results.append((run, json.loads(done.stdout.splitlines()[-1])))
            print(f"  {run}", file=sys.stderr)
            Path(options.output).write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
