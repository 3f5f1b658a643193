"""What the command line makes of a run that is interrupted, and the sentence for each fault of training."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetuning_kit.checkpoints import find_start, run_fingerprint
from finetuning_kit.config import load_config
from finetuning_kit.profiles import demo_config
from finetuning_kit.encoding import EncodedRow
from finetuning_kit.models import load_model, load_tokenizer
from finetuning_kit.relief import memory_guard
from finetuning_kit.runs import RunFolder
from finetuning_kit.settings import FinetuningError
from finetuning_kit.trainer import check_fit, check_rows, check_settings
from finetuning_kit.training import train
from tests.runs_apart import ROWS

COMMAND = [sys.executable, "-m", "finetuning_kit.cli", "train", "--base-model", "pocket", "--dataset", "pocket",
           "--eval-dataset", "pocket:test", "--max-seq-length", "128", "--save-steps", "2", "--output-dir"]


def test_sigterm_ends_the_command_with_143_a_checkpoint_and_no_model(tmp_path):
    process = subprocess.Popen([*COMMAND, str(tmp_path)], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    run = tmp_path / "instruct_pocket"
    while process.poll() is None and not (run / "checkpoints" / "checkpoint-2").exists():
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGTERM)
    complaint = process.communicate(timeout=300)[1].strip().splitlines()[-1]
    assert process.returncode == 143 and complaint.startswith("finetuning-kit: interrupted at step ")
    assert "`--resume auto` goes on" in complaint
    found = json.loads((run / "run.json").read_text())
    assert (found["status"], found["ended"]) == ("interrupted", "interrupted by SIGTERM")
    assert (run / "checkpoints" / f"checkpoint-{found['n_steps']}").is_dir()
    assert not (run / "final_model").exists() and not (run / "adapter").exists()


# --- one sentence and one way out for each fault ---------------------------------------------------------------------
def out_of_memory(error, **changes):
    "What a full memory is told as."
    with memory_guard(demo_config(**changes)):
        raise error


def from_yaml(text, place):
    "Read settings that somebody wrote."
    (place / "config.yaml").write_text(text)
    return load_config(place / "config.yaml")


def in_thin_air(place, **changes):
    "Train in a folder of its own."
    return train(demo_config(output_dir=str(place), **changes), ROWS[:8])


def silent_row():
    "A row without a token for the loss."
    return EncodedRow([5, 6, 7], [-100, -100, -100])


FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
FAULTS = {  # fault -> what brings it about, words of the sentence, words of the way out
    "memory of the GPU is full": (lambda place: out_of_memory(FULL, per_device_train_batch_size=8),
                                  "the memory is full", "`per_device_train_batch_size: 4` and `gradient_accumulation"),
    "memory is full with one row": (lambda place: out_of_memory(MemoryError(), per_device_train_batch_size=1),
                                    "the memory is full", "`gradient_checkpointing: true`"),
    "no token for the loss": (lambda place: check_rows([silent_row()], []), "hold no token for the loss",
                              "raise `max_seq_length`"),
    "no rows": (lambda place: check_rows([], []), "there are no training rows", "at least one row"),
    "no steps": (lambda place: demo_config(max_steps=0), "`max_steps` must be -1", "at least 1"),
    "a weight that is no number": (lambda place: check_rows([EncodedRow([1], [1], weights=[float("nan")])], []),
                                   "a weight of this training row is no number", "give it 0, 1"),
    "a tokenizer larger than its model": (lambda place: check_fit([EncodedRow([99999], [1])], load_model("pocket")),
                                          "the rows use token", "encode them with the model's own tokenizer"),
    "a row longer than the model": (lambda place: check_fit([EncodedRow([5] * 2000, [5] * 2000)], load_model("pocket")),
                                    "the longest row has 2000 tokens", "lower `max_seq_length`"),
    "a layer that no model has": (lambda place: in_thin_air(place, target_modules=["q_proj", "v_prj"]),
                                  "'v_prj', which no layer of this model is called", "all-linear"),
    "4 bits and all weights": (lambda place: demo_config(method="full", load_in_4bit=True),
                               "`load_in_4bit` needs an adapter", "set it to false"),
    "fp16 and bf16 at once": (lambda place: demo_config(fp16=True, bf16=True), "`fp16` and `bf16` are both on",
                              "keep one"),
    "a setting misspelled": (lambda place: from_yaml("model_name: pocket\nlearning_rat: 1e-4\n", place),
                             "config.yaml:2", "learning_rate"),
    "a model that is nowhere": (lambda place: load_tokenizer("no/such-model"), "`model_name` 'no/such-model'",
                                "connect to the network"),
    "early end without rows to measure": (lambda place: check_settings(demo_config(early_stopping=2), []),
                                          "`early_stopping` needs held-out rows", "`eval_dataset`"),
    "best by answers nobody asks for": (lambda place: demo_config(metric_for_best_model="eval_exact_match"),
                                        "for which questions have to be answered", "set `eval_answers` to 32"),
    "a drift that has no such name": (lambda place: find_start(
        RunFolder(place), None, run_fingerprint(demo_config(), ROWS[:1]), "sed"),
        "`allow_drift` names 'sed'", "'seed'"),
    "weights of another shape": (lambda place: find_start(
        RunFolder(place), f"weights:{place}", run_fingerprint(demo_config(), ROWS[:1])),
        "has no weights in safetensors",
        "name the folder")}
# in tests/test_checkpoints.py: loss, gradient and weight that are no numbers, spikes, a gradient of zero, a full disk,
# signals, tampering, drift, guests, another base, other library versions; in chapters: no chat template (rendering),
# the pad token (models), an adapter on a wrong base (merging), trackers that fail (events of a run are always kept)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_sentence_and_a_way_out(fault, tmp_path):
    bring_about, what, way_out = FAULTS[fault]
    with pytest.raises(FinetuningError) as caught:
        bring_about(tmp_path)
    assert what in str(caught.value) and way_out in str(caught.value)


@pytest.mark.parametrize("text, name, value", [
    ("evaluation_strategy: epoch", "eval_strategy", "epoch"), ("warmup_ratio: 0.1", "warmup_steps", 0.1),
    ("learning_rate: 2e-4", "learning_rate", 2e-4), ("learning_rate: \"1e-4 * 2\"", "learning_rate", 2e-4)])
def test_words_of_former_days_and_numbers_as_text_are_read(text, name, value, tmp_path):
    assert getattr(from_yaml(f"model_name: pocket\n{text}\n", tmp_path).training, name) == value


def test_what_a_failed_attempt_held_is_let_go_and_the_next_one_works(tmp_path, monkeypatch):
    from finetuning_kit.trainer import KitTrainer

    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(KitTrainer, "_get_grad_norm", full)
        with pytest.raises(FinetuningError, match="the memory is full") as caught:
            in_thin_air(tmp_path / "first", max_steps=2)
    frames, models = caught.value.__traceback__, []
    while frames:
        held = frames.tb_frame.f_locals.values()
        models += [value for value in held if isinstance(value, (torch.nn.Module, KitTrainer))]
        frames = frames.tb_next
    assert models == []
    assert in_thin_air(tmp_path / "second", max_steps=2).status == "finished"
    assert Path(tmp_path / "first" / "instruct_pocket" / "run.json").exists()


def test_moments_in_eight_bits_work_on_a_cpu_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    losses = []
    for optim in ("adamw_torch", "paged_adamw_8bit"):
        config = demo_config(output_dir=str(tmp_path / optim), optim=optim, max_steps=6, warmup_steps=0,
                             logging_steps=1, eval_strategy="no")
        run = train(config, ROWS)
        losses.append([entry["loss"] for entry in run.history if "loss" in entry])
    assert any(note.startswith("optim: adamw_8bit (paging") for note in run.notes)
    assert losses[1] == pytest.approx(losses[0], abs=0.01) and losses[1][-1] < losses[1][0]
