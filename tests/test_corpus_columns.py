"Every case of the table's section C has its outcome when it is loaded, and no other."
import pytest

from finetuning_kit.ledger import DataError, Ledger, RejectedRows
from finetuning_kit.loading import load_records
from tests.corpus_columns import CASES

BY_NAME = {f"{case.number} {case.name}": case for case in CASES}


def load(case, folder, **settings):
    "The records of a case, and the ledger."
    path = folder / "rows.jsonl"
    path.write_bytes(case.content)
    ledger = Ledger(on_bad="skip")
    return load_records(path, ledger=ledger, **settings), ledger


@pytest.mark.parametrize("name", BY_NAME)
def test_outcome(name, tmp_path):
    case, n_rows = BY_NAME[name], BY_NAME[name].content.count(b"\n")
    if case.outcome == "E":
        with pytest.raises(DataError) as caught:
            load(case, tmp_path)
        assert caught.value.code == case.code and case.words in caught.value.problem
        assert (caught.value.place.file, caught.value.place.line) == ("rows.jsonl", case.lines[0])
        return
    records, ledger = load(case, tmp_path)
    rejects = ledger.rejects
    assert len(records) + len(rejects) == ledger.n_rows == n_rows
    assert [(reject.code, reject.place.line) for reject in rejects] == [
        (case.code, line) for line in (case.lines if case.outcome == "R" else ())]
    assert all(case.words in reject.problem for reject in rejects)
    warnings = [code for code, notice in ledger.notices.items() if notice.kind == "warning"]
    assert warnings == ([case.code] if case.outcome == "W" else [])
    if case.outcome in "WN":
        notice = ledger.notices[case.code]
        assert notice.places[0].line == case.lines[0] and case.words in notice.message
        assert notice.kind == {"W": "warning", "N": "normalised"}[case.outcome]


@pytest.mark.parametrize("name", [name for name, case in BY_NAME.items() if case.outcome == "R"])
def test_rejects_stop_unless_they_are_skipped(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(BY_NAME[name].content)
    with pytest.raises(RejectedRows, match=BY_NAME[name].code):
        load_records(path)


@pytest.mark.parametrize("name", [name for name, case in BY_NAME.items() if case.code == "mixed_shapes"])
def test_a_mixture_is_read_where_it_is_allowed(name, tmp_path):
    records, ledger = load(BY_NAME[name], tmp_path, allow_mixture=True)
    assert not ledger.rejects and len(records) == BY_NAME[name].content.count(b"\n")


def test_every_number_of_the_section_is_here():
    assert {case.number for case in CASES} == set(range(52, 72))


def test_a_minority_far_behind_the_rows_that_decide_is_rejected_with_its_line(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 5000 + '{"text": "x"}\n')
    ledger = Ledger(on_bad="skip")
    assert len(load_records(path, ledger=ledger)) == 5000
    assert [(reject.code, reject.place.line) for reject in ledger.rejects] == [("mixed_shapes", 5001)]


def test_row_texts_are_not_quoted(tmp_path):
    for case in CASES:
        if case.outcome == "R":
            _, ledger = load(case, tmp_path)
            assert not any("France" in str(reject) for reject in ledger.rejects)
