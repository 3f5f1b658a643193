"""A full memory in a whole run: gone around and told, remembered by checkpoints, or ended with a plan."""
import gc
import json
import shutil

import pytest
import torch

import finetuning_kit.relief
from finetuning_kit.models import load_model
from finetuning_kit.profiles import demo_config
from finetuning_kit.relief import MemoryFull, RelievedTrainer, memory_guard, relief_notes
from finetuning_kit.settings import FinetuningError
from finetuning_kit.training import train
from tests.runs_apart import ROWS

TRAIN, EVAL = ROWS[:40], ROWS[40:]
BASIS = {"max_steps": 6, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "logging_steps": 1,
         "eval_steps": 3, "save_steps": 3, "per_device_eval_batch_size": 8, "bf16": False, "packing": False,
         "device_map": "cpu", "lora.lora_dropout": 0.1, "lora.r": 4}


def settings(place, **changes):
    "A small run."
    return demo_config(output_dir=str(place), **{**BASIS, **changes})


def losses(run):
    "All losses of a run, held-out ones too."
    return [entry[name] for entry in run.history for name in ("loss", "eval_loss") if name in entry]


@pytest.fixture
def small_device(monkeypatch):
    "A device that is full when more than so many positions go through at once; in which phase, from which step on."
    def make(most, phase="backward pass", step=1):
        compute = RelievedTrainer.compute_loss

        def full(gradient=None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        def too_small(self, model, inputs, *args, **kwargs):
            training = self.model.training
            self.note("forward pass" if training else "evaluation", inputs)
            too_much = inputs["input_ids"].numel() > most and self.state.global_step + training >= step
            if too_much and phase == self.progress.attempt.phase:
                full()
            found = compute(self, model, inputs, *args, **kwargs)
            if too_much and training and phase == "backward pass":
                found.register_hook(full)
            return found
        monkeypatch.setattr(RelievedTrainer, "compute_loss", too_small)
    return make


@pytest.mark.parametrize("phase", ["forward pass", "backward pass"])
def test_a_run_goes_on_as_one_with_the_smaller_batch_from_that_step(tmp_path, small_device, phase):
    counted = []
    train(settings(tmp_path / "one"), TRAIN, EVAL, should_stop=lambda: counted.append(1) or len(counted) == 3)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    half = settings(tmp_path / "two", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    wanted = train(half, TRAIN, EVAL, resume="auto")
    assert any("the same steps in other portions" in note for note in wanted.notes)
    small_device(160, phase, step=4)
    events = []
    run = train(settings(tmp_path / "one", auto_batch=True), TRAIN, EVAL, resume="auto", on_event=events.append)
    assert losses(run) == pytest.approx(losses(wanted), abs=2e-6)  # with dropout: the same random numbers
    [warning] = [event for event in events if event["type"] == "warning"]
    assert (warning["code"], warning["step"]) == ("memory", 4)
    assert f"the memory was full in the {phase} (8 rows" in warning["text"]
    assert "4 rows at once in 4 passes" in warning["text"]
    record = json.loads((run.folder / "run.json").read_text())
    assert record["batch"] == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
                               "per_device_eval_batch_size": 8}
    assert any(warning["text"] in note for note in record["notes"])


def test_a_resumed_run_begins_with_what_was_found(tmp_path, small_device):
    small_device(160)
    asked = settings(tmp_path / "whole", auto_batch=True)
    whole = train(asked, TRAIN, EVAL)
    counted = []
    part = settings(tmp_path / "part", auto_batch=True)
    stopped = train(part, TRAIN, EVAL, should_stop=lambda: counted.append(1) or len(counted) == 4)
    assert stopped.status == "stopped"
    rest = train(part, TRAIN, EVAL, resume="auto")
    assert losses(rest) == losses(whole)  # to the last digit, with dropout
    assert len([note for note in rest.notes if "the memory was full" in note]) == 1  # not met again


def test_an_evaluation_gives_way_alone(tmp_path, small_device):
    wanted = train(settings(tmp_path / "wanted"), TRAIN, EVAL)
    small_device(160, "evaluation")
    run = train(settings(tmp_path / "run", auto_batch=True), TRAIN, EVAL)
    assert losses(run) == pytest.approx(losses(wanted), abs=1e-6)
    assert json.loads((run.folder / "run.json").read_text())["batch"]["per_device_eval_batch_size"] == 2
    with pytest.raises(MemoryFull, match="in the evaluation of step 3 .*`per_device_eval_batch_size: 4`"):
        train(settings(tmp_path / "ended"), TRAIN, EVAL)


def test_packs_get_smaller_and_steps_stay(tmp_path, small_device):
    changes = {"packing": True, "lora.lora_dropout": 0.0}
    wanted = train(settings(tmp_path / "wanted", **changes), TRAIN, EVAL)
    small_device(140)
    run = train(settings(tmp_path / "run", auto_batch=True, **changes), TRAIN, EVAL)
    assert losses(run) == pytest.approx(losses(wanted), abs=1e-5)
    assert json.loads((run.folder / "run.json").read_text())["batch"]["train_tokens"] <= 140
    with pytest.raises(MemoryFull, match="rows in a pack of .*`packing: false` and `per_device_train_batch_size: 4`"):
        train(settings(tmp_path / "ended", **changes), TRAIN, EVAL)


def test_a_single_row_that_does_not_fit_ends_the_run(tmp_path, small_device):
    small_device(10)
    with pytest.raises(MemoryFull, match="one row alone does not fit.*the longest is record:.*`gradient_checkpointing: "
                                         "true`.*`max_seq_length: .*no checkpoint had been saved yet"):
        train(settings(tmp_path, auto_batch=True), TRAIN, EVAL)
    record = json.loads((tmp_path / "instruct_pocket" / "run.json").read_text())
    assert record["status"] == "failed" and "one row alone" in record["reason"]


def test_what_the_optimizer_cannot_keep_is_no_matter_of_rows(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(MemoryFull, match="in the optimizer step of step 1 .*set `optim: adafactor`") as caught:
        train(settings(tmp_path, auto_batch=True), TRAIN, [])
    assert "per_device_train_batch_size" not in str(caught.value)


def tensor_bytes():
    "Bytes of all tensors that are alive."
    gc.collect()
    alive = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in alive}.values())


