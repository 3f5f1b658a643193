"""Bad input at the command line: a sentence, exit code 2, no traceback, nothing lost; Ctrl-C can be resumed."""
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROWS = [{"instruction": f"Give the opposite of word {n}.", "output": f"antonym {n}"} for n in range(40)]


@pytest.fixture
def rows(tmp_path):
    "A file of forty good rows."
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def train(*words):
    "The words of a short run."
    return ("train", "--base-model", "pocket", "--max-steps", "4", "--output-dir", "runs", *words)


@pytest.mark.parametrize("words, sentence", [
    (("--dataset", "missing.jsonl"), "missing.jsonl"),
    ((), "`dataset` is missing"),
    (("--dataset", "rows.jsonl", "--lora-rank", "0"), "`lora.r` must be at least 1, got"),
    (("--dataset", "rows.jsonl", "--learning-rate", "fast"), "`training.learning_rate` must be a number"),
    (("--dataset", "rows.jsonl", "--base-model", "nobody/nothing-7b"), "nobody/nothing-7b"),
    (("--dataset", "rows.jsonl", "--config", "no.yaml"), "no.yaml"),
    (("--dataset", "rows.jsonl", "--resume", "7"), "checkpoint"),
])
def test_refusals(typed, rows, words, sentence):
    code, _, err = typed(*train(*words))
    assert (code, sentence in err) == (2, True), err


def test_unknown_flag(typed, rows):
    code, _, err = typed(*train("--dataset", rows, "--lora-rnak", "8"))
    assert code == 2 and "--lora-rnak" in err


def test_broken_row_is_named_by_file_and_line(typed, rows):
    rows.write_text(rows.read_text() + '{"instruction": "Give", "output": \n')
    code, _, err = typed(*train("--dataset", rows))
    assert code == 2 and "rows.jsonl:41:" in err
    assert not Path("runs").exists()


def test_row_without_an_answer_stops_unless_skipped(typed, rows):
    rows.write_text(rows.read_text() + json.dumps({"instruction": "Give the opposite of dry.", "output": " "}) + "\n")
    code, _, err = typed(*train("--dataset", rows))
    assert code == 2 and "rows.jsonl:41" in err
    code, _, err = typed(*train("--dataset", rows, "--skip-bad-rows"))
    assert code == 0, err
    left_out = json.loads(Path("runs/instruct_rows/skipped_rows.jsonl").read_text())
    assert left_out["row"]["output"] == " " and left_out["line"] == 41


def test_unknown_key_in_a_yaml_file(typed, rows):
    Path("run.yaml").write_text("model_name: pocket\nlora:\n  rnak: 8\n")
    code, _, err = typed(*train("--dataset", rows, "--config", "run.yaml"))
    assert code == 2 and "run.yaml:3: unknown key `lora.rnak`" in err and "`r" in err


def test_another_run_is_not_overwritten(typed, rows):
    assert typed(*train("--dataset", rows))[0] == 0
    kept = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    code, _, err = typed(*train("--dataset", rows))
    assert code == 2 and "already holds another run" in err
    assert kept == {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}


@pytest.mark.parametrize("flag", [
    ("--mixed-precision", "bf16", "--max-steps", "24"), ("--load-in-4bit",), ("--full", "--lr", "1e-5")])
def test_other_ways_to_train(typed, rows, flag):
    code, out, err = typed(*train("--dataset", rows, *flag))
    assert (code, err) == (0, "") and "Traceback" not in out
    metrics = json.loads(Path("runs/instruct_rows/metrics.json").read_text())
    assert ("merge" in metrics) == ("--full" not in flag)
    assert metrics.get("merge", {"passed": True})["passed"]


def limit_file_size():
    "Let no file of the child grow past 64 KiB: what a full disk does, without one."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))


def start(*words, cwd, **options):
    "A command in a process of its own."
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent)])}
    return subprocess.Popen([sys.executable, "-m", "finetuning_kit.cli", *map(str, words)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options)


def test_full_disk(tmp_path, rows):
    process = start(*train("--dataset", rows), cwd=tmp_path, preexec_fn=limit_file_size)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in err
    assert "disk is full" in err and "needs about" in err and "free" in err


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path, typed, rows):
    words = ("train", "--base-model", "pocket", "--max-steps", "60", "--output-dir", "runs", "--dataset", rows)
    process = start(*words, cwd=tmp_path)
    events = tmp_path / "runs/instruct_rows/events.jsonl"
    end = time.time() + 300
    while not (events.exists() and '"type": "log"' in events.read_text()):
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume auto" in err and "Traceback" not in err
    assert not (tmp_path / "runs/instruct_rows/final_model").exists()
    code, _, err = typed(*words, "--resume", "auto")
    assert code == 0, err
    assert json.loads((tmp_path / "runs/instruct_rows/run.json").read_text())["status"] == "finished"


