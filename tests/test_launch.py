"""Several processes, one run: the losses of a single process, one set of files, one voice. Each run has processes of its own."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import os, sys
from dataclasses import replace
from finetuning_kit.config import demo_config
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.processes import process_index
from finetuning_kit.cli import told_in_sentences
from finetuning_kit.tokens import encode_records
from finetuning_kit.training import train

output_dir, passes, fault, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] or None
rows = encode_records(load_tokenizer("pocket"), load_records("pocket")[:66], max_length=128).rows
if fault == "weights":
    rows = [replace(row, weights=[0.0 if label == -100 else 0.5 + n % 3 for n, label in enumerate(row.labels)])
            for row in rows]
config = demo_config(output_dir=output_dir, num_train_epochs=2, per_device_train_batch_size=4, save_steps=2,
                     logging_steps=1, eval_steps=3, per_device_eval_batch_size=3, gradient_accumulation_steps=passes,
                     packing=False, **{"lora.lora_dropout": 0.0})
n_steps = 0


def stop():
    global n_steps
    n_steps += 1
    if fault == "error" and n_steps == 3 and process_index() == 1:
        raise ValueError("row 17 broke process 1")
    if fault == "nan" and n_steps == 3 and process_index() == 1:
        next(iter(train.__globals__["LATEST"].parameters())).data.fill_(float("nan"))
    return fault == "stop" and n_steps == 3 and process_index() == 1


def hear(event):
    if event["type"] == "step":
        print(f"{process_index()}: {event['step']}", flush=True)


with told_in_sentences():
    print(train(config, rows[:53], rows[53:], on_event=hear, resume=resume, should_stop=stop).status, flush=True)
"""
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


def start(output_dir, n=2, fault="", resume=""):
    "Start a run of 16 rows a step in `n` processes."
    words = [sys.executable, "-c", RUN, str(output_dir), str(4 // n), fault, resume]
    return subprocess.Popen([*(TORCHRUN if n > 1 else []), *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=QUIET)


def finish(process):
    "Wait for a run; its exit code, what it said, and what it complained about."
    out, complaint = process.communicate(timeout=300)
    return process.returncode, out, [line for line in complaint.splitlines() if line.startswith("finetuning-kit: ")]


def story(output_dir):
    "What a run wrote about its losses, [(type, step, loss)]."
    lines = Path(output_dir, "instruct_pocket", "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(event["type"], event["step"], event.get("loss", event.get("eval_loss"))) for event in events
            if event["type"] in ("log", "eval")]


def adapter(output_dir):
    "The weights of the adapter that a run left."
    from safetensors.torch import load_file

    return load_file(Path(output_dir, "instruct_pocket", "adapter", "adapter_model.safetensors"))


def distance(one, other):
    "How far two adapters are apart, at most."
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "The folders of a run in two processes and of the same run in one."
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    assert finish(start(two)) [0] == finish(start(one, n=1))[0] == 0
    return two, one


def assert_same(two, one):
    "Two runs told the same losses, at the same steps, and came to the same weights."
    assert [entry[:2] for entry in story(two)] == [entry[:2] for entry in story(one)]
    for left, right in zip(story(two), story(one)):
        assert left[2] == pytest.approx(right[2], abs=1e-5), left
    assert distance(adapter(two), adapter(one)) < 1e-5


def test_two_processes_learn_what_one_learns_from_uneven_shares(pair):
    assert_same(*pair)
    assert [entry[1] for entry in story(pair[0]) if entry[0] == "log"] == list(range(1, 9))  # 2 epochs of ceil(53 / 16)


def test_row_weights_count_the_same_in_two_processes(tmp_path):
    assert finish(start(tmp_path / "two", fault="weights"))[0] == 0
    assert finish(start(tmp_path / "one", n=1, fault="weights"))[0] == 0
    assert_same(tmp_path / "two", tmp_path / "one")


def test_files_are_written_once(pair):
    two, one = (path / "instruct_pocket" for path in pair)
    kinds = [json.loads(line)["type"] for line in (two / "events.jsonl").read_text().splitlines()]
    assert kinds == [json.loads(line)["type"] for line in (one / "events.jsonl").read_text().splitlines()]
    names = {path.relative_to(two).as_posix() for path in two.rglob("*")}
    extra = {name for name in names if "rng_state" in name}
    assert names - extra == {path.relative_to(one).as_posix() for path in one.rglob("*")
                             if "rng_state" not in path.name}
    assert json.loads((two / "run.json").read_text())["notes"][-1] == (
        "rows: 2 processes × 4 rows × 2 passes = 16 a step")


def test_a_stop_in_one_process_stops_all_and_resumes_exactly(tmp_path, pair):
    code, out, _ = finish(start(tmp_path, fault="stop"))
    assert code == 0 and out.count("stopped") == 2 and "0: 4" not in out
    run = tmp_path / "instruct_pocket"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    code, out, _ = finish(start(tmp_path, resume="auto"))
    assert code == 0 and "0: 4" in out and "0: 3" not in out
    assert distance(adapter(tmp_path), adapter(pair[0])) == 0
    assert [path for path in run.rglob("*") if ".part" in path.name] == []


def test_a_checkpoint_of_two_processes_is_refused_by_one(tmp_path, pair):
    code, _, complaints = finish(start(pair[0], n=1, resume="auto"))
    assert code == 2 and len(complaints) == 1
    assert "`n_processes` was 2 and is 1" in complaints[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_to_the_launcher_ends_all_with_one_checkpoint(tmp_path, number):
    process = start(tmp_path)
    for line in process.stdout:
        if line.strip() == "0: 3":
            break
    process.send_signal(number)
    _, out, complaints = finish(process)
    assert out.count("interrupted") == 2 and complaints == []
    run = tmp_path / "instruct_pocket"
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    last = json.loads((run / "run.json").read_text())
    assert last["status"] == "interrupted" and saved[-1] == f"checkpoint-{last['n_steps']}"


def test_an_error_in_one_process_ends_all_with_one_sentence(tmp_path):
    began = time.monotonic()
    code, _, complaints = finish(start(tmp_path, fault="error"))
    assert code != 0 and len(complaints) == 1
    assert complaints[0].startswith("finetuning-kit: unexpected ValueError: row 17 broke process 1")
    passport = json.loads((tmp_path / "instruct_pocket" / "run.json").read_text())
    assert passport["status"] == "failed" and passport["reason"] == "row 17 broke process 1"
    assert time.monotonic() - began < 120


def test_a_refusal_is_said_once(tmp_path):
    (tmp_path / "instruct_pocket").mkdir()
    (tmp_path / "instruct_pocket" / "beach.png").write_text("sand")
    code, _, complaints = finish(start(tmp_path))
    assert code != 0 and len(complaints) == 1 and "files that no run wrote" in complaints[0]
