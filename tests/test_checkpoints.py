"""What a run survives: kills at random and at every point of a save, tampering, drift, guests, a full disk, signals.

Every run is a process of its own, forked from a server that has imported everything once (`tests.runs_apart`).
"""
import json
import os
import pickle
import shutil
import signal
from types import SimpleNamespace

import pytest

from finetuning_kit.checkpoints import check_same_run, find_checkpoint, library_versions, read_seal, run_fingerprint
from finetuning_kit.checkpoints import seal_checkpoint
from finetuning_kit.cli import end_of
from finetuning_kit.runs import RunFolder
from finetuning_kit.settings import FinetuningError, value_text
from tests.runs_apart import ROWS, go_on, kill_at_random, left, run_apart, settings


def names(folder):
    "The checkpoints of a run."
    return {path.name for path in (folder / "checkpoints").iterdir()}


def record(folder):
    "What a run wrote about itself."
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A run that nothing happened to."
    outcome = run_apart(tmp_path_factory.mktemp("unbroken"))
    assert (outcome.code, outcome.status) == (0, "finished")
    return outcome.folder


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    "A run that was killed in its fifth step."
    place = tmp_path_factory.mktemp("half")
    assert run_apart(place, step=5, signals=[signal.SIGKILL]).code == -signal.SIGKILL
    return place


@pytest.fixture
def broken(half, tmp_path):
    "A copy of it, to go on with."
    shutil.copytree(half, tmp_path / "run")
    return tmp_path / "run"


# --- kills -----------------------------------------------------------------------------------------------------------
def test_a_run_killed_at_any_moment_ends_as_the_unbroken_one(tmp_path):
    tally = kill_at_random(12, tmp_path, seed=1)
    assert [same for same, *_ in tally] == [True] * 12


def test_a_run_killed_at_each_point_of_a_save_goes_on_from_the_newest_whole_checkpoint(broken, unbroken, tmp_path):
    shutil.rmtree(broken / "instruct_pocket" / "checkpoints" / "checkpoint-4")
    found = []
    for n in range(1, 100):  # the n-th call that changes a file is the last; at step 5 the run is killed anyway
        place = tmp_path / f"call-{n}"
        shutil.copytree(broken, place)
        outcome = run_apart(place, resume="auto", die_at_call=[n, 4], step=5, signals=[signal.SIGKILL])
        assert outcome.code == -signal.SIGKILL
        is_over = '"save"' in (outcome.folder / "events.jsonl").read_text().splitlines()[-1]
        if n % 8 == 1 or is_over:  # going on takes its time
            assert go_on(place).status == "finished"
            assert left(outcome.folder) == left(unbroken)
            assert record(outcome.folder)["resumed_from"] in ("checkpoint-3", "checkpoint-4")
            assert not list(outcome.folder.rglob(".part"))
        else:
            path, notes = find_checkpoint(RunFolder(outcome.folder), "auto")
            assert path.name in ("checkpoint-3", "checkpoint-4") and notes == []
            found.append(path.name)
        if is_over:
            break
    assert n > 20 and set(found) == {"checkpoint-3", "checkpoint-4"} and found == sorted(found)


# --- tampering -------------------------------------------------------------------------------------------------------
class Canary:
    "A pickle that runs code."

    def __reduce__(self):
        return (os.system, ("touch canary",))


def flip(path):
    "Change one bit in the middle of a file."
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
         "progress.json", "adapter_config.json")
HARMS = {
    "removed": lambda path: path.unlink(), "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: path.write_bytes(b""), "one bit flipped": flip,
    "an older one": lambda path: shutil.copy(path.parents[1] / "checkpoint-3" / path.name, path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Canary()))}


SAME = ("an older one", "adapter_config.json")  # this file is the same in every checkpoint


@pytest.mark.parametrize("harm, name", [(harm, name) for harm in HARMS for name in FILES if (harm, name) != SAME])
def test_a_checkpoint_that_was_tampered_with_is_found_out(half, tmp_path, name, harm):
    shutil.copytree(half / "instruct_pocket", tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    HARMS[harm](folder.checkpoints / "checkpoint-4" / name)
    path, [note] = find_checkpoint(folder, "auto")
    assert path.name == "checkpoint-3" and "checkpoint-4 was not used" in note
    assert name in note
    with pytest.raises(FinetuningError, match="checkpoint-4 cannot be used"):
        find_checkpoint(folder, "checkpoint-4")


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_which_it_passed_over(broken, unbroken):
    flip(broken / "instruct_pocket" / "checkpoints" / "checkpoint-4" / "optimizer.pt")
    outcome = go_on(broken)
    assert left(outcome.folder) == left(unbroken)
    assert record(outcome.folder)["resumed_from"] == "checkpoint-3"
    note = "checkpoint-4 was not used: its file `optimizer.pt` is not as it was saved; "
    assert f"{note}the run went on from checkpoint-3" in record(outcome.folder)["notes"]


def test_a_pickle_never_runs_even_in_a_checkpoint_with_a_right_seal(broken):
    checkpoint = broken / "instruct_pocket" / "checkpoints" / "checkpoint-4"
    content = read_seal(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Canary()))
    (checkpoint / "progress.json").unlink()
    content.pop("files")
    seal_checkpoint(checkpoint, **content)
    outcome = go_on(broken)
    assert outcome.code == 1 and "the optimizer's state in checkpoint-4 cannot be used" in outcome.complaint
    assert not list(broken.rglob("canary")) and not os.path.exists("canary")


