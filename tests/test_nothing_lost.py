"""No conversion destroys a file: not one that it reads, under any name, nor one that was there before it failed."""
import json
import os
from pathlib import Path

import pytest

from finetuning_kit.converting import convert_dataset
from finetuning_kit.settings import FinetuningError

GOOD, BAD = '{"instruction": "a", "output": "b"}\n', '{"instruction": "a"}\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder with rows, a folder of rows, links to them, a description, and a file that is dear."
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(GOOD + BAD)
    Path("many").mkdir()
    Path("many/a.jsonl").write_text(GOOD)
    Path("many/b.jsonl").write_text(GOOD + BAD)
    os.symlink("rows.jsonl", "soft.jsonl")
    os.link("rows.jsonl", "hard.jsonl")
    Path("dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.jsonl"}}))
    Path("dear.jsonl").write_text('{"dear": 1}\n')
    return tmp_path


def contents(home) -> dict:
    "Every file with its bytes."
    return {str(path): path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}


READ = [("rows.jsonl", name) for name in ("rows.jsonl", "soft.jsonl", "hard.jsonl", "./many/../rows.jsonl")]
READ += [("many", "many/a.jsonl"), ("many", "many/b.jsonl")]


@pytest.mark.parametrize("source, other", READ)
@pytest.mark.parametrize("argument", ["output", "rejects"])
def test_a_file_that_is_read_is_not_written(home, source, other, argument):
    before = contents(home)
    paths = {"output": "out.jsonl", "rejects": "bad.jsonl", argument: other}
    with pytest.raises(FinetuningError, match="is being read"):
        convert_dataset(source, "messages", on_bad="skip", overwrite=True, **paths)
    assert contents(home) == before


def test_a_folder_around_what_is_read_is_not_replaced(home):
    convert_dataset("many", "messages", "table", on_bad="skip")
    Path("table/rows.jsonl").write_text(GOOD)
    before = contents(home)
    with pytest.raises(FinetuningError, match="is being read"):
        convert_dataset("table/rows.jsonl", "messages", "table", overwrite=True)
    assert contents(home) == before


def test_a_description_that_is_read_is_not_written(home):
    before = contents(home)
    with pytest.raises(FinetuningError, match="is being read"):
        convert_dataset("rows.jsonl", "messages", "dataset_info.json", "dataset_info.json:mine", "skip", overwrite=True)
    assert contents(home) == before


@pytest.mark.parametrize("source, settings", [
    ("missing.jsonl", {}), ("many/a.jsonl", {"to": "openai", "mapping": "nonsense"}), ("dear.jsonl", {})])
def test_earlier_rejects_stay_when_nothing_was_read(home, source, settings):
    before = contents(home)
    with pytest.raises(FinetuningError):
        convert_dataset(source, **{"to": "messages", **settings}, output="out.jsonl", rejects="dear.jsonl"
                        if source != "dear.jsonl" else "hard.jsonl", overwrite=True)
    assert contents(home) == before


def test_earlier_rejects_stay_when_no_row_is_rejected(home):
    convert_dataset("many/a.jsonl", "messages", "out.jsonl", rejects="dear.jsonl", overwrite=True)
    assert Path("dear.jsonl").read_text() == '{"dear": 1}\n'


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_rejects_are_kept_where_the_rows_were_read_to_their_end(home, on_bad):
    try:
        convert_dataset("rows.jsonl", "messages", "out.jsonl", on_bad=on_bad, rejects="bad.jsonl")
    except FinetuningError:
        assert on_bad == "stop" and not Path("out.jsonl").exists()
    assert [json.loads(line)["line"] for line in Path("bad.jsonl").read_text().splitlines()] == [2]
    assert not [path for path in home.iterdir() if path.name.startswith(".")]
