"""`evaluate` and `compare` as typed: what they write, what they refuse, and by which exit code."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from finetuning_kit.asking import Answer
from finetuning_kit.collecting import HeldFile
from finetuning_kit.evaluation_commands import ASKED
from finetuning_kit.metrics import Exchange
from finetuning_kit.models import load_model, load_tokenizer
from finetuning_kit.side_by_side import load_answers, save_answers
from tests.notebooks import ROOT

ROWS = [{"instruction": f"Give the opposite of word {n}.", "output": f"antonym {n}"} for n in range(12)]
ASK = ("--questions", "rows.jsonl", "--max-new-tokens", "6")


@pytest.fixture
def rows(tmp_path):
    "A file of twelve questions."
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def start(*words, **options):
    "A command in a process of its own."
    return subprocess.Popen([sys.executable, "-m", "finetuning_kit.cli", *words], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)


def n_lines(path):
    "Whole lines of a file."
    return Path(path).read_bytes().count(b"\n") if Path(path).exists() else 0


def kept(path, n_right, n=40, word="yes"):
    "A folder of an evaluation with so many right answers."
    Path(path).mkdir()
    save_answers(Path(path) / "answers.jsonl", [
        Exchange(f"{word}? {k}", "yes", Answer("yes" if k < n_right else "no", 1, True),
                 ({"role": "user", "content": f"{word}? {k}"},)) for k in range(n)])
    return path


def test_one_model_and_its_files(typed, rows):
    code, out, err = typed("evaluate", "--model", "pocket", *ASK, "--output", "mine")
    assert (code, err) == (0, "") and "exact match" in out
    assert {"answers.jsonl", "evaluation.json", "report.html", "report.json"} <= {
        path.name for path in Path("mine").iterdir()}
    found = load_answers("mine/answers.jsonl")
    assert [each.prompt for each in found] == [row["instruction"] for row in ROWS]
    assert all(each.answer.n_tokens <= 6 for each in found)
    assert json.loads(Path("mine/report.json").read_text())["names"] == ["pocket"]
    code, _, err = typed("evaluate", "--model", "pocket", *ASK, "--output", "mine", "--metrics", "stop_rate")
    assert (code, err) == (0, "")
    code, _, err = typed("evaluate", "--model", "pocket", *ASK, "--limit", "3", "--output", "mine")
    assert code == 2 and "holds another evaluation (limit none)" in err


def test_nothing_is_kept_unless_asked_for(typed, rows):
    before = sorted(Path().rglob("*"))
    code, out, _ = typed("evaluate", "--model", "pocket", *ASK, "--limit", "2", "--json")
    card = json.loads(out)
    assert code == 0 and len(card["rows"]) == 2 and card["schema"] == "finetuning_kit.scorecard"
    assert sorted(Path().rglob("*")) == before


def test_base_and_probe(typed, rows):
    words = ("--probe", "probe.jsonl", "--limit", "4", "--output", "both", "--html", "page.html")
    Path("probe.jsonl").write_text(json.dumps({"prompt": "The capital of Italy is", "completion": "Rome."}) + "\n")
    code, out, err = typed("evaluate", "--model", "pocket", "--base", "pocket", *ASK, *words)
    assert (code, err) == (0, "") and "knowledge" in out and "cannot tell" in out
    assert {"base_answers.jsonl", "probe.jsonl", "base_probe.jsonl"} <= {path.name for path in Path("both").iterdir()}
    assert Path("page.html").read_text().startswith("<!doctype")
    code, out, _ = typed("compare", "both", "--gate")
    assert code == 3 and "cannot tell" in out
    code, out, _ = typed("compare", "pocket", "pocket", *ASK, "--limit", "2")
    assert code == 0 and "pocket (2)" in out


def test_evaluation_of_a_run_and_of_its_adapter(typed, rows):
    words = ("train", "--base-model", "pocket", "--dataset", "rows.jsonl", "--max-steps", "2", "--output-dir", "runs")
    assert typed(*words)[0] == 0
    run = Path("runs/instruct_rows")
    assert {"answers.jsonl", "base_answers.jsonl"} <= {path.name for path in run.iterdir()}
    for name in (run, run / "adapter"):
        code, _, err = typed("evaluate", "--model", name, *ASK, "--limit", "3", "--output", f"of_{name.name}")
        assert (code, err) == (0, "")
    first, second = (load_answers(f"of_{name}/answers.jsonl") for name in ("instruct_rows", "adapter"))
    assert [each.text for each in first] == [each.text for each in second]
    code, out, err = typed("compare", run)
    assert (code, err) == (0, "") and "instruct_rows against base" in out
    code, out, _ = typed("compare", run, run, "--html", "runs.html")
    assert code == 0 and "same settings" in out and "training loss" in Path("runs.html").read_text()


@pytest.mark.parametrize("words, sentence", [
    (("evaluate", "--model", "pocket", "--questions", "missing.jsonl"), "missing.jsonl"),
    (("evaluate", "--model", "nowhere/at-all", *ASK), "nowhere/at-all"),
    (("evaluate", "--model", "dead", *ASK), "has no model to ask (its status: failed)"),
    (("evaluate", "--model", "pocket", *ASK, "--metrics", "exakt_match"), "did you mean exact_match?"),
    (("evaluate", "--model", "pocket", *ASK, "--output", "foreign"), "holds 1 files that no evaluation wrote"),
    (("evaluate", "--model", "pocket", *ASK, "--probe", "rows.jsonl"), "a probe needs text in `prompt`"),
    (("evaluate", "--model", "pocket", *ASK, "--max-new-tokens", "0"), "`max_new_tokens` must be at least 1"),
    (("evaluate", "--model", "pocket", *ASK, "--limit", "0"), "no questions"),
    (("evaluate", "--model", "pocket", "--questions", "torn.jsonl"), "torn.jsonl:1"),
    (("compare", "base", "nowhere"), "`nowhere` does not exist"),
    (("compare", "base", "rows.jsonl"), "`rows.jsonl` is a file"),
    (("compare", "base", "foreign"), "holds neither a run nor answers"),
    (("compare", "base", "good", "more"), "two folders are compared, got 3"),
    (("compare", "base", "good", "--metrics", "blue"), "there is no metric 'blue'"),
    (("compare", "base", "good", "--gate", "--budget", "2"), "--budget must lie between 0 and 1"),
    (("compare", "base", "good", "--noise", "base", "good"), "add --gate"),
    (("compare", "base", "good", "--gate", "--noise", "base"), "--noise needs two folders or more"),
    (("compare", "base", "good", "--gate", "--noise", "base", "foreign"), "holds neither a run nor answers"),
    (("compare", "base", "good", "--gate", "--noise", "base", "./base"), "answers throughout as base does"),
    (("compare", "base", "good", "--gate", "--noise", "base", "other"), "other was asked other rows than base"),
    (("compare", "base", "good", "--gate", "--noise", "good", "empty"), "--noise, answers.jsonl: empty holds none"),
    (("compare", "base", "good", "--gate", "--noise", "base", "--noise", "probed"),
     "probe.jsonl: base holds none; `finetuning"),
    (("compare", "pocket", "nowhere/at-all", *ASK, "--gate", "--budget", "2"), "--budget must lie between 0 and 1"),
    (("compare", "pocket", *ASK), "are asked of two models, got 1"),
    (("compare", "base", "bad_answers"), "bad_answers/answers.jsonl:1: this is no kept answer"),
])
def test_refusals(typed, rows, words, sentence):
    kept("base", 10), kept("good", 30), Path("dead").mkdir(), Path("foreign").mkdir(), Path("bad_answers").mkdir()
    Path("dead/run.json").write_text('{"status": "failed"}')
    Path("foreign/notes.txt").write_text("mine")
    Path("bad_answers/answers.jsonl").write_text('{"prompt": 1}\n')
    Path("torn.jsonl").write_text('{"instruction": "a", "outp')
    kept("other", 20, 39), kept("probed", 20), kept("empty", 0, 0)
    save_answers("probed/probe.jsonl", [Exchange("a", "b", Answer("", 0, True), extra={"right": 1.0})])
    code, _, err = typed(*words)
    assert (code, sentence in err) == (2, True), err


def test_exit_codes_of_the_gate(typed, tmp_path):
    kept("base", 10), kept("good", 30), kept("same", 11), kept("other", 30, word="no"), kept("few", 1, 1)
    for pair, code in ((("base", "good"), 0), (("good", "base"), 1), (("base", "same"), 3), (("base", "other"), 3),
                       (("base", "few"), 3)):
        assert typed("compare", *pair, "--gate")[0] == code, pair
        assert typed("compare", *pair)[0] == 0
    code, out, _ = typed("compare", "base", "other", "--gate")
    assert "different questions" in out and "cannot tell" in out


def test_gate_and_forgetting(typed, tmp_path):
    kept("base", 10), kept("good", 30)
    rows = [Exchange(f"sentence {k}", "end", Answer("", 0, True), extra={"right": 1.0}) for k in range(300)]
    save_answers("base/probe.jsonl", rows)
    for n_lost, code in ((0, 0), (90, 1), (6, 3)):
        save_answers("good/probe.jsonl", [replace(each, extra={"right": float(k >= n_lost)})
                                          for k, each in enumerate(rows)])
        found = typed("compare", "base", "good", "--gate")
        assert found[0] == code, found
    assert typed("compare", "base", "good", "--gate", "--budget", "0.1")[0] == 0


def test_seeds_that_differ_widen_the_gate(typed, tmp_path):
    kept("base", 10), kept("good", 21), kept("again", 15), kept("third", 27)
    rows = [Exchange(f"sentence {k}", "end", Answer("", 0, True), extra={"right": 1.0}) for k in range(300)]
    for name in ("base", "good", "again", "third"):
        save_answers(f"{name}/probe.jsonl", rows)
    assert typed("compare", "base", "good", "--gate")[0] == 0
    code, out, _ = typed("compare", "base", "good", "--gate", "--noise", "good", "again", "third")
    assert code == 3 and "runs differ by as much as is asked here" in out
    margins = "exact_match 64.5 points, knowledge 0.0 points"  # 4.30 times 15 points, and times none
    assert f"{margins} (3 runs, 40 questions: good, again, third)" in out
    assert "3 runs say little of all others" in out
    code, out, _ = typed("compare", "base", "good", "--gate", "--json", "--noise", "good", "again", "--noise", "third")
    assert code == 3 and "64.5 points" in json.loads(out)["gate"]["reasons"][2]
    names = [kept(f"seed{n}", 20 + n % 2) for n in range(6)]
    code, _, err = typed("compare", "base", "good", "--gate", "--noise", *names)
    assert code == 2 and "seed2 answers throughout as seed0 does" in err
    for n, name in enumerate(names):
        kept(f"{name}b", 15 + n)
    code, out, _ = typed("compare", "base", "good", "--gate", "--noise", *(f"{name}b" for name in names))
    assert "(6 runs, 40 questions: seed0b, seed1b, seed2b, seed3b and 2 more)" in out
    assert "not measured for knowledge" in out and "say little" not in out
    assert "eight seeds of the pocket demo" in typed("compare", "base", "good", "--gate", "--noise", "pocket")[1]


def test_a_run_that_failed_is_compared_as_far_as_it_went(typed, tmp_path):
    for name, status in (("whole", "finished"), ("broken", "failed")):
        Path(name).mkdir()
        Path(name, "run.json").write_text(json.dumps({"status": status}))
        events = [{"type": "start", "step": 0, "n_steps": 9}, {"type": "log", "step": 5, "loss": 2.0},
                  {"type": "end", "status": status, "reason": "the memory was full" * (status == "failed")}]
        Path(name, "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    code, out, err = typed("compare", "whole", "broken", "--gate", "--html", "page.html")
    assert code == 3 and not err
    assert "is not finished: failed (the memory was full)" in out and "holds no answers" in out
    assert "training loss" in Path("page.html").read_text()


def test_a_killed_evaluation_goes_on(typed, rows, monkeypatch):
    from finetuning_kit import collecting

    asked, whole = [], collecting.ask_batch

    def counted(*arguments, **options):
        if len(asked) == 2:
            asked.append("killed")
            raise KeyboardInterrupt
        asked.append("batch")
        return whole(*arguments, **options)

    monkeypatch.setattr(collecting, "ask_batch", counted)
    words = ("evaluate", "--model", "pocket", *ASK, "--batch-size", "4", "--output", "mine")
    assert typed(*words)[0] == 130 and not Path("mine/report.json").exists()
    assert typed(*words)[0] == 0 and asked.count("batch") == 3
    assert len(load_answers("mine/answers.jsonl")) == 12


def test_sigterm_is_told(typed, rows):
    words = ("evaluate", "--model", "pocket", *ASK, "--batch-size", "1", "--max-new-tokens", "500", "--output", "mine")
    process = start(*words)
    while n_lines("mine/collected.jsonl") < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, b"finetuning-kit: interrupted\n")


def test_sigterm_inside_generated_code_keeps_its_exit_code():
    code = "import os\nfrom finetuning_kit.cli import told_in_sentences\nwith told_in_sentences():\n" \
           "    exec('os.kill(os.getpid(), 15); sum(range(9))')"  # at a plain Ctrl-C there, Python ends with -2
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (found.returncode, found.stderr) == (143, "finetuning-kit: interrupted\n")


def test_bad_rows_and_long_prompts_have_their_flags(typed, tmp_path):
    rows = [ROWS[0], {"colour": 3}, {"instruction": "word " * 1500, "output": "x"}, ROWS[1]]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("evaluate", "--model", "pocket", "--questions", "mixed.jsonl", "--max-new-tokens", "4")
    code, _, err = typed(*words)
    assert code == 2 and "`--on-bad skip`" in err
    code, _, err = typed(*words, "--on-bad", "skip")
    assert code == 2 and "add `--long-prompts drop`" in err
    code, out, err = typed(*words, "--on-bad", "skip", "--long-prompts", "drop")
    assert (code, err) == (0, "") and "on 2 questions" in out and "1 is not asked" in out
    assert "1 of 4 rows cannot be asked and were left out; the first is mixed.jsonl:2" in out
    code, out, _ = typed("compare", "pocket", "pocket", *words[3:], "--on-bad", "skip", "--long-prompts", "shorten")
    assert code == 0 and "1 is asked shortened" in out


@pytest.mark.parametrize("flag", ["--html", "--output", "--probe", "--base", "--questions", "--metrics"])
def test_nothing_behind_a_flag(typed, rows, flag):
    before = sorted(Path().rglob("*"))
    code, _, err = typed("evaluate", "--model", "pocket", *ASK, flag, "")
    assert (code, err) == (2, f"finetuning-kit: {flag}: there is nothing behind it; name something, or leave it out\n")
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("words", [("compare", "base", "good"),
                                   ("compare", "base", "good", "--json")])
def test_nobody_reads_on(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    kept("base", 10), kept("good", 30)
    process = start(*words)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_perplexity_by_its_name(typed, rows):
    code, out, err = typed("evaluate", "--model", "pocket", "--base", "pocket", *ASK, "--metrics", "perplexity,bpb",
                           "--output", "read")
    assert (code, err) == (0, "") and "bits per byte" in out
    assert all(each.extra["tokens_read"] > 0 for each in load_answers("read/answers.jsonl"))
    code, out, _ = typed("compare", "read", "--metrics", "ppl")
    assert code == 0 and "perplexity" in out
    code, out, _ = typed("evaluate", "--model", "pocket", *ASK, "--task", "domain")
    assert code == 0 and "perplexity" in out and "left out" not in out


def test_a_kill_loses_nothing(typed, rows):
    words = ("evaluate", "--model", "pocket", *ASK, "--batch-size", "1", "--output")
    process = start(*words, "mine")
    while process.poll() is None and n_lines("mine/collected.jsonl") < 4:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept_lines = Path("mine/collected.jsonl").read_bytes().split(b"\n")[:4]
    assert not Path("mine/answers.jsonl").exists()
    code, _, err = typed("compare", "mine", "--gate")
    assert code == 2 and "was stopped before its end; the same `finetuning-kit evaluate` line goes on with it" in err
    assert typed(*words, "mine")[0] == 0 == typed(*words, "whole")[0]
    assert Path("mine/collected.jsonl").read_bytes().split(b"\n")[:4] == kept_lines
    assert load_answers("mine/answers.jsonl") == load_answers("whole/answers.jsonl")


def test_no_room_for_answers(typed, rows):
    words = ("evaluate", "--model", "pocket", *ASK, "--batch-size", "1", "--output", "mine")
    process = start(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)))
    err = process.communicate()[1].decode()
    assert process.returncode == 2 and "no file may become so large here: `mine/collected.jsonl`" in err
    assert "ask again with the same file" in err and "Traceback" not in err
    n_kept = n_lines("mine/collected.jsonl")
    code, out, _ = typed(*words)
    assert code == 0 and f"{n_kept - 1} of 12 answers lay in `collected.jsonl`" in out
    kept("base", 10), kept("good", 30)
    process = start("compare", "base", "good", "--html", "page.html",
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)))
    err = process.communicate()[1].decode()
    assert process.returncode == 2 and "then do it again" in err and not Path("page.html").exists()


def test_two_writers(typed, rows):
    words = ("evaluate", "--model", "pocket", *ASK, "--output", "mine")
    Path("mine").mkdir()
    with HeldFile("mine/collected.jsonl"):
        Path("mine/evaluation.json").write_text(json.dumps({
            **dict.fromkeys(ASKED), "model": "pocket", "questions": "rows.jsonl", "max_new_tokens": 6}))
        code, _, err = typed(*words)
        assert code == 2 and "is being written by another process" in err
    assert typed(*words)[0] == 0


def test_a_model_without_a_template(typed, rows):
    load_model("pocket").save_pretrained("bare")
    tokenizer = load_tokenizer("pocket")
    tokenizer.chat_template = None
    tokenizer.save_pretrained("bare")
    code, _, err = typed("evaluate", "--model", "bare", *ASK)
    assert code == 2 and "no chat template" in err and "--dataset-format" in err
    code, out, _ = typed("evaluate", "--model", "bare", *ASK, "--dataset-format", "alpaca", "--limit", "2")
    assert code == 0 and "on 2 questions" in out
