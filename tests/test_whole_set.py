"""Section E of the bad-input table: what is wrong with a set as a whole, by the library and at the command line.

Each test is named after its case. A run that is refused leaves nothing behind.
"""
import json
import os
from pathlib import Path

import pytest

from finetuning_kit.cleaning import clean
from finetuning_kit.config import FineTuningConfig
from finetuning_kit.ledger import DataError
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_tokenizer
from finetuning_kit.pipeline import prepare_data
from finetuning_kit.settings import FinetuningError
from finetuning_kit.splitting import split_rows
from finetuning_kit.validation import validate_dataset

SUMS = [{"prompt": f"What is {n} + {n}?", "completion": str(2 * n)} for n in range(120)]
WHATS = "pump engine lens clock kettle turbine brake compass lever pulley boiler dynamo piston gear valve rotor".split()
PAGES = [{"prompt": f"Explain in plain words how a {what} works and what it is made of.",
          "completion": f"A {what} has a body, and inside it parts that move. When somebody sets it going, one part "
          f"pushes the next, and number {n} of them does the work that the whole {what} is there for."}
         for n, what in enumerate(WHATS)]


def keep(name, rows) -> str:
    "Write rows as JSON Lines into the folder of the test, and return the file's name."
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def train(typed, *words):
    "Exit code, output and errors of a short run."
    return typed("train", "--base-model", "pocket", "--output-dir", "runs", "--max-steps", "2", *words)


def flat(text) -> str:
    "Text without line ends."
    return " ".join(text.split())


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    "Every test works in a folder of its own."
    monkeypatch.chdir(tmp_path)


def test_99_exact_repeats_are_counted_and_can_be_dropped(typed):
    rows = keep("rows.jsonl", SUMS + SUMS[:7])
    assert validate_dataset(rows).faults["duplicates"] == list(range(120, 127))
    code, out, _ = typed("validate", "--dataset", rows)
    assert code == 1 and "7 × duplicates" in flat(out) and "(like :1)" in flat(out) and "leave out 7 rows" in flat(out)
    assert len(clean(rows).rows) == 120


def test_100_a_row_on_both_sides_is_refused_unless_allowed(typed):
    rows, held_out = keep("rows.jsonl", SUMS), keep("test.jsonl", [*PAGES, SUMS[5]])
    report = validate_dataset(rows, held_out)
    assert report.faults["leakage"] == [5] and report.exit_code == 2
    code, _, err = train(typed, "--dataset", rows, "--eval-dataset", held_out)
    assert code == 2 and "rows.jsonl:6" in err and not Path("runs").exists()
    code, _, err = train(typed, "--dataset", rows, "--eval-dataset", held_out, "--allow-faults", "leakage")
    assert code == 0, err
    assert json.loads(Path("runs/instruct_rows/run.json").read_text())["overridden"] == {"leakage": 1}


def test_100_a_split_of_repeats_leaks_nothing():
    learned, held_out = split_rows(load_records(SUMS + SUMS[:30]), 0.2)
    assert len(held_out) >= 25 and not validate_dataset(learned, held_out).issues["leakage"]


def near(row) -> dict:
    "The same row with a word changed."
    return {**row, "prompt": row["prompt"].replace("plain", "easy")}


def test_101_near_copies_are_a_warning_and_many_of_them_an_error(typed):
    held_out = [*PAGES[:1], *({"prompt": f"Name number {n}.", "completion": f"It is {n}."} for n in range(150))]
    few = validate_dataset([*SUMS, near(PAGES[0])], held_out)
    assert few.faults["near_leakage"] == [120] and few.exit_code == 1
    many = validate_dataset([*SUMS, *map(near, PAGES)], PAGES)
    assert len(many.faults["near_leakage"]) == len(PAGES) and many.exit_code == 2
    rows, test = keep("rows.jsonl", [*SUMS, *map(near, PAGES)]), keep("test.jsonl", PAGES)
    code, _, err = train(typed, "--dataset", rows, "--eval-dataset", test)
    assert code == 2 and "16 x near_leakage" in err


