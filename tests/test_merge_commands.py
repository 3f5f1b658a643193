"""`merge` and `extract` as typed: what they write, what they refuse, and by which exit code."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetuning_kit.asking import Answer
from finetuning_kit.bases import record_base
from finetuning_kit.loading import load_records
from finetuning_kit.metrics import Exchange
from finetuning_kit.models import load_tokenizer
from finetuning_kit.profiles import demo_config
from finetuning_kit.side_by_side import save_answers
from finetuning_kit.tokens import encode_records
from finetuning_kit.training import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A short run with an adapter."
    rows = encode_records(load_tokenizer("pocket"), load_records("pocket")[:80], max_length=128).rows
    home = tmp_path_factory.mktemp("runs")
    done = train(demo_config(**{"training.max_steps": 12, "output_dir": str(home)}), rows)
    record_base(done.folder.adapter, "pocket")
    return done.folder.path


@pytest.fixture
def own(run, tmp_path):
    "A copy of it, to be spoiled."
    shutil.copytree(run, tmp_path / "mine")
    (tmp_path / "ask.txt").write_text("Capital of Italy?\nThe opposite of hot?\n")
    return Path("mine")


def scaled(folder, factor):
    "Change an adapter's strength."
    path = Path(folder) / "adapter_model.safetensors"
    save_file({name: w * factor if "lora_B" in name else w for name, w in load_file(path).items()}, path,
              metadata={"format": "pt"})


def test_a_run_finds_its_own_adapter_and_base(typed, own):
    code, out, err = typed("merge", "mine", "--prompts", "ask.txt")
    assert (code, err) == (0, "") and "verified" in out and "2 of 2 answers the same" in out
    assert {"merge.json", "README.md", "config.json"} <= {path.name for path in Path("mine/adapter_merged").iterdir()}
    code, _, err = typed("merge", "mine", "--prompts", "ask.txt")
    assert code == 2 and "exists already, nothing was written" in err
    code, out, err = typed("merge", "mine/adapter", "--base", "pocket", "--output", "out/deep", "--precision", "bf16",
                           "--no-verify", "--json")
    told = json.loads(out)
    assert (code, err, told["check"], told["precision"], told["folder"]) == (0, "", None, "bf16", "out/deep")


def test_a_difference_is_exit_code_1_and_leaves_nothing(typed, own):
    scaled("mine/adapter", 0.001)
    words = ("merge", "mine", "--precision", "bf16", "--prompts", "ask.txt", "--output", "out")
    code, out, err = typed(*words)
    assert code == 1 and "differs" in out and "--precision fp32" in err and "--allow-difference" in err
    assert not Path("out").exists()
    code, out, err = typed(*words, "--json")
    assert code == 1 and json.loads(out)["folder"] is None and not json.loads(out)["check"]["passed"]
    code, _, err = typed(*words, "--allow-difference")
    assert (code, err) == (0, "") and "different from what was trained" in Path("out/README.md").read_text()


def test_no_room_is_exit_code_3(typed, own, monkeypatch):
    monkeypatch.setattr("finetuning_kit.merging.proof_room", lambda *_: "not verified: the proof needs 9 GiB")
    code, out, _ = typed("merge", "mine")
    assert code == 3 and "not verified" in out and Path("mine/adapter_merged").is_dir()


REFUSED = {
    "": "nothing was named", "gone": "no folder that exists", "ask.txt": "no folder that exists",
    "empty": "without adapter_config.json", "mine --base gone": "neither", "mine --prompts gone.txt": "is no file",
    "mine --prompts gone.jsonl": "gone.jsonl", "mine --density 0.5": "for several adapters",
    "mine --combination ties": "for several adapters", "mine --output mine/adapter/x": "lies inside",
    "mine --output ask.txt/x": "is no folder", "mine --output ask.txt": "exists already",
    "--adapter mine=0.5 --adapter mine=0.5": "--output FOLDER",
    "--adapter gone=0.5 --output x": "no folder that exists",
    "mine --precision fp8": "invalid choice", "mine --verify-not": "unknown flag",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(words, typed, own):
    Path("empty").mkdir()
    code, out, err = typed("merge", *words.split())
    assert code == 2 and REFUSED[words] in err, err
    assert sorted(path.name for path in Path().iterdir()) == ["ask.txt", "empty", "mine"]


def test_a_run_without_an_adapter(typed, own):
    shutil.rmtree("mine/adapter")
    (Path("mine") / "run.json").write_text('{"status": "failed"}')
    assert "its status: failed" in typed("merge", "mine")[2]
    Path("mine/final_model").mkdir(exist_ok=True)
    assert "it trained all weights" in typed("merge", "mine")[2]


def test_damaged_files_are_told_in_a_sentence(typed, own):
    (own / "adapter" / "adapter_model.safetensors").write_bytes(b"hello")
    code, _, err = typed("merge", "mine", "--prompts", "ask.txt")
    assert code == 2 and "unexpected" not in err and not Path("mine/adapter_merged").exists()
    (own / "adapter" / "adapter_config.json").write_text("{")
    code, _, err = typed("merge", "mine", "--base", "pocket", "--prompts", "ask.txt")
    assert code == 2 and "unexpected" not in err


def test_help_has_examples(typed):
    code, out, _ = typed("merge", "--help")
    assert code == 0 and "finetuning-kit merge runs/qa_rows" in out and "exit code: 0" in out
    code, out, _ = typed("extract", "--help")
    assert code == 0 and "--rank" in out and "--output" in out


@pytest.mark.parametrize("command", ["merge", "extract"])
def test_help_fits_into_80_columns(typed, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, typed(command, "--help")[1].splitlines())) <= 80


def test_a_mix_says_what_it_was_made_of_and_is_asked_what_its_runs_were(typed, own):
    shutil.copytree("mine", "other")
    save_answers(Path("other/answers.jsonl"), [Exchange("Capital of Italy?", "Rome.", Answer("Rome.", 2, True))] * 3)
    code, out, err = typed("merge", "--adapter", "mine=0.5", "--adapter", "other", "--combination", "ties",
                           "--density", "0.5", "--output", "both", "--base", "pocket")
    assert (code, err) == (0, "") and "3 of 3 answers the same" in " ".join(out.split()), out
    words = "0.5 of mine/adapter and 1 of other/adapter (ties, density 0.5)"
    assert words in " ".join(out.split()) and words in Path("both/README.md").read_text()
    mix = json.loads(Path("both/merge.json").read_text())["mix"]
    found = [(each["folder"], each["weight"]) for each in mix["adapters"]]
    assert found == [("mine/adapter", 0.5), ("other/adapter", 1)]
    assert sorted(path.name for path in Path().iterdir()) == ["ask.txt", "both", "mine", "other"]


def test_an_extraction_has_every_label_on_one_line(typed, own):
    assert typed("merge", "mine", "--prompts", "ask.txt", "--output", "whole")[0] == 0
    code, out, err = typed("extract", "pocket", "whole", "--rank", "4", "--output", "back")
    titles = [line[2:11].strip() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert titles == ["layers", "rank", "energy", "lowest", "numbers", "besides", "left out", "wrote"], out


@pytest.mark.parametrize("words, told", [
    ("pocket mine/adapter --output out", "is an adapter and no whole model"),
    ("pocket whole --output whole/adapter", "lies inside"), ("pocket whole --output ask.txt/x", "is no folder")])
def test_an_extraction_is_refused_before_it_is_computed(typed, own, monkeypatch, words, told):
    assert typed("merge", "mine", "--prompts", "ask.txt", "--output", "whole")[0] == 0
    monkeypatch.setattr("finetuning_kit.extraction.factor_layers", None)
    code, _, err = typed("extract", *words.split())
    assert code == 2 and told in err, err
    assert sorted(path.name for path in Path().iterdir()) == ["ask.txt", "mine", "whole"]


def test_ctrl_c_leaves_nothing(own, tmp_path):
    slow = ("import sys, time, finetuning_kit.merging as m; from finetuning_kit.cli import main\n"
            "m.prove_merge = lambda *_: (print('proving', flush=True), time.sleep(60))\nsys.exit(main(sys.argv[1:]))")
    command = [sys.executable, "-c", slow, "merge", "mine", "--prompts", "ask.txt"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
    while "proving" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "finetuning-kit: interrupted\n")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir() if path.name.startswith(".")
                  or "merged" in path.name) == []