def test_no_checkpoint_holds_a_pickle_of_all_arguments(half):
    assert not list(half.rglob("training_args.bin")) and not list(half.rglob("*.bin"))


# --- drift and guests ------------------------------------------------------------------------------------------------
DRIFTS = {"learning_rate": 1e-3, "seed": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
          "max_seq_length": 96, "packing": True, "lora_dropout": 0.0, "lora_alpha": 8, "weight_decay": 0.1,
          "max_grad_norm": 0.5, "lr_scheduler_type": "constant", "max_steps": 8, "warmup_steps": 0}


@pytest.mark.parametrize("name", DRIFTS)
def test_a_drift_is_refused_with_old_and_new_or_allowed_and_told(half, name):
    config = settings(half, {})
    rows = (ROWS[:40], ROWS[40:])
    new = run_fingerprint(settings(half, {name: DRIFTS[name]}), *rows)
    checkpoint = half / "instruct_pocket" / "checkpoints" / "checkpoint-4"
    old = run_fingerprint(config, *rows)[name]
    with pytest.raises(FinetuningError, match=rf"`{name}` was {value_text(old)} and is {value_text(new[name])}"):
        check_same_run(checkpoint, new)
    assert check_same_run(checkpoint, new, name)[1] == {name: [old, new[name]]}


@pytest.mark.parametrize("change", [{"lora.r": 8}, {"lora": None}, {"optim": "adafactor"}], ids=str)
def test_what_gives_the_weights_another_shape_cannot_drift(half, change):
    new = run_fingerprint(settings(half, change), ROWS[:40], ROWS[40:])
    checkpoint = half / "instruct_pocket" / "checkpoints" / "checkpoint-4"
    with pytest.raises(FinetuningError, match="was .* and is"):
        check_same_run(checkpoint, new)
    with pytest.raises(FinetuningError, match="gives what was saved another shape"):
        check_same_run(checkpoint, new, "r" if "lora.r" in change else [*change][0])


def test_rows_that_changed_are_refused_or_allowed_and_the_run_keeps_a_record(broken, unbroken):
    outcome = go_on(broken, {"learning_rate": 1e-4}, rows_to=36)
    assert outcome.code == 1 and "`learning_rate` was" in outcome.complaint
    assert "`train_rows` are not the same" in outcome.complaint
    assert "allow it: `allow_drift` set to \"learning_rate, train_rows\"" in outcome.complaint
    outcome = go_on(broken, {"learning_rate": 1e-4, "allow_drift": "learning_rate, train_rows"}, rows_to=36)
    assert outcome.status == "finished" and left(outcome.folder) != left(unbroken)
    [drift] = record(outcome.folder)["drift"]
    assert (drift["step"], drift["learning_rate"]) == (4, [0.002, 0.0001])
    told = "`learning_rate` was 0.002 and is 0.0001, from step 4 on"
    assert any(told in note for note in record(outcome.folder)["notes"])
    rates = [entry["learning_rate"] for entry in left(outcome.folder)[0] if "learning_rate" in entry]
    assert rates[0] > 1e-3 and rates[-1] <= 1e-4  # the new rate is the one that is used


def test_a_guest_is_never_taken_for_a_checkpoint_of_ones_own(broken, unbroken, tmp_path):
    other = run_apart(tmp_path / "other", {"max_steps": 9})
    shutil.copytree(other.folder / "checkpoints" / "checkpoint-9",
                    broken / "instruct_pocket" / "checkpoints" / "checkpoint-9")
    outcome = go_on(broken)
    assert left(outcome.folder) == left(unbroken)
    told = " ".join(record(outcome.folder)["notes"])
    assert "checkpoint-9 was not used: it belongs to another run" in told
    outcome = run_apart(broken, resume=str(other.folder / "checkpoints" / "checkpoint-9"))
    assert outcome.code == 1 and "`max_steps` was 9 and is 6" in outcome.complaint