def test_102_the_turns_of_one_conversation_stay_on_one_side(typed):
    talk = [{"role": role, "content": f"{role} says {n}"} for n in range(4) for role in ("user", "assistant")]
    parts = [{"messages": talk[:2 * n], "talk": 1} for n in range(1, 5)]
    others = [{"messages": [{"role": "user", "content": f"Is {n} odd?"}, {"role": "assistant", "content": str(n % 2)}],
               "talk": n} for n in range(2, 40)]
    learned, held_out = split_rows([*parts, *others], 0.5, group_by="talk")
    sides = [sum(row in side for row in parts) for side in (learned, held_out)]
    assert sorted(sides) == [0, 4]
    report = validate_dataset([parts[1], *others], [parts[3]])
    assert report.faults["leakage"] == [0] and report.exit_code == 2


def test_103_shared_words_are_told_with_their_rate(typed):
    quoting = {"prompt": "What did they ask?", "completion": f"They asked: {PAGES[3]['prompt']} And so on."}
    rows, test = keep("rows.jsonl", [*SUMS, quoting]), keep("test.jsonl", PAGES)
    report = validate_dataset(rows, benchmark=test)
    assert report.faults["contamination"] == [120] and report.exit_code == 1
    code, out, _ = typed("validate", "--dataset", rows, "--benchmark", test)
    assert code == 1 and "1 of 16 benchmark questions (6.2%)" in flat(out)
    code, out, err = train(typed, "--dataset", rows, "--eval-dataset", test)
    assert code == 0, err
    assert "1 of 16 held-out questions (6.2%) share a run of 13 words" in flat(out)
    assert "1 of 16 held-out questions (6.2%)" in Path("runs/instruct_rows/README.md").read_text()


def test_104_the_same_file_on_both_sides_is_refused_by_any_name(typed):
    rows = keep("rows.jsonl", SUMS)
    os.symlink(rows, "link.jsonl")
    os.link(rows, "twin.jsonl")
    for name in (rows, "link.jsonl", "twin.jsonl"):
        code, _, err = train(typed, "--dataset", rows, "--eval-dataset", name)
        assert code == 2 and "120 of 120 questions of the evaluation set" in err
    assert typed("validate", "--dataset", rows, "--eval-dataset", "link.jsonl")[0] == 2


def test_105_of_two_files_the_broken_one_is_named(typed):
    Path("both").mkdir()
    keep("both/a.jsonl", SUMS)
    Path("both/b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c" "completion": "d"}\n')
    with pytest.raises(DataError) as problem:
        validate_dataset("both")
    assert "b.jsonl:2" in str(problem.value)
    rows = keep("rows.jsonl", SUMS)
    for words in (("--dataset", "both"), ("--dataset", rows, "--eval-dataset", "both/b.jsonl")):
        for code, _, err in (typed("validate", *words), train(typed, *words)):
            assert code == 2 and "b.jsonl:2" in err and "rows.jsonl" not in err


def test_106_fewer_rows_than_a_batch_are_trained_on_all_the_same(typed):
    rows = keep("rows.jsonl", SUMS[:3])
    code, out, err = typed("train", "--base-model", "pocket", "--output-dir", "runs", "--dataset", rows,
                           "--split-ratio", "0", "--per-device-train-batch-size", "16", "--num-train-epochs", "1")
    assert code == 0 and "step 1 of 1" in out, err


def test_107_a_handful_of_rows_is_a_warning(typed):
    code, out, _ = typed("validate", "--dataset", keep("rows.jsonl", SUMS[:9]))
    assert code == 1 and "few_rows: 9 rows are a test of the machinery" in flat(out)
    assert validate_dataset(SUMS[:9]).issues["few_rows"] == 9 and not validate_dataset(SUMS).exit_code


def test_108_an_empty_evaluation_set_is_refused(typed):
    rows, empty = keep("rows.jsonl", SUMS), keep("empty.jsonl", [])
    for code, _, err in (typed("validate", "--dataset", rows, "--eval-dataset", empty),
                         train(typed, "--dataset", rows, "--eval-dataset", empty)):
        assert code == 2 and "empty.jsonl: empty_file" in err
    config = FineTuningConfig(model_name="pocket", split_ratio=0.1)
    with pytest.raises(FinetuningError, match="cannot be split"):
        prepare_data(config, load_tokenizer("pocket"), SUMS[:1])