# What is wrong with a file, by words and by the exit code.

SOUND = [{"prompt": f"What is {k} + 1?", "completion": str(k + 1)} for k in range(120)]


def keep(path, rows):
    "Write rows as JSON Lines."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_validate_ends_with_0_1_or_2(typed, tmp_path):
    for name, rows, code in (("sound", SOUND, 0), ("twice", SOUND + SOUND[:1], 1),
                             ("empty", [*SOUND, {"prompt": "And?", "completion": " "}], 2)):
        keep(tmp_path / f"{name}.jsonl", rows)
        assert typed("validate", "--dataset", f"{name}.jsonl")[0] == code
    code, out, err = typed("validate", "--dataset", "empty.jsonl")
    assert "1 × empty_outputs: an answer is empty or blank (empty.jsonl:121)" in " ".join(out.split())
    code, out, err = typed("validate", "--dataset", "twice.jsonl", "--json")
    report = json.loads(out)
    assert (code, err, report["issues"]["duplicates"], report["exit_code"]) == (1, "", 1, 1)
    assert report["findings"][0]["places"] == ["twice.jsonl:121"]
    code, out, err = typed("validate", "--dataset", "twice.jsonl", "--eval-dataset", "sound.jsonl")
    assert code == 2 and "120 of 120 questions of the evaluation set stand in these rows" in " ".join(out.split())


def test_rows_are_shown_only_when_asked_for_and_secrets_never(typed, tmp_path):
    key = "ghp_" + "a1B2c3D4e5" * 4
    keep(tmp_path / "rows.jsonl", [*SOUND, {"prompt": "Show my purple token.", "completion": key[:40]}])
    _, quiet, _ = typed("validate", "--dataset", "rows.jsonl")
    _, shown, _ = typed("validate", "--dataset", "rows.jsonl", "--examples", "2")
    assert "purple" not in quiet and "secrets" in quiet
    assert "ghp_" in shown and key[5:12] not in shown + quiet
    code, out, _ = typed("clean", "--dataset", "rows.jsonl", "--output", "clean.jsonl", "--repair", "secrets")
    assert code == 0 and key[5:12] not in out
    written = (tmp_path / "clean.jsonl").read_text()
    assert key[5:12] not in written and "[TOKEN]" in written


def test_clean_writes_only_where_it_is_told_and_is_done_after_once(typed, tmp_path):
    keep(tmp_path / "rows.jsonl", [*SOUND, SOUND[0], {"prompt": "And?", "completion": " "},
                                   {"prompt": "Or?", "completion": "Caf\u00c3\u00a9.\n"}])
    before = (tmp_path / "rows.jsonl").read_bytes()
    code, out, _ = typed("clean", "--dataset", "rows.jsonl")
    assert code == 0 and "121 kept + 2 left out" in " ".join(out.split()) and "nothing was written" in out
    code, _, err = typed("clean", "--dataset", "rows.jsonl", "--output", "rows.jsonl", "--overwrite")
    assert code == 2 and "rows.jsonl" in err and (tmp_path / "rows.jsonl").read_bytes() == before
    assert typed("clean", "--dataset", "rows.jsonl", "--output", "clean.jsonl", "--record", "done.jsonl")[0] == 0
    done = [json.loads(line) for line in (tmp_path / "done.jsonl").read_text().splitlines()]
    assert [(each["what"], each["line"]) for each in done] == [("repaired", 123), ("left out", 121), ("left out", 122)]
    _, out, _ = typed("clean", "--dataset", "clean.jsonl")
    assert "121 kept + 0 left out; 0 repaired" in " ".join(out.split())
    assert typed("validate", "--dataset", "clean.jsonl")[0] == 0
    for code in ("rubbish", "few_rows", "not_encoded"):
        code, _, err = typed("clean", "--dataset", "rows.jsonl", "--drop", code)
        assert code == 2 and "`drop` may hold schema" in err


