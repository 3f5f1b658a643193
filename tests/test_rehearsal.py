"""Every line of a rehearsal turns red on a fault of its kind, stays green without, and leaves nothing behind."""
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from finetuning_kit import rehearsal
from finetuning_kit.by_heart import BY_HEART, mask_is_right, open_stage, try_by_heart
from finetuning_kit.hollow import CannotStream
from finetuning_kit.merging import fold_adapter
from finetuning_kit.models import pocket_model_path
from finetuning_kit.profiles import demo_config
from finetuning_kit.rehearsal import TRIALS, rehearse
from finetuning_kit.trainer import KitTrainer
from finetuning_kit.training import train
from tests.runs_apart import ROWS

TRIAL = {check.name: check for check in TRIALS}


def verdicts(lines):
    "Name of each line -> its verdict."
    return {line.name: line.verdict for line in lines}


def tried(stage, *names):
    "The lines of some checks."
    return [try_by_heart(TRIAL[name], stage) for name in names]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    "A stage whose batch has been learned by heart."
    place = tmp_path_factory.mktemp("learned")
    stage, _ = open_stage(demo_config(output_dir=str(place / "runs")), place, n_steps=16)
    assert set(verdicts(try_by_heart(check, stage) for check in BY_HEART).values()) == {"green"}
    return stage


@pytest.fixture
def stage(learned, tmp_path):
    "The same with a copy of its files."
    place = tmp_path / "place"
    shutil.copytree(learned.place, place)
    run = replace(learned.run, folder=type(learned.run.folder)(place / "run"))
    return replace(learned, place=place, run=run, losses=list(learned.losses))


def fresh(tmp_path, n_steps=6, **changes):
    "A stage before its first step."
    (tmp_path / "place").mkdir()
    return open_stage(demo_config(output_dir=str(tmp_path / "runs"), **changes), tmp_path / "place", n_steps=n_steps)[0]


# --- nothing to find ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, changes, apart", [
    ("lora", {"bf16": True}, []), ("dora", {}, []), ("full", {"learning_rate": 1e-4}, ["merged = adapter"]),
    ("prefix", {"learning_rate": 3e-2}, ["merged = adapter"])])
def test_a_healthy_run_passes_and_leaves_nothing(tmp_path, method, changes, apart):
    heard = []
    found = rehearse(demo_config(output_dir=str(tmp_path / "runs"), method=method, **changes), n_steps=12,
                     on_line=heard.append)
    assert found.passed, found
    assert [line.name for line in found.lines if line.verdict == "does not apply"] == apart
    assert list(tmp_path.iterdir()) == [] and heard == found.lines and len(heard) == 10
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True


def test_a_run_after_a_rehearsal_is_the_run_without_it(tmp_path):
    config = demo_config(max_steps=3, lora_dropout=0.1)
    alone = train(config.replace(output_dir=str(tmp_path / "a")), ROWS[:40])
    drawn = torch.get_rng_state()
    (tmp_path / "b").mkdir()
    rehearse(config.replace(output_dir=str(tmp_path / "b")), n_steps=6)
    assert torch.equal(drawn, torch.get_rng_state()) and list((tmp_path / "b").iterdir()) == []
    after = train(config.replace(output_dir=str(tmp_path / "b")), ROWS[:40])
    files = [run.folder.adapter / "adapter_model.safetensors" for run in (alone, after)]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- the mask -------------------------------------------------------------------------------------------------------
def masked(stage, change):
    "The same stage with other labels."
    rows = [replace(row, labels=change(row)) for row in stage.data.train_rows.rows]
    data = replace(stage.data, train_rows=replace(stage.data.train_rows, rows=rows))
    return replace(stage, data=data, batch=[], run=None)


def test_an_end_that_is_masked_with_the_padding(stage):
    end = stage.tokenizer.convert_tokens_to_ids("<|im_end|>")
    spoilt = masked(stage, lambda row: [-100 if label == end else label for label in row.labels])
    spoilt = replace(spoilt, place=stage.place / "spoilt", n_steps=24)
    found = verdicts(try_by_heart(check, spoilt) for check in BY_HEART)
    assert list(found.values()) == ["red", "green", "red", "green"]


