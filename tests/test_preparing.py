"The names of the published interfaces, with their signatures, and what must hold for any rows."
import inspect
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finetuning_kit
from finetuning_kit.formatting import AlpacaFormatter, ChatFormatter
from finetuning_kit.ledger import RejectedRows
from finetuning_kit.loading import load_records
from finetuning_kit.preparing import (DatasetPreparer, create_chat_format, prepare_instruction_dataset,
                                      prepare_openai_jsonl)
from finetuning_kit.records import TrainingSample
from finetuning_kit.settings import FinetuningError
from finetuning_kit.splitting import prompt_key

ROWS = [{"instruction": f"What is {n} times {n + 13}?", "input": "", "output": str(n * (n + 13))} for n in range(20)]


def test_names_are_importable_at_the_top():
    for name in ("DatasetPreparer", "prepare_instruction_dataset", "create_chat_format", "prepare_openai_jsonl",
                 "TrainingSample", "AlpacaFormatter", "ChatFormatter"):
        assert getattr(finetuning_kit, name)


def test_signatures():
    assert not inspect.signature(DatasetPreparer).parameters
    assert list(inspect.signature(DatasetPreparer.prepare).parameters)[1:] == ["dataset", "formatter", "split_ratio"]
    assert inspect.signature(DatasetPreparer.prepare).parameters["split_ratio"].default == 0.1
    assert list(inspect.signature(DatasetPreparer.save_json).parameters)[1:] == ["data", "path"]
    assert next(iter(inspect.signature(prepare_instruction_dataset).parameters)) == "raw_data"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_saved_file_loads_as_the_same_rows(tmp_path, name):
    preparer = DatasetPreparer()
    assert preparer.load_json(preparer.save_json(ROWS, tmp_path / name)) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_prepare_takes_dicts_samples_and_files_alike(tmp_path):
    preparer = DatasetPreparer()
    samples = [TrainingSample(**row) for row in ROWS]
    whole = [preparer.prepare(source, AlpacaFormatter(), split_ratio=0.2)
             for source in (ROWS, samples, preparer.save_json(ROWS, tmp_path / "rows.json"))]
    assert whole[0] == whole[1] == whole[2]
    assert {name: len(side) for name, side in whole[0].items()} == {"train": 16, "validation": 4}


def test_prepare_names_a_bad_row():
    with pytest.raises(RejectedRows, match="row:3: wrong_type"):
        DatasetPreparer().prepare([*ROWS[:2], {"instruction": "a", "output": 5}])


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(str.strip)
RAW = st.fixed_dictionaries({"prompt": TEXTS, "response": TEXTS}, optional={"context": TEXTS, "system_prompt": TEXTS})


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(RAW, min_size=2, max_size=30))
def test_no_question_is_on_both_sides_and_no_row_is_lost(raw):
    try:
        split = prepare_instruction_dataset(raw)
    except FinetuningError as error:
        assert "cannot be split" in str(error)
        return
    sides = [[TrainingSample(**row) for row in split[name]] for name in ("train", "test")]
    keys = [{prompt_key(sample) for sample in side} for side in sides]
    assert not keys[0] & keys[1]
    wanted = [(row["prompt"], row.get("context", ""), row["response"],
               row.get("system_prompt", "You are a helpful assistant.")) for row in raw]
    got = [(sample.instruction, sample.input, sample.output, sample.system) for side in sides for sample in side]
    assert sorted(got) == sorted(wanted)


SAMPLES = st.builds(TrainingSample, TEXTS, st.just("") | TEXTS, TEXTS, st.none() | st.just("") | TEXTS)


@settings(max_examples=30, deadline=None)
@given(st.lists(SAMPLES, min_size=1, max_size=5))
def test_openai_file_keeps_every_text(samples):
    with tempfile.TemporaryDirectory() as folder:
        path = prepare_openai_jsonl(samples, Path(folder) / "rows.jsonl")
        rows = [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]
        assert [ChatFormatter().format_sample(sample) for sample in samples] == rows
        assert [record.messages[-1].content for record in load_records(path, "openai")] == [s.output for s in samples]
    assert all(turn["content"] for row in rows for turn in row["messages"])


def test_openai_file_stays_as_it_was_when_a_row_is_bad(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with pytest.raises(FinetuningError, match="row:2"):
        prepare_openai_jsonl([ROWS[0], {"instruction": "x"}], path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_chat_format_without_a_system_text_has_no_system_turn():
    for system in ({}, {"system": ""}, {"system": None}):
        assert [turn["role"] for turn in create_chat_format({**ROWS[0], **system})["messages"]] == ["user", "assistant"]
