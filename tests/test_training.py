"""What a run survives: a full disk, Ctrl-C from outside, a kill. Each run is a process of its own."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import resource, signal, sys
from finetuning_kit.profiles import demo_config
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tokens import encode_records
from finetuning_kit.training import train

output_dir, n_steps, full_at, resume = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] or None
rows = encode_records(load_tokenizer("pocket"), load_records("pocket")[:64], max_length=128).rows
config = demo_config(output_dir=output_dir, max_steps=n_steps, per_device_train_batch_size=4, save_steps=2,
                     logging_steps=3, save_total_limit=2, **{"lora.lora_dropout": 0.1})


def hear(event):
    if event["type"] == "step":
        print(event["step"], flush=True)
        if event["step"] == full_at:  # from here on no file may grow beyond 300 KB: the kernel refuses the rest
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


try:
    print(train(config, rows, rows[:8], on_event=hear, resume=resume).status)
except FinetuningError as error:
    sys.exit(str(error))
"""


def start(output_dir, n_steps=10, full_at=0, resume=""):
    "Start a run in a process of its own."
    arguments = [str(output_dir), str(n_steps), str(full_at), resume]
    return subprocess.Popen([sys.executable, "-c", RUN, *arguments], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process):
    "Wait for a run; its exit code, its last word, and what it complained about."
    out, complaint = process.communicate(timeout=500)
    return process.returncode, (out.split() or [""])[-1], complaint.strip()


def at_step(process, step):
    "Wait until a run has done its step."
    for line in process.stdout:
        if line.strip() == str(step):
            return
    raise AssertionError(process.stderr.read())


def weights(output_dir):
    "The hash of the adapter that a run left."
    path = Path(output_dir, "instruct_pocket", "adapter", "adapter_model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "The adapter of a run that nothing happened to."
    output_dir = tmp_path_factory.mktemp("unbroken")
    assert finish(start(output_dir))[:2] == (0, "finished")
    return weights(output_dir)


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path, unbroken):
    code, _, complaint = finish(start(tmp_path, full_at=5))
    assert code == 1 and complaint.startswith("the disk is full: `") and "\n" not in complaint
    assert "checkpoint-6` needs about" in complaint and "MiB are free" in complaint
    run = tmp_path / "instruct_pocket"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert finish(start(tmp_path, resume="auto"))[:2] == (0, "finished")
    assert weights(tmp_path) == unbroken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_leaves_a_checkpoint_that_resumes(tmp_path, unbroken, number):
    process = start(tmp_path)
    at_step(process, 3)
    process.send_signal(number)
    assert finish(process)[:2] == (0, "interrupted")
    if number == signal.SIGINT:
        assert finish(start(tmp_path, resume="auto"))[:2] == (0, "finished")
        assert weights(tmp_path) == unbroken


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(tmp_path, unbroken):
    process = start(tmp_path)
    at_step(process, 5)
    time.sleep(0.02)
    process.kill()
    process.communicate()
    assert finish(start(tmp_path, resume="auto"))[:2] == (0, "finished")
    assert weights(tmp_path) == unbroken