KEY = "ghp_" + "a1B2c3D4e5" * 4  # of the right shape, and nobody's
ASK = {"role": "user", "content": "log in"}


@pytest.mark.parametrize("turn", [
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": json.dumps({"t": KEY[:40]})}}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Use "}, {"type": "text", "text": KEY[:40]}]},
    {"role": "assistant", "content": f"Use {KEY[:40]}."}])
def test_what_the_record_says_was_mended_is_mended_in_the_file(typed, tmp_path, turn):
    more = [{"role": "tool", "name": "f", "content": "ok"}] if "tool_calls" in turn else [ASK]
    keep(tmp_path / "rows.jsonl", [{"messages": [ASK, turn, *more, {"role": "assistant", "content": "Done.\n"}]}])
    words = "clean --dataset rows.jsonl --repair secrets,stray_blanks --output clean.jsonl --record done.jsonl"
    code, out, _ = typed(*words.split())
    written, record = (Path(name).read_text() for name in ("clean.jsonl", "done.jsonl"))
    assert code == 0 and "[TOKEN]" in written and KEY[:40] not in written and KEY[5:12] not in out
    assert [json.loads(line)["codes"] for line in record.splitlines()] == [["secrets"], ["stray_blanks"]]


def test_a_text_is_mended_where_it_is_wrong_and_nowhere_else(tmp_path):
    from finetuning_kit.cleaning import clean

    row = {"messages": [{"role": "user", "content": "say it "}, {"role": "assistant", "content": "say it "}],
           "note": "say it "}
    [better] = clean([row]).rows
    said = [turn["content"] for turn in better.data["messages"]]
    assert said == ["say it ", "say it"] and better.data["note"] == "say it "
    odd = [{"role": "user", "content": "x\u200by "}, {"role": "assistant", "content": "x\u200by "}] * 2
    once = clean([{"messages": odd}]).rows
    assert clean([each.data for each in once]).rows[0].data == once[0].data
    assert [turn["content"] for turn in once[0].data["messages"]] == ["xy ", "xy"] * 2


@pytest.mark.parametrize("words, sentence", [
    (("--output", "z.jsonl", "--record", "sub/../z.jsonl"), "cannot go into one file"),
    (("--output", "test.jsonl", "--eval-dataset", "test.jsonl"), "being read"),
    (("--output", "z.jsonl", "--record", "test.jsonl", "--eval-dataset", "test.jsonl"), "being read"),
    (("--output", "z.jsonl", "--record", "z.csv"), "let its name end in .jsonl"),
    (("--record", "z.jsonl"), "name both"),
    (("--diff", "-1"), "0 or more"), (("--repair", "schema"), "`repair` may hold")])
def test_clean_refuses_before_anything_is_written(typed, tmp_path, words, sentence):
    (tmp_path / "sub").mkdir()
    keep(tmp_path / "rows.jsonl", SOUND), keep(tmp_path / "test.jsonl", SOUND[:2])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    code, _, err = typed("clean", "--dataset", "rows.jsonl", "--overwrite", *words)
    assert code == 2 and sentence in err, err
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_nothing_that_a_terminal_obeys_and_no_secret_is_printed(typed, tmp_path):
    keep(tmp_path / "rows.jsonl", [*SOUND, {**SOUND[0], "c\x1b[31mred": 1, KEY[:40]: 2},
                                   {"prompt": "Which?", "completion": f"my {KEY[:8]}\u200b{KEY[8:40]}"}])
    for words in (("validate", "--examples", "9"), ("clean",), ("validate", "--json")):
        _, out, _ = typed(*words, "--dataset", "rows.jsonl")
        assert "\x1b" not in out and KEY[12:24] not in out, out