def test_a_folder_that_holds_a_run_is_refused_to_another(broken):
    outcome = run_apart(broken, {"seed": 3})
    assert outcome.code == 1 and "already holds another run" in outcome.complaint
    assert names(broken / "instruct_pocket") == {"checkpoint-3", "checkpoint-4"}


def test_another_base_under_the_same_name_is_refused(half):
    rows = (ROWS[:40], ROWS[40:])
    new = {**run_fingerprint(settings(half, {}), *rows), "base_weights": "0123456789abcdef"}
    with pytest.raises(FinetuningError, match="`base_weights` are not the same"):
        check_same_run(half / "instruct_pocket" / "checkpoints" / "checkpoint-4", new)


def test_other_library_versions_are_told(broken):
    checkpoint = broken / "instruct_pocket" / "checkpoints" / "checkpoint-4"
    content = {**read_seal(checkpoint), "versions": {**library_versions(), "peft": "0.1"}}
    (checkpoint / "progress.json").unlink()
    content.pop("files")
    seal_checkpoint(checkpoint, **content)
    outcome = go_on(broken)
    assert outcome.status == "finished"
    assert any(note.startswith("peft was 0.1 up to step 4 and is") for note in record(outcome.folder)["notes"])


def test_weights_alone_are_a_warm_start_and_no_resumption(unbroken, tmp_path):
    outcome = run_apart(tmp_path / "warm", resume=str(unbroken / "adapter"))
    assert outcome.code == 1 and "it lacks the optimizer's moments" in outcome.complaint
    outcome = run_apart(tmp_path / "warm", resume=f"weights:{unbroken / 'adapter'}")
    first = left(outcome.folder)[0][0]["loss"]
    assert outcome.status == "finished" and first < left(unbroken)[0][0]["loss"]
    assert any(note.startswith("a warm start: the weights of `adapter`") for note in record(outcome.folder)["notes"])


# --- exactly the same ------------------------------------------------------------------------------------------------
MATRIX = {
    "several epochs": ({"max_steps": 14, "eval_steps": 5, "per_device_train_batch_size": 8}, {}, 11),
    "warm-up in progress": ({"warmup_steps": 6, "lr_scheduler_type": "linear"}, {}, 5),
    "accumulation": ({"gradient_accumulation_steps": 3}, {}, 5),
    "packing": ({"packing": True}, {}, 5),
    "weights in the rows": ({}, {"weights": True}, 5),
    "weights and packing": ({"packing": True}, {"weights": True}, 5),
    "all weights": ({"lora": None, "learning_rate": 1e-4}, {}, 5),
    "epochs as the measure": ({"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 20,
                               "eval_strategy": "epoch", "save_strategy": "epoch"}, {}, 3),
    "another optimizer": ({"optim": "adafactor"}, {}, 5),
    "accuracy decides": ({"metric_for_best_model": "eval_token_accuracy", "eval_steps": 1, "save_best": 2}, {}, 5),
    "rsLoRA and DoRA": ({"lora.use_rslora": True, "lora.use_dora": True}, {}, 5)}


@pytest.mark.parametrize("name", MATRIX)
def test_a_resumed_run_is_the_unbroken_run_to_the_last_bit(tmp_path, name):
    changes, plan, step = MATRIX[name]
    whole = run_apart(tmp_path / "whole", changes, **plan)
    assert whole.status == "finished", whole
    part = run_apart(tmp_path / "part", changes, **plan, step=step, signals=[signal.SIGKILL])
    assert part.code == -signal.SIGKILL
    assert go_on(tmp_path / "part", changes, **plan).status == "finished"
    assert record(part.folder)["resumed_from"]
    assert left(part.folder) == left(whole.folder)


# --- which are kept, and when it is enough ---------------------------------------------------------------------------
def test_an_early_end_leaves_the_best_weights_and_is_the_same_when_resumed(tmp_path):
    changes = {"learning_rate": 0.05, "max_steps": 40, "eval_steps": 2, "early_stopping": 2, "save_best": 2,
               "warmup_steps": 0, "on_spike": "warn"}
    whole = run_apart(tmp_path / "whole", changes)
    found, files = record(whole.folder), left(whole.folder)[1]
    assert whole.status == "finished" and found["n_steps"] < 40
    assert found["ended"].startswith("stopped early: 2 evaluations in a row without a better eval_loss")
    assert files["adapter/adapter_model.safetensors"] == files["best_model/adapter_model.safetensors"]
    evals = sorted((entry["eval_loss"], entry["step"]) for entry in left(whole.folder)[0] if "eval_loss" in entry)
    assert {f"checkpoint-{step}" for _, step in evals[:2]} <= names(whole.folder)
    part = run_apart(tmp_path / "part", changes, at="save", step=found["n_steps"], signals=[signal.SIGKILL])
    assert part.code == -signal.SIGKILL and go_on(tmp_path / "part", changes).status == "finished"
    assert left(part.folder) == left(whole.folder)