@pytest.mark.parametrize("shift, words", [(-1, "the loss begins after"), (1, "is learned")])
def test_a_mask_that_begins_elsewhere(stage, shift, words):
    def change(row):
        start = next(n for n, label in enumerate(row.labels) if label != -100) + shift
        return [-100] * start + row.input_ids[start:]

    [line] = tried(masked(stage, change), "the mask is right")
    assert line.verdict == "red" and words in line.evidence and "instructions_train" in line.evidence


CHAT = [{"messages": [{"role": "user", "content": f"{n} plus 1?"}, {"role": "assistant", "content": f"{n + 1}"},
                      {"role": "user", "content": "And twice that?"}, {"role": "assistant", "content": f"{2 * n + 2}"}]}
        for n in range(20)]
SUMS = [{"instruction": f"{n} plus 1?", "output": f"{n + 1} it is"} for n in range(20)]


@pytest.mark.parametrize("rows, changes", [
    (CHAT, {}), (CHAT, {"train_on": "last_answer"}), (CHAT, {"train_on": "all"}),
    (SUMS, {"dataset_format": "alpaca"}), (SUMS, {"dataset_format": "completion"}), (SUMS, {"dataset_format": "chat"}),
    ([{"text": f"The sum of {n} and 1 is {n + 1}, as everybody knows."} for n in range(20)], {"task": "domain"})])
def test_the_mask_of_every_shape_of_rows(tmp_path, rows, changes):
    config = demo_config(output_dir=str(tmp_path / "runs"), eval_dataset=None, **changes)
    stage, _ = open_stage(config, tmp_path, rows)
    assert mask_is_right(stage)[0] == "green", mask_is_right(stage)
    assert len(stage.records) == len(stage.batch)


