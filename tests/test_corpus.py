"""Every case of the bad-input table, sections A to D, has its outcome, through the library and the command line."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetuning_kit.config import FineTuningConfig
from finetuning_kit.decoding import check_fingerprint, file_fingerprint
from finetuning_kit.encoding import find_marks
from finetuning_kit.ledger import DataError, Ledger, RejectedRows
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.pipeline import prepare_data
from finetuning_kit.reading import pocket_data, read_rows
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tokens import encode_records
from finetuning_kit.validation import validate_dataset
from tests import corpus_columns, corpus_files, corpus_turns
from tests.corpus import jsonl

READ = corpus_files.BYTES + corpus_files.SYNTAX + corpus_columns.CASES
TURNS = {f"{case.number} {case.name}": case for case in corpus_turns.CASES}
POCKET_MODEL = pocket_data().parent.parent / "model"
CASES = READ + [case for case in corpus_turns.CASES if case.stage == "load"]
BY_NAME = {f"{case.number} {case.name}": case for case in CASES}
STOPPED = [name for name, case in BY_NAME.items() if case.outcome == "E"]
REJECTED = [name for name, case in BY_NAME.items() if case.outcome == "R"]
MIXED = [name for name, case in BY_NAME.items() if case.code == "mixed_shapes"]


def load(path, **settings):
    "The records of a file, and the ledger."
    ledger = Ledger(on_bad="skip")
    return load_records(path, ledger=ledger, **settings), ledger


def test_every_case_has_a_name_and_every_number_is_here():
    assert len(BY_NAME) == len(CASES)
    elsewhere = {28, 51}  # a file that changes, below; the suite of JSON texts, in test_reading.py
    assert {case.number for case in READ} == set(range(1, 72)) - elsewhere


@pytest.mark.parametrize("name", STOPPED)
def test_stops(name, tmp_path):
    case = BY_NAME[name]
    with pytest.raises(DataError) as caught:
        load(case.write(tmp_path))
    error = caught.value
    assert error.code == case.code and case.words in error.problem
    file, line = (error.place, None) if isinstance(error.place, str) else (error.place.file, error.place.line)
    assert (file, line) == (case.file, case.lines[0] if case.lines else None)
    assert case.column is None or error.column == case.column


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in STOPPED])
def test_goes_on(name, tmp_path):
    case = BY_NAME[name]
    records, ledger = load(case.write(tmp_path))
    assert len(records) + len(ledger.rejects) == ledger.n_rows == case.count()
    assert [(reject.code, reject.place.line) for reject in ledger.rejects] == [
        (case.code, line) for line in (case.lines if case.outcome == "R" else ())]
    assert all(case.words in reject.problem for reject in ledger.rejects)
    warnings = [code for code, notice in ledger.notices.items() if notice.kind == "warning"]
    assert warnings == ([case.code] if case.outcome == "W" else [])
    if case.outcome in "WN":
        notice = ledger.notices[case.code]
        assert notice.places[0].line == case.lines[0] and case.words in notice.message
        assert notice.kind == {"W": "warning", "N": "normalised"}[case.outcome]


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_stop_unless_they_are_skipped(name, tmp_path):
    with pytest.raises(RejectedRows, match=BY_NAME[name].code):
        load_records(BY_NAME[name].write(tmp_path))


@pytest.mark.parametrize("name", MIXED)
def test_a_mixture_is_read_where_it_is_allowed(name, tmp_path):
    records, ledger = load(BY_NAME[name].write(tmp_path), allow_mixture=True)
    assert not ledger.rejects and len(records) == BY_NAME[name].count()


def test_a_minority_far_behind_the_rows_that_decide_is_rejected_with_its_line(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 5000 + '{"text": "x"}\n')
    records, ledger = load(path)
    assert len(records) == 5000
    assert [(reject.code, reject.place.line) for reject in ledger.rejects] == [("mixed_shapes", 5001)]


def test_row_texts_are_not_quoted(tmp_path):
    for case in corpus_columns.CASES:
        if case.outcome == "R":
            _, ledger = load(case.write(tmp_path))
            assert not any("France" in str(reject) for reject in ledger.rejects)


def test_a_file_that_changes_is_told(tmp_path):
    "Case 28, to the byte: a change that keeps size and time is a change."
    path = tmp_path / "rows.jsonl"
    path.write_bytes(corpus_files.GOOD)
    seen, times = file_fingerprint(path), os.stat(path)
    check_fingerprint(path, seen)
    path.write_bytes(corpus_files.GOOD.replace(b"What is 3", b"What is 8"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match="file_changed: the file is not the one that was checked"):
        check_fingerprint(path, seen)


def test_a_file_without_permission_is_told(tmp_path):
    "Case 27, read by a user who may not; the superuser may read everything, and becomes nobody first."
    path = tmp_path / "rows.jsonl"
    path.write_bytes(corpus_files.GOOD)
    path.chmod(0)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            read_rows(path)
        except DataError as error:
            os.write(write, error.code.encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"unreadable"
    os.close(read)
    os.close(write)


# The command line.

def target(case) -> str:
    "A format that carries the rows of a case."
    raw = case.content if isinstance(case.content, bytes) else b""
    return ("preference_messages" if b'"chosen"' in raw else "feedback_messages" if b'"label"' in raw else
            "messages")


@pytest.fixture
def convert(tmp_path, typed):
    "Convert a case's file as typed; give exit code, output and errors."
    def run(case, *words):
        if not os.path.lexists(case.file):
            case.write(tmp_path)
        return typed("convert", "--dataset", case.file, "--to", target(case), "--output", "out.jsonl", *words)
    return run


def where(case) -> str:
    "How a message names the place of a case's fault."
    return ":".join(map(str, (case.file, *case.lines[:1], *([case.column] if case.column else []))))


@pytest.mark.parametrize("name", STOPPED)
def test_command_stops(name, convert, tmp_path):
    case = BY_NAME[name]
    for words in ((), ("--on-bad", "skip", "--rejects", "bad.jsonl")):
        code, out, err = convert(case, *words)
        assert (code, out) == (2, "") and f"{where(case)}: {case.code}: " in err.replace("\n", " "), err
        assert case.words in " ".join(err.split())
    assert {path.name for path in tmp_path.iterdir()} <= {case.file}


@pytest.mark.parametrize("name", REJECTED)
def test_command_rejects(name, convert, tmp_path):
    case = BY_NAME[name]
    code, out, err = convert(case)
    assert (code, out) == (2, "") and all(f"rows.jsonl:{line}: {case.code}: " in err for line in case.lines), err
    assert {path.name for path in tmp_path.iterdir()} == {case.file}
    code, out, err = convert(case, "--on-bad", "skip", "--rejects", "bad.jsonl")
    n_good = case.count() - len(case.lines)
    assert code == (0 if n_good else 2), err
    bad = [json.loads(line) for line in Path("bad.jsonl").read_text().splitlines()]
    assert [(each["file"], each["line"], each["code"]) for each in bad] == [
        (case.file, line, case.code) for line in case.lines]
    assert (len(Path("out.jsonl").read_text().splitlines()) if n_good else 0) == n_good


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in STOPPED + REJECTED])
def test_command_goes_on(name, convert):
    case = BY_NAME[name]
    code, out, err = convert(case)
    assert (code, err) == (0, ""), err
    assert len(Path("out.jsonl").read_bytes().split(b"\n")) - 1 == case.count()
    if case.outcome in "WN":
        shown = " ".join(out.split())
        assert f"{case.code}: " in shown and f"{case.file}:{case.lines[0]}" in shown


def test_a_process_ends_with_code_2_and_one_sentence(tmp_path):
    "The exit code and the streams of a real process, for one case of each kind."
    for name, code in (("33 comma at an object's end", 2), ("66 preference without rejected", 2), ("1 control", 0)):
        case = BY_NAME[name]
        case.write(tmp_path)
        done = subprocess.run(
            [sys.executable, "-m", "finetuning_kit.cli", "convert", "--dataset", case.file, "--to", target(case),
             "--output", "out.jsonl"], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
        assert (done.returncode, bool(done.stderr)) == (code, code == 2), done.stderr
        assert "Traceback" not in done.stderr


# Section D: what the check of a data set, and encoding, have to judge.

def at_stage(stage, outcomes) -> list:
    "The names of cases of section D."
    return [name for name, case in TURNS.items() if case.stage == stage and case.outcome in outcomes]


def settings_of(case, **more) -> dict:
    "The settings of a run on a case's file, without its template."
    return {"dataset_format": "chat", "split_ratio": 0, "task": "instruct",
            **{name: value for name, value in case.settings.items() if name != "template"}, **more}


def prepare(case, path, **more):
    "The rows of a case, checked and encoded as a run does it."
    tokenizer = load_tokenizer("pocket")
    tokenizer.chat_template = case.settings.get("template", tokenizer.chat_template)
    config = FineTuningConfig(model_name="pocket", dataset=str(path), **settings_of(case, **more))
    return prepare_data(config, tokenizer)


def test_section_d_is_here():
    assert len(TURNS) == len(corpus_turns.CASES)
    assert {case.number for case in corpus_turns.CASES} | {96} == set(range(72, 99))


@pytest.mark.parametrize("name", [name for name, case in TURNS.items() if case.stage != "load"])
def test_other_stages_read_all_rows(name, tmp_path):
    records, ledger = load(TURNS[name].write(tmp_path))
    assert len(records) == TURNS[name].count() and not ledger.rejects


@pytest.mark.parametrize("name", at_stage("check", "RWA"))
def test_check(name, tmp_path):
    case = TURNS[name]
    report = validate_dataset(case.write(tmp_path))
    found = {finding.code: finding for finding in report.findings if finding.code != "few_rows"}  # that is case 107
    errors = [code for code, finding in found.items() if finding.severity == "error"]
    assert errors == [case.code] * (case.outcome == "R") and report.ok == (not errors), report
    assert errors or list(found) == [case.code] * (case.outcome == "W"), report
    if case.code:
        finding = found[case.code]
        assert case.words in finding.message
        assert finding.places == [f"{case.file}:{line}" for line in case.lines]  # none: the whole set is meant


@pytest.mark.parametrize("name", at_stage("check", "R") + at_stage("encode", "R"))
def test_a_run_stops_or_leaves_the_row_out(name, tmp_path):
    case = TURNS[name]
    path = case.write(tmp_path)
    with pytest.raises(FinetuningError) as caught:
        prepare(case, path)
    assert f"{case.file}:{case.lines[0]}" in str(caught.value) and case.words in str(caught.value)
    data = prepare(case, path, on_bad="skip")
    assert [(reject.place.line, reject.code) for reject in data.ledger.rejects] == [
        (line, case.code) for line in case.lines]
    assert all(case.words in reject.problem for reject in data.ledger.rejects)
    assert len(data.train_rows) == case.count() - len(case.lines)


@pytest.mark.parametrize("name", at_stage("encode", "E"))
def test_a_run_without_rows_stops(name, tmp_path):
    case = TURNS[name]
    with pytest.raises(DataError, match=case.words) as caught:
        prepare(case, case.write(tmp_path))
    assert caught.value.code == case.code


@pytest.mark.parametrize("name", at_stage("encode", "WA"))
def test_a_run_goes_on(name, tmp_path):
    case = TURNS[name]
    data = prepare(case, case.write(tmp_path))
    assert not data.ledger.rejects
    assert any(case.words in note for note in data.notes) or case.outcome == "A"
    if case.code:
        notice = data.ledger.notices[case.code]
        assert notice.kind == "warning" and [place.line for place in notice.places] == list(case.lines)


@pytest.mark.parametrize("name", [name for name in at_stage("encode", "W") if TURNS[name].code == "control_marks"])
def test_a_spelled_token_is_text(name, tmp_path):
    "Cases 87 and 88: no control ids but the template's, and the text as it was."
    case, tokenizer = TURNS[name], load_tokenizer("pocket")
    data = prepare(case, case.write(tmp_path))
    marks = find_marks(tokenizer).known
    said = json.loads(case.content.splitlines()[-1])["messages"]
    assert {sum(id in marks for id in row.input_ids) for row in data.train_rows} == {4}
    assert all(turn["content"] in tokenizer.decode(data.train_rows[-1].input_ids) for turn in said)


def test_secrets_are_not_repeated(tmp_path, typed):
    "Case 97: what is found is masked, wherever it is told."
    for name, secret in corpus_turns.SECRETS.items():
        case = TURNS[f"97 {name}"]
        report = validate_dataset(case.write(tmp_path))
        told = [str(report), repr(report), report._repr_markdown_(), json.dumps(report.to_dict()),
                *typed("validate", "--dataset", case.file)[1:],
                *typed("validate", "--dataset", case.file, "--json")[1:]]
        inner = secret.splitlines()[len(secret.splitlines()) // 2]
        assert not any(inner[8:-4] in text for text in told)


def test_naughty_strings_come_back_equal(tmp_path, typed):
    "Case 96: whatever a text spells, it is read, written, and encoded as itself."
    texts, tokenizer = corpus_turns.NAUGHTY, load_tokenizer("pocket")
    rows = [corpus_turns.talk(corpus_turns.user(text), corpus_turns.assistant(f"Say {text} again")) for text in texts]
    Path("rows.jsonl").write_bytes(jsonl(*rows))
    assert [record.to_dict()["messages"] for record in load_records("rows.jsonl")] == [row["messages"] for row in rows]
    for name in ("out.jsonl", "out.json", "out.parquet"):
        assert typed("convert", "--dataset", "rows.jsonl", "--to", "messages", "--output", name)[0] == 0
        assert load_records(name) == load_records("rows.jsonl")
    validate_dataset("rows.jsonl")
    marks = find_marks(tokenizer).known
    for text, row in zip(texts, encode_records(tokenizer, "rows.jsonl", None)):
        assert f"Say {text} again" in tokenizer.decode(row.input_ids), text
        assert sum(id in marks for id in row.input_ids) == 4


@pytest.mark.parametrize("name", at_stage("check", "RWA") + [name for name in at_stage("load", "R")])
def test_command_validates(name, tmp_path, typed):
    case = TURNS[name]
    case.write(tmp_path)
    code, out, err = typed("validate", "--dataset", case.file)
    assert (code == 2, err) == (case.outcome == "R", "") and (code or case.outcome == "A"), err
    assert all(f"{case.file}:{line}" in " ".join(out.split()) for line in case.lines)


@pytest.fixture
def train(tmp_path, typed):
    "Train on a case's file as typed, on the pocket model with the case's template."
    def run(case, *words):
        case.write(tmp_path)
        base = "pocket"
        if "template" in case.settings:
            base = "base"
            shutil.copytree(POCKET_MODEL, base)
            Path(base, "chat_template.jinja").write_text(case.settings["template"])
        flags = [word for name, value in settings_of(case).items() for word in (f"--{name.replace('_', '-')}", value)]
        return typed("train", "--dataset", case.file, "--base-model", base, "--max-steps", 1, "--output-dir", "runs",
                     *flags, *words)
    return run


@pytest.mark.parametrize("name", [name for stage in ("load", "check", "encode") for name in at_stage(stage, "RE")])
def test_command_refuses_to_train(name, train):
    case = TURNS[name]
    code, _, err = train(case)
    told = " ".join(err.split())
    assert code == 2 and case.words in told, err
    assert all(f"{case.file}:{line}" in told for line in case.lines[:1])
    assert not Path("runs").exists()