def test_deep_arguments_are_a_fault_of_the_row(typed, tmp_path):
    call = {"name": "f", "arguments": '{"a": ' + "[" * 900 + "]" * 900 + "}"}
    keep(tmp_path / "rows.jsonl", [{"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}])
    for command in (("validate",), ("clean",), ("train", "--base-model", "pocket", "--dry-run")):
        code, out, err = typed(*command, "--dataset", "rows.jsonl")
        assert "nest deeper than 64" in " ".join((out + err).split()) or code == 0, (command, out, err)
        assert "unexpected" not in err


def test_the_suggested_command_can_be_pasted(typed, tmp_path):
    (tmp_path / "my folder").mkdir()
    keep(tmp_path / "my folder" / "the rows of 2024.jsonl", [*SOUND, SOUND[0], {"prompt": "And?", "completion": " "}])
    keep(tmp_path / "test.jsonl", SOUND[:2])
    _, out, _ = typed("validate", "--dataset", "my folder/the rows of 2024.jsonl", "--eval-dataset", "test.jsonl")
    [line] = [line.strip() for line in out.splitlines() if line.strip().startswith("finetuning-kit clean")]
    assert "leave out 4 rows" in " ".join(out.split())
    _, *words = shlex.split(line)
    code, shown, err = typed(*words)
    assert code == 0 and "118 kept + 4 left out" in " ".join(shown.split()), err
    assert typed("validate", "--dataset", words[-1], "--eval-dataset", "test.jsonl")[0] == 0


# One judgement: what `validate` calls unfit, a dry run and a run refuse, and nothing else.

LONG = {"prompt": "Count.", "completion": "one " * 900}
FILES = {
    "sound": SOUND, "twice": SOUND + SOUND[:9], "empty": [*SOUND, {"prompt": "And?", "completion": " "}],
    "unasked": [*SOUND, {"prompt": " ", "completion": "Yes."}], "few": SOUND[:9], "a_long": [*SOUND, LONG],
    "mojibake": [*SOUND, {"prompt": "Or?", "completion": "Caf\u00c3\u00a9."}], "long": SOUND[:30] + [LONG] * 9,
    "schema": [*SOUND, {"prompt": "And?", "completion": 7}],
    "chats": [{"messages": [{"role": "user", "content": f"Is {n} odd?"},
                            {"role": "assistant", "content": "Who knows."}]} for n in range(40)],
    "silent": [{"messages": [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": f"{n}?"}]}
               for n in range(40)],
    "two_systems": [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "system", "content": "Be rude."},
                                  {"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]}
                    for n in range(40)],
}


@pytest.mark.parametrize("name", FILES)
def test_validate_and_a_dry_run_agree(typed, tmp_path, name):
    keep(tmp_path / "rows.jsonl", FILES[name])
    verdict, out, _ = typed("validate", "--dataset", "rows.jsonl", "--model", "pocket")
    rehearsal, shown, err = typed("train", "--base-model", "pocket", "--dataset", "rows.jsonl", "--dry-run")
    assert (verdict == 2) == (rehearsal == 2), (verdict, out, rehearsal, shown, err)
    assert not (tmp_path / "output").exists() and "Traceback" not in err


@pytest.mark.parametrize("name, held_out", [
    ("sound", [LONG] * 3), ("sound", SOUND[:2]), ("sound", [LONG, *FILES["chats"]]),
    ("few", [{"prompt": "And?", "completion": "Yes."}])])
def test_validate_and_a_dry_run_agree_on_evaluation_sets(typed, tmp_path, name, held_out):
    keep(tmp_path / "rows.jsonl", FILES[name]), keep(tmp_path / "test.jsonl", held_out)
    words = "--dataset", "rows.jsonl", "--eval-dataset", "test.jsonl"
    verdict, out, _ = typed("validate", *words, "--model", "pocket")
    rehearsal, shown, err = typed("train", "--base-model", "pocket", *words, "--dry-run")
    assert (verdict == 2) == (rehearsal == 2), (verdict, out, rehearsal, shown, err)


def test_a_run_refuses_what_a_dry_run_refuses(typed, tmp_path):
    for name in ("unasked", "long"):
        keep(tmp_path / "rows.jsonl", FILES[name])
        code, _, err = typed(*train("--dataset", "rows.jsonl"))
        rehearsal, _, same = typed(*train("--dataset", "rows.jsonl", "--dry-run"))
        assert (code, rehearsal) == (2, 2) and err == same
    assert not (tmp_path / "runs").exists()


def test_an_override_is_kept_in_the_record(typed, tmp_path):
    keep(tmp_path / "rows.jsonl", FILES["unasked"])
    code, _, err = typed(*train("--dataset", "rows.jsonl", "--allow-faults", "empty_questions"))
    assert code == 0, err
    record = json.loads(Path("runs/instruct_rows/run.json").read_text())
    assert record["overridden"] == {"empty_questions": 1}
    assert any("in spite of 1 x empty_questions" in note for note in record["notes"])
    code, _, err = typed(*train("--dataset", "rows.jsonl", "--allow-faults", "schema", "--output-dir", "more"))
    assert code == 2 and "`allow_faults` may name" in err


def test_validate_refuses_a_file_that_cannot_be_read(typed, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    code, out, err = typed("validate", "--dataset", "rows.jsonl")
    assert (code, out) == (2, "") and "rows.jsonl:2" in err


# Settings by name: layers over one another, each value with its origin, and flags that cannot both be meant.

def rehearse(typed, *words):
    "A dry run on the pocket model: its exit code, and its lines with single spaces."
    code, out, err = typed("train", "--base-model", "pocket", "--dataset", "rows.jsonl", "--dry-run", *words)
    assert err == "", err
    assert max(map(len, out.splitlines())) <= 100
    return code, [" ".join(line.split()) for line in out.splitlines()]


@pytest.fixture
def wide(monkeypatch):
    "A terminal of 100 columns."
    monkeypatch.setenv("COLUMNS", "100")


def test_a_dry_run_says_where_each_value_came_from(typed, rows, wide):
    Path("run.yaml").write_text("lora:\n  r: 4\nseed: 7\n")
    words = "--task code --config low_resource --config run.yaml --lora-profile unsloth --num_epochs=2".split()
    code, lines = rehearse(typed, *words, "--training.learning-rate", "1e-4 * 2")
    assert code == 1  # forty rows are few
    for line in ("learning_rate 0.0002 --training.learning-rate", "num_train_epochs 2 --num-epochs",
                 "lora.r 4 run.yaml:2", "seed 7 run.yaml:3", "lora.lora_alpha 16 LoRA profile unsloth",
                 "gradient_accumulation_steps 8 preset low_resource", "eval_steps 200 task code", "method lora default",
                 "optimizer steps 5 an epoch × 2 = 10", "warm-up 500 of 10 steps", "lr_scheduler_type linear default"):
        assert any(line in each for each in lines), (line, lines)
    assert any("the run ends before its warm-up" in each for each in lines)
    assert not Path("output").exists()


def test_a_rate_for_all_weights_is_questioned_on_an_adapter_and_not_changed(typed, rows, wide):
    _, lines = rehearse(typed, "--task", "chat")
    said = " ".join(lines)
    assert "learning_rate 2e-05 task chat" in said and "set `learning_rate` near 0.0002" in said
    said = " ".join(rehearse(typed, "--task", "chat", "--full")[1])
    assert "learning_rate 2e-05 task chat" in said and "hardly moves" not in said and "method full --full" in said
    assert "learning_rate 0.002 demo" in " ".join(rehearse(typed)[1])


@pytest.mark.parametrize("preset, figures", [
    ("quick_test", ("100, set by max_steps", "2 rows × 1 pass", "more than the 54 steps of 3 epochs")),
    ("low_resource", ("1 row × 8 passes = 8",)),
    ("high_quality", ("warm-up 2,000 of", "8 rows × 1 pass")), ("production", ("4 rows × 2 passes",))])
def test_every_preset_by_name(typed, rows, wide, preset, figures):
    said = " ".join(rehearse(typed, "--config", preset)[1])
    assert f"preset {preset}" in said and all(each in said for each in figures), said


def test_every_flag_of_the_task_scripts_is_known(typed, rows, wide):
    words = ("--task domain --lora --lora-rank 8 --gradient-checkpointing --max-length 128 --mixed-precision no "
             "--eval-steps 50 --save-steps 200 --max-steps 9 --num-epochs 1 --learning-rate 1e-3/8 "
             "--per-device-train-batch-size 2 --gradient-accumulation-steps 2 --num-workers 0 --output-dir out "
             "--method lora")
    _, lines = rehearse(typed, *words.split())
    for line in ("learning_rate 0.000125 --learning-rate", "max_seq_length 128 --max-length", "method lora --method",
                 "optimizer steps 9, set by max_steps", "lora.r 8 --lora-rank", "weight_decay 0.05 task domain"):
        assert any(line in each for each in lines), (line, lines)
    assert any("`num_train_epochs` 1" in each for each in lines) is False  # both are flags: nothing was overruled


def test_frozen_layers_by_ratio(typed, rows, wide):
    said = " ".join(rehearse(typed, "--freeze-ratio", "0.5", "--lr", "1e-5")[1])
    assert "method freeze --freeze-ratio" in said and "freeze_ratio 0.5 --freeze-ratio" in said


def test_a_name_without_an_effect_is_told(typed, rows, wide):
    Path("run.yaml").write_text("method: full\nlearning_rate: 1e-5\n")
    said = " ".join(rehearse(typed, "--config", "run.yaml", "--lora-profile", "unsloth")[1])
    assert "the LoRA profile unsloth has no effect" in said
    said = " ".join(rehearse(typed, "--config", "quick_test", "--num-epochs", "1")[1])
    assert "`num_train_epochs` 1 (--num-epochs) has no effect, for `max_steps` 100 (preset quick_test) decides" in said


def test_a_name_of_former_days_is_noted_once(typed, rows, wide):
    Path("run.yaml").write_text("model_name: pocket\nwarmup_ratio: 0.1\nmax_steps: 2\nload_in_4bit: false\n")
    note = "`warmup_ratio` is called `warmup_steps` now"
    assert " ".join(rehearse(typed, "--config", "run.yaml")[1]).count(note) == 1
    code, _, err = typed(*train("--dataset", rows, "--config", "run.yaml", "--lr", "1e-3"))
    assert code == 0, err
    notes = json.loads(Path("runs/instruct_rows/run.json").read_text())["notes"]
    assert sum(note in each for each in notes) == 1
    assert "warmup_steps: 0.1" in Path("runs/instruct_rows/config.yaml").read_text()


@pytest.mark.parametrize("words, names", [
    ("--full --lora", ("--full", "--lora")), ("--full --lora-rank 8", ("--full", "--lora-rank")),
    ("--freeze-ratio 0.5 --lora", ("--freeze-ratio", "--lora")),
    ("--method ia3 --lora-rank 4", ("--method", "--lora-rank")),
    ("--lr 1e-4 --learning-rate 2e-4", ("--lr", "--learning-rate")), ("--load-in-4bit --no-4bit", ("--no-4bit",)),
    ("--full --lora-profile unsloth", ("--full", "--lora-profile")),
    ("--full --load-in-4bit", ("--full", "--load-in-4bit")),
    ("--mixed-precision fp16 --bf16 true", ("--mixed-precision", "--bf16"))])
def test_flags_that_exclude_each_other(typed, rows, words, names):
    for more in ((), ("--dry-run",)):
        code, out, err = typed(*train("--dataset", rows, *words.split(), *more))
        assert (code, out) == (2, "") and all(name in err for name in names) and err.count("\n") == 1, err
    assert not Path("runs").exists()


@pytest.mark.parametrize("words, sentence", [
    ("--config quick_tset", "did you mean quick_test?"), ("--task chta", "did you mean chat?"),
    ("--lora-profile unslot", "did you mean unsloth?"), ("--learning-rate 1e-4*", "`training.learning_rate` must be"),
    ("--learning-rate __import__('os')", "`training.learning_rate` must be"),
    ("--freeze-ratio 2", "`freeze_ratio` must be"),
    ("--lora.rnak 8", "unknown flag --lora.rnak; did you mean --lora.r?"), ("--max-steps 0", "`max_steps` must be -1"),
    ("--lora-rank eight", "`lora.r` must be a whole number"), ("--config .", "is a folder"),
    ("--method lroa", "did you mean lora?"), ("--early-stopping 3 --eval-strategy no", "`early_stopping` needs")])
def test_bad_names_and_values(typed, rows, words, sentence):
    code, _, err = typed(*train("--dataset", rows, *words.split(), "--dry-run"))
    assert code == 2 and sentence in err and "unexpected" not in err and err.count("\n") == 1, err


def test_a_file_without_a_model_asks_for_one(typed, rows):
    Path("run.yaml").write_text("lora:\n  r: 4\n")
    code, _, err = typed("train", "--config", "run.yaml", "--dataset", rows, "--dry-run")
    assert code == 2 and "`model_name` is missing" in err
    Path("run.yaml").write_text("")
    code, _, err = typed("train", "--config", "run.yaml", "--dataset", rows, "--base-model", "pocket", "--dry-run")
    assert code == 2 and "run.yaml" in err
