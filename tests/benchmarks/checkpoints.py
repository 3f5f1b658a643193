"""What a checkpoint costs: milliseconds a save, and the share of a run's time, beside the plain trainer's save.

    python -m tests.benchmarks.checkpoints
"""
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch


def time_of(save, n=7):
    "Median of n saves, milliseconds."
    taken = []
    for _ in range(n):
        began = time.perf_counter()
        save()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken)


def trained(r, steps=3):
    "A trainer of the pocket model that has made some steps."
    from finetuning_kit.profiles import demo_config
    from finetuning_kit.loading import load_records
    from finetuning_kit.models import load_tokenizer
    from finetuning_kit.progress import RunProgress
    from finetuning_kit.runs import RunFolder
    from finetuning_kit.tokens import encode_records
    from finetuning_kit.trainer import make_trainer
    from finetuning_kit.training import prepare_model

    tokenizer = load_tokenizer("pocket")
    rows = encode_records(tokenizer, load_records("pocket")[:160], max_length=128).rows
    config = demo_config(max_steps=steps, **{"lora.r": r})
    history = [{"step": n, "loss": 1.0} for n in range(300)]
    progress = RunProgress(RunFolder(tempfile.mkdtemp()).open(), saved={"history": history})
    trainer = make_trainer(config, prepare_model(config), tokenizer, (rows, []), progress)
    began = time.perf_counter()
    trainer.train()
    return trainer, (time.perf_counter() - began) / steps


def compare(r):
    "One line: our save, the plain one, the adapter's size."
    from transformers import Trainer

    from finetuning_kit.models import quiet_libraries
    from finetuning_kit.progress import trainable_bytes
    from finetuning_kit.trainer import KitTrainer

    with quiet_libraries():
        trainer, step_s = trained(r)
        ours = time_of(lambda: trainer._save_checkpoint(trainer.model, None))
        plain_save, KitTrainer._save = KitTrainer._save, Trainer._save
        plain = time_of(lambda: Trainer._save_checkpoint(trainer, trainer.model, None))
        KitTrainer._save = plain_save
    size = trainable_bytes(trainer.model) / 2**20
    share = ours / 1000 / (500 * step_s + ours / 1000)
    print(f"adapter {size:6.1f} MiB (checkpoint {3 * size:6.1f}): {ours:6.0f} ms a save, plain {plain:6.0f} ms; "
          f"{share:.2%} of the time of a run that saves every 500 steps of {1000 * step_s:.0f} ms")
    shutil.rmtree(Path(trainer.progress.folder.path), ignore_errors=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    for r in (16, 1800):
        compare(r)