def test_a_template_without_an_end_gets_one(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(pocket_model_path(), model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    found = mask_is_right(fresh(tmp_path, model_name=str(model)))
    assert found[0] == "green" and "<|im_end|>' after" in found[1], found  # `encode_records` appends it


# --- learning -------------------------------------------------------------------------------------------------------
def test_a_rate_that_moves_nothing(tmp_path):
    lines = [try_by_heart(check, stage) for stage in [fresh(tmp_path, learning_rate=2e-9)] for check in BY_HEART]
    assert list(verdicts(lines).values()) == ["green", "red", "red", "red"]
    assert "raise `learning_rate`" in lines[1].fix


def test_a_rate_that_throws_the_model_away(tmp_path):
    [_, line, stop, _] = [try_by_heart(check, stage) for stage in [fresh(tmp_path, learning_rate=1.0, max_grad_norm=0)]
                          for check in BY_HEART]
    assert line.verdict == "red" and "lower `learning_rate`" in line.words()


def test_frozen_weights_stop_what_needs_them_and_nothing_else(tmp_path):
    def frozen(*args, **kwargs):
        return prepare(*args, **kwargs).requires_grad_(False)

    from finetuning_kit.training import prepare_model as prepare
    with patch("finetuning_kit.training.prepare_model", frozen):
        found = rehearse(demo_config(output_dir=str(tmp_path / "runs")), n_steps=6)
    assert [line.verdict for line in found.lines] == [
        "green", "red", *["not reached"] * 5, "green", "green", "not reached"]
    assert found.lines[1].fix and not found.passed


# --- memory and room ------------------------------------------------------------------------------------------------
def small_device(step, most=100):
    "A step that fails as on a device that is too small."
    def full(trainer, model, inputs, *args, **kwargs):
        if sum(one["input_ids"].numel() for one in inputs.get("packs", [inputs])) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(trainer, model, inputs, *args, **kwargs)
    return full


@pytest.mark.parametrize("name, step, fix", [
    ("evaluation fits", "prediction_step", "halve `per_device_eval_batch_size`"),
    ("the longest batch fits", "training_step", "halve `per_device_train_batch_size`")])
def test_a_device_that_is_too_small(tmp_path, name, step, fix):
    place = fresh(tmp_path)
    with patch.object(KitTrainer, step, small_device(getattr(KitTrainer, step))):
        [line] = tried(place, name)
    assert line.verdict == "red" and line.evidence.startswith("the memory is full") and fix in line.fix
    assert tried(place, name)[0].verdict == "green"


def test_a_full_disk(stage):
    tight = shutil.disk_usage(stage.place)._replace(free=2**10)
    with patch("shutil.disk_usage", lambda path: tight):
        [line] = tried(replace(stage, place=Path(stage.place / "empty")), "disk and memory suffice")
    assert line.verdict == "red" and "make room" in line.fix


def test_too_little_memory_for_the_merge(stage):
    with patch.object(rehearsal, "cpu_of", lambda machine: replace(machine, free_gib=0.001)):
        [line] = tried(stage, "disk and memory suffice")
    assert line.verdict == "red" and "merge later" in line.fix


# --- what is kept ---------------------------------------------------------------------------------------------------
def test_a_checkpoint_without_its_optimizer(stage):
    checkpoint = stage.run.folder.checkpoints / f"checkpoint-{stage.n_steps - 4}"
    (checkpoint / "optimizer.pt").unlink()
    [line] = tried(stage, "a checkpoint goes on")
    assert line.verdict == "red" and "optimizer" in line.evidence


def test_an_optimizer_that_has_forgotten(stage):
    with patch.object(KitTrainer, "_load_optimizer_and_scheduler", lambda *args: None):
        [line] = tried(stage, "a checkpoint goes on")
    assert line.verdict == "red" and "do not rely on `resume`" in line.fix


def test_a_merge_that_is_off(stage):
    def bent(model):
        merged = fold_adapter(model)
        merged.lm_head.weight.data.mul_(1.01)
        return merged

    in_memory = patch("finetuning_kit.merging.stream_merge", side_effect=CannotStream("bent"))
    with in_memory, patch("finetuning_kit.merging.fold_adapter", bent):
        merge, export = tried(stage, "merged = adapter", "the export can be read")
    assert (merge.verdict, export.verdict) == ("red", "red") and "use the `adapter`" in merge.fix


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"), "chat template"),
    (lambda folder: (folder / "generation_config.json").unlink(), "it lacks generation_config.json"),
    (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 0}'), "do not stop at")])
def test_an_export_that_others_cannot_use(stage, spoil, words):
    merge, export = tried(stage, "merged = adapter", "the export can be read")
    assert (merge.verdict, export.verdict) == ("green", "green")
    spoil(stage.run.folder.final_model)
    [export] = tried(stage, "the export can be read")
    assert export.verdict == "red" and words in export.evidence


# --- the command ----------------------------------------------------------------------------------------------------
WORDS = ("--base-model", "pocket", "--dataset", "pocket", "--eval-dataset", "pocket:test", "--max-seq-length", "128",
         "--output-dir", "runs")


def test_the_command_says_which_line_is_red(typed):
    code, out, err = typed("rehearse", *WORDS, "--learning-rate", "2e-9")
    assert code == 1 and "the rehearsal failed, and nothing was trained" in err
    assert "red        the loss falls: " in out and "green      the mask is right: " in out
    assert not Path("runs").exists()


def test_the_command_refuses_what_a_run_refuses(typed):
    code, _, err = typed("rehearse", "--dataset", "missing.jsonl")
    assert code == 2 and "missing.jsonl" in err
    code, _, err = typed("rehearse", "--dataset", "pocket", "--lora-rank", "0")
    assert code == 2 and "`lora.r` must be at least 1" in err


def test_train_rehearses_first_and_stops_at_a_red_line(typed):
    code, out, err = typed("train", *WORDS, "--rehearse", "--learning-rate", "2e-9", "--max-steps", "2")
    assert code == 1 and "nothing was trained" in err and not Path("runs").exists()
    code, out, err = typed("train", *WORDS, "--rehearse", "--max-steps", "2")
    assert code == 0, err
    assert "passed; 10 of 10 lines are in order" in out and Path("runs/instruct_pocket/final_model").is_dir()
