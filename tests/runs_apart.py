"""Training runs in processes of their own, forked from a server that imported everything once."""
import builtins
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from finetuning_kit.profiles import demo_config
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tokens import encode_records
from finetuning_kit.trainer import KitTrainer
from finetuning_kit.training import train

TOKENIZER = load_tokenizer("pocket")
ROWS = encode_records(TOKENIZER, load_records("pocket")[:48], max_length=128).rows
BASIS = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 3, "save_total_limit": 2,
         "eval_steps": 3, "lora.lora_dropout": 0.1, "lora.r": 4}
WRITERS = ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"),
           (shutil, "rmtree"), (torch, "save"), (safetensors.torch, "save_file"), (Path, "write_text"),
           (builtins, "open"))


class Outcome(NamedTuple):
    "How a run in a process of its own ended."
    code: int  # exit code; -9: killed
    status: str  # as the run has it; "" when it never said
    complaint: str  # the error, one sentence
    folder: Path  # the run's folder


def settings(output_dir, changes):
    "A config of the demo's kind, small."
    basis = {name: value for name, value in BASIS.items()
             if not ("lora" in changes and name.startswith("lora.")) and name.split(".")[-1] not in changes}
    return demo_config(output_dir=str(output_dir), **{**basis, **changes})


def die_at_call(n, from_step):
    "Count every call that may change a file, from the save of a step on; the n-th is the last thing this process does."
    save, count = KitTrainer._save_checkpoint, [0]

    def counted(real, is_open):
        def call(*args, **kwargs):
            writes = not is_open or any(letter in str([*args, *kwargs.values()][1:2]) for letter in "wax+")
            count[0] += writes
            if writes and count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    def saving(trainer, *args):
        before = [(home, name, getattr(home, name)) for home, name in WRITERS]
        if trainer.state.global_step == from_step:
            [setattr(home, name, counted(real, home is builtins)) for home, name, real in before]
        try:
            return save(trainer, *args)
        finally:
            [setattr(home, name, real) for home, name, real in before]

    KitTrainer._save_checkpoint = saving


def break_loss(step, value):
    "From a step on the loss is no number."
    compute = KitTrainer.compute_loss
    KitTrainer.compute_loss = lambda self, *args, **kwargs: compute(self, *args, **kwargs) * (
        value if self.state.global_step + 1 >= step and self.model.training else 1.0)


def break_gradient(step, value):
    "In a step one number of one gradient is none."
    measure = KitTrainer._clip_grad_norm

    def broken(self, model):
        if self.state.global_step + 1 == step:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
        return measure(self, model)
    KitTrainer._clip_grad_norm = broken


def break_weight(step, value):
    "In a step the optimizer leaves one weight that is no number."
    look = KitTrainer._maybe_log_save_evaluate

    def broken(self, *args, **kwargs):
        if self.state.global_step == step:
            next(p for p in self.model.parameters() if p.requires_grad).data.view(-1)[0] = value
        return look(self, *args, **kwargs)
    KitTrainer._maybe_log_save_evaluate = broken


def blow_up(step, factor):
    "In a step gradient and loss are larger by a factor."
    compute = KitTrainer.compute_loss
    KitTrainer.compute_loss = lambda self, *args, **kwargs: compute(self, *args, **kwargs) * (
        factor if self.state.global_step + 1 == step and self.model.training else 1.0)


def silence(step):
    "From a step on the loss does not depend on the weights."
    compute = KitTrainer.compute_loss
    KitTrainer.compute_loss = lambda self, *args, **kwargs: compute(self, *args, **kwargs) * (
        0.0 if self.state.global_step + 1 >= step and self.model.training else 1.0)


