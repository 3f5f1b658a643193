"""Sweeps: refused before they begin, killed and taken up again, typed as a command."""
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

import finetuning_kit.sweeps
from finetuning_kit.cli import main
from finetuning_kit.profiles import demo_config
from finetuning_kit.settings import FinetuningError
from finetuning_kit.spaces import read_space
from finetuning_kit.sweeps import Sweep, TrialRecord, importance_words, sweep_importances, sweep_settings
from tests.runs_apart import ROWS

SPACE = {"learning_rate": "1e-5..1e-1 log", "lora.r": [2, 4]}
KILLED = """
import os, signal, sys
from tests.test_sweeps import go

def hear(event):
    if event["type"] == "step" and event["trial"] == 2 and event["step"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)

go(sys.argv[1], hear)
"""


def go(place, on_event=None, n_trials=4, **changes):
    "A small sweep."
    config = demo_config(output_dir=str(place), max_steps=4, logging_steps=2, **changes)
    return sweep_settings(config, SPACE, ROWS[:32], ROWS[40:], n_trials=n_trials, on_event=on_event)


def test_a_killed_sweep_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = go(tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], cwd=Path(__file__).parents[1],
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    rest = go(tmp_path / "killed")
    assert [(trial.settings, trial.state, trial.value) for trial in rest.trials] == [
        (trial.settings, trial.state, trial.value) for trial in whole.trials]
    assert whole.trials[0].settings["training.learning_rate"] != whole.trials[1].settings["training.learning_rate"]
    trials = sorted(path.name for path in (rest.folder / "trials").iterdir())
    assert trials == ["0", "1", "2", "3"] and (rest.folder / "sweep.png").stat().st_size > 5000
    assert [path.parent.name for path in rest.folder.path.glob("trials/*/adapter")] == [str(rest.best.number)]
    assert not [*rest.folder.path.glob("trials/*/checkpoints"), *rest.folder.path.glob("trials/*/best_model")]
    with pytest.raises(FinetuningError, match="`max_grad_norm` was 1 and is 2"):
        go(tmp_path / "killed", max_grad_norm=2.0)


@pytest.mark.parametrize("number, step, n_kept", [
    (signal.SIGINT, 2, 1), (signal.SIGTERM, 2, 1), (signal.SIGTERM, 4, 2)])
def test_a_signal_ends_the_sweep_and_its_trial_is_done_again(tmp_path, number, step, n_kept):
    def press(event):
        if event["type"] == "step" and event["trial"] == 1 and event["step"] == step:
            signal.raise_signal(number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        part = go(tmp_path, press)
    finally:
        signal.signal(signal.SIGINT, before)
    assert part.interrupted == number and len(part.trials) == n_kept
    assert len(go(tmp_path, n_trials=3).trials) == 3


def test_a_trial_that_fails_is_written_down_and_the_sweep_goes_on(tmp_path, monkeypatch):
    train, full = finetuning_kit.sweeps.train, FinetuningError("the memory is full in the backward pass of step 1")

    def sometimes(config, *rows, folder, **more):
        if folder.path.name in ("1", "2"):
            raise full if folder.path.name == "1" else RuntimeError("the GPU fell off the bus\nand more")
        return train(config, *rows, folder=folder, **more)

    monkeypatch.setattr(finetuning_kit.sweeps, "train", sometimes)
    found = go(tmp_path, n_trials=4)
    assert [trial.state for trial in found.trials][1:3] == ["failed", "failed"]
    assert found.trials[1].reason == str(full) and found.trials[2].reason == "the GPU fell off the bus"
    assert found.best is not None and "the memory is full" in found._repr_markdown_()
    monkeypatch.setattr(finetuning_kit.sweeps, "train", lambda *rows, **more: 1 / 0)
    with pytest.raises(FinetuningError, match="the first three trials failed.*division by zero"):
        go(tmp_path / "all")


def test_where_optuna_is_missing_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(FinetuningError, match=r"pip install 'finetuning_kit\[hpo\]'"):
        go(tmp_path)


def test_a_space_in_a_file(tmp_path):
    (tmp_path / "space.yaml").write_text("learning_rate: 1e-5..1e-2 log\nlora:\n  r: [4, 8]\n")
    config = demo_config()
    assert read_space(tmp_path / "space.yaml", config) == read_space(
        ["lr: 1e-5..1e-2 log", "lora.r: 4, 8"], config)
    assert len(read_space([str(tmp_path / "space.yaml"), "weight-decay=0..0.1"], config)) == 3


def command(place, *words):
    "The words of a small sweep."
    return ["sweep", "--output-dir", str(place), "--max-seq-length", "128", "--max-steps", "2", "--trials", "2",
            "--dataset", "pocket", "--eval-dataset", "pocket:test", *words]


@pytest.mark.parametrize("words, sentence", [
    (["--space", "learning_rat: 1..2"], "did you mean"), (["--space", "learning_rate: 1e-5..9"], "at most 1, got 9"),
    (["--space", "seed: 1, 2"], "is luck"), (["--space", "nowhere.yaml"], "no such file"),
    (["--space", "lora.r: 4, 8", "--full"], "`method` full has no use for `lora`")])
def test_a_wrong_command_ends_in_a_sentence(tmp_path, capsys, words, sentence):
    with pytest.raises(SystemExit) as ended:
        main(command(tmp_path / "out", *words))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_the_command_finds_and_writes_down_the_best(tmp_path, capsys):
    space = ["--space", "learning_rate: 1e-4..1e-2 log"]
    assert main(command(tmp_path, *space)) == 0
    told = capsys.readouterr().out
    assert "trial" in told and "best.yaml" in told
    assert main(command(tmp_path, *space)) == 0  # all trials are done: it says so again
    assert capsys.readouterr().out.count("  trial ") == 0
    home = tmp_path / "sweep_instruct_pocket"
    dry = main(["train", "--config", str(home / "best.yaml"), "--output-dir", str(tmp_path / "run"), "--dry-run"])
    assert dry in (0, 1) and "best.yaml" in capsys.readouterr().out
    assert len(optuna.load_study(study_name=home.name, storage=f"sqlite:///{home / 'sweep.db'}").trials) == 2


def test_the_setting_that_matters_is_found_among_those_that_do_not(tmp_path):
    config = demo_config()
    space = read_space({"learning_rate": "1e-5..1e-1 log", "weight_decay": [0.0, 0.01, 0.1]}, config)
    found = Sweep(config, space, tmp_path, "eval_loss")
    draw = random.Random(0)
    for number in range(40):
        rate, decay = 10 ** draw.uniform(-5, -1), draw.choice([0.0, 0.01, 0.1])
        loss = abs(math.log10(rate) + 3) + draw.gauss(0, 0.05)
        settings = {"training.learning_rate": rate, "training.weight_decay": decay}
        found.trials.append(TrialRecord(number, settings, "finished", loss, "", 4, 1.0))
    shares = sweep_importances(found)
    assert list(shares) == ["training.learning_rate", "training.weight_decay"]
    assert shares["training.learning_rate"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0) and "too few" not in importance_words(found)
    found.trials = [replace(trial, value=None, state="failed") for trial in found.trials[:3]] + found.trials[:3]
    assert sweep_importances(found) == {} and importance_words(found) == ""