def test_how_often_to_save_may_change_and_does(broken):
    outcome = go_on(broken, {"save_steps": 1, "save_total_limit": 9})
    assert outcome.status == "finished" and "checkpoint-5" in names(outcome.folder)


# --- signals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at, last", [("step", 3), ("eval", 3), ("save", 4)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_no_final_model(tmp_path, at, last, number):
    outcome = run_apart(tmp_path, at=at, step=last, signals=[number])
    found = record(outcome.folder)
    assert (outcome.status, found["status"], found["n_steps"]) == ("interrupted", "interrupted", last)
    assert found["ended"] == f"interrupted by {signal.Signals(number).name}"
    assert f"checkpoint-{last}" in names(outcome.folder) and not (outcome.folder / "adapter").exists()


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_still_serves(tmp_path, unbroken):
    outcome = run_apart(tmp_path, step=3, signals=[signal.SIGINT, signal.SIGINT])
    assert outcome.code == 1 and record(outcome.folder)["status"] == "failed"
    assert go_on(tmp_path).status == "finished" and left(outcome.folder) == left(unbroken)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_ends_with_the_signals_own_code(number, code, capsys):
    run = SimpleNamespace(n_steps=3, checkpoint=SimpleNamespace(name="checkpoint-3"), signal=int(number), notes=[])
    assert end_of(SimpleNamespace(status="interrupted", run=run)) == code
    assert "`--resume auto` goes on" in capsys.readouterr().err


# --- a full disk -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [0, 2_000, 100_000])
def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, unbroken, limit):
    outcome = run_apart(tmp_path, step=4, limit=limit)
    assert outcome.code == 1 and outcome.complaint.startswith("the disk is full: `")
    assert "MiB are free" in outcome.complaint
    assert "checkpoint-3" in names(outcome.folder) and "checkpoint-4" not in names(outcome.folder)
    assert go_on(tmp_path).status == "finished" and left(outcome.folder) == left(unbroken)


# --- numbers that are none -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_a_number_that_is_none_stops_the_run_in_its_step(tmp_path, what, value):
    outcome = run_apart(tmp_path, fault=[what, 5, value])
    assert outcome.code == 1 and "at step 5 (learning rate " in outcome.complaint
    assert ("lora_A" if what == "weight" else f"the {what} became") in outcome.complaint
    assert "rows: " in outcome.complaint and "checkpoint-4 is from before" in outcome.complaint
    assert record(outcome.folder)["status"] == "failed" and not (outcome.folder / "adapter").exists()
    assert names(outcome.folder) == {"checkpoint-3", "checkpoint-4"}


def test_a_rate_that_explodes_ends_in_a_sentence(tmp_path):
    outcome = run_apart(tmp_path, fault=["rate", 5, 1e30])
    assert outcome.code == 1 and "lower `learning_rate`" in outcome.complaint
    assert "at step 5 (" in outcome.complaint or "at step 6 (" in outcome.complaint
    assert "checkpoint-4 is from before" in outcome.complaint


@pytest.mark.parametrize("on_spike", ["stop", "warn"])
def test_a_spike_stops_before_the_step_or_warns(tmp_path, on_spike):
    changes = {"max_steps": 9, "on_spike": on_spike, "save_steps": 4}
    outcome = run_apart(tmp_path, changes, fault=["spike", 8, 100.0])
    events = [json.loads(line) for line in (outcome.folder / "events.jsonl").read_text().splitlines()]
    if on_spike == "stop":
        assert outcome.code == 1 and "gradient and loss jumped together at step 8" in outcome.complaint
        assert "rows: " in outcome.complaint and "the step was not taken" in outcome.complaint
        assert go_on(tmp_path, changes).status == "finished"
    else:
        assert outcome.status == "finished"
        assert [(event["step"], event["code"]) for event in events if event["type"] == "warning"] == [(8, "spike")]
        assert any(note.startswith("step 8: gradient") for note in record(outcome.folder)["notes"])


def test_a_run_in_which_nothing_moves_is_not_called_finished(tmp_path):
    outcome = run_apart(tmp_path, {"learning_rate": 1e-30})
    assert outcome.status == "suspect" and record(outcome.folder)["status"] == "suspect"
    told = record(outcome.folder)["notes"][-1]
    assert "THE RUN IS SUSPECT" in told and "no trained weight moved" in told


def test_a_gradient_of_zero_is_told_after_five_steps(tmp_path):
    outcome = run_apart(tmp_path, fault=["silence", 2])
    events = [json.loads(line) for line in (outcome.folder / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["code"]) for event in events if event["type"] == "warning"] == [(6, "frozen")]