def overshoot(step, rate):
    "In a step the learning rate is far too high."
    count = KitTrainer.training_step

    def broken(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        return count(self, *args, **kwargs)
    KitTrainer.training_step = broken


FAULTS = {"silence": silence, "rate": overshoot, "loss": break_loss, "gradient": break_gradient,
          "weight": break_weight, "spike": blow_up}


def listener(plan):
    "What happens to a run at which step."
    def hear(event):
        if event["type"] == plan.get("at", "step") and event["step"] == plan.get("step"):
            for number in plan.get("signals", ()):
                signal.raise_signal(number)
            if "limit" in plan:
                resource.setrlimit(resource.RLIMIT_FSIZE, (plan["limit"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return hear


def work(output_dir, changes, plan):
    "One run; what it says lies beside its folder."
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to Ctrl-C
    if "die_at_call" in plan:
        die_at_call(*plan["die_at_call"])
    if "fault" in plan:
        FAULTS[plan["fault"][0]](*plan["fault"][1:])
    rows = [row for row in ROWS[plan.get("rows_from", 0):plan.get("rows_to", 40)]]
    if plan.get("weights"):
        for n, row in enumerate(rows):
            row.weights = [0.5 + (n + at) % 2 for at in range(row.n_tokens)]
    result = Path(output_dir, "result.json")
    result.unlink(missing_ok=True)
    try:
        evals = ROWS[40:] if plan.get("evaluate", True) else []
        run = train(settings(output_dir, changes), rows, evals, resume=plan.get("resume"), on_event=listener(plan))
        said = {"status": run.status, "history": run.history, "notes": run.notes}
    except (FinetuningError, KeyboardInterrupt) as error:
        said = {"status": "failed", "complaint": str(error)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result.write_text(json.dumps(said))
    os._exit(said["status"] == "failed")


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.runs_apart"])


def start(output_dir, changes=None, **plan):
    "Start a run in a process of its own."
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    process = CONTEXT.Process(target=work, args=(str(output_dir), changes or {}, plan))
    process.start()
    return process


def finish(process, output_dir):
    "Wait for a run."
    process.join(300)
    said = {}
    with suppress(FileNotFoundError):
        said = json.loads(Path(output_dir, "result.json").read_text())
    folder = Path(output_dir, "instruct_pocket")
    return Outcome(process.exitcode, said.get("status", ""), said.get("complaint", ""), folder)


def run_apart(output_dir, changes=None, **plan):
    "Train in a process of its own, to whatever end."
    return finish(start(output_dir, changes, **plan), output_dir)


def go_on(output_dir, changes=None, **plan):
    "Resume a run; one that was killed before it had a folder is started."
    has_folder = Path(output_dir, "instruct_pocket", "run.json").exists()
    return run_apart(output_dir, changes, resume="auto" if has_folder else None, **plan)


def left(folder):
    "What decides whether two runs are the same: every loss, and the bytes of what they saved."
    files = [*folder.glob("adapter/*.safetensors"), *folder.glob("final_model/*.safetensors"),
             *folder.glob("best_model/*.safetensors")]
    hashes = {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    said = json.loads((folder.parent / "result.json").read_text())
    return said["history"], hashes


def kill_at_random(n, home, seed=0, changes=None):
    "Kill n runs at random moments, go on, and count those that end as an unbroken run."
    random.seed(seed)
    run_apart(home / "first", changes)  # the server needs a while to start
    begun = time.time()
    unbroken = run_apart(home / "unbroken", changes)
    longest, wanted, tally = time.time() - begun, left(unbroken.folder), []
    for trial in range(n):
        place = home / f"trial-{trial}"
        process = start(place, changes)
        process.join(random.uniform(0.05, longest))
        process.kill()
        process.join()
        kept = sorted(path.name for path in place.glob("instruct_pocket/checkpoints/checkpoint-*"))
        done = place.joinpath("result.json").exists()
        outcome = Outcome(0, "finished", "", place / "instruct_pocket") if done else go_on(place, changes)
        same = outcome.status == "finished" and left(outcome.folder) == wanted
        tally.append((same, bool(kept), done))
        if same:
            shutil.rmtree(place)
    return tally