@pytest.mark.parametrize("given", [True, False], ids=["a model of one's own", "a model that train loads"])
def test_nothing_stays_though_the_error_is_kept_and_the_plan_goes_through(tmp_path, small_device, given):
    train(settings(tmp_path / "first", max_steps=1), TRAIN, EVAL)  # what a library keeps for good is there now
    small_device(160, step=3)  # gradients and moments are there by then
    model = load_model("pocket") if given else None
    before = tensor_bytes()
    with pytest.raises(MemoryFull) as caught:
        train(settings(tmp_path / "run"), TRAIN, EVAL, model=model)
    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) if given else 0
    assert tensor_bytes() - before <= adapter
    plan = caught.value.plan
    config = settings(tmp_path / "run").replace(**plan.ways[0].changes)
    run = train(config, TRAIN, EVAL, resume="auto")
    assert run.status == "finished" and config.training.effective_batch_size == 16


def test_a_run_that_met_a_full_memory_goes_on_with_the_plan(tmp_path, small_device):
    small_device(160, step=5)
    with pytest.raises(MemoryFull, match="checkpoint-3 is from before") as caught:
        train(settings(tmp_path), TRAIN, EVAL)
    run = train(settings(tmp_path).replace(**caught.value.plan.ways[0].changes), TRAIN, EVAL, resume="auto")
    assert run.status == "finished" and run.history[-1]["step"] == 6
    told = "`per_device_train_batch_size` was 8 and is 4, from step 3 on: the same steps in other portions"
    assert told in run.notes and run.folder.load_json("run.json")["drift"] == []


def test_several_processes_are_told_that_they_cannot(monkeypatch):
    assert relief_notes(demo_config(auto_batch=True)) == []
    monkeypatch.setattr(finetuning_kit.relief, "n_processes", lambda: 2)
    assert "`auto_batch`: off, for 2 processes" in relief_notes(demo_config(auto_batch=True))[0]
    with pytest.raises(FinetuningError) as caught, memory_guard(demo_config()):
        raise MemoryError
    assert "auto_batch" not in str(caught.value)
