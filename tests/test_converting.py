"What is written in any format reads back as the same record, and what a format cannot carry is refused by name."
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning_kit.rewriting import CARRIES, canonical, needs_of, render_row
from finetuning_kit.ledger import DataError
from finetuning_kit.loading import to_record
from finetuning_kit.mappings import mapping_of
from finetuning_kit.records import Document, Feedback, Place, PreferencePair, Row, TrainingSample
from finetuning_kit.shapes import FORMATS
from tests import strategies

ANSWERS = [name for name, each in FORMATS.items() if each.record not in (PreferencePair, Feedback, Document)]
KINDS = {"pairs": [name for name, each in FORMATS.items() if each.record is PreferencePair],
         "verdicts": [name for name, each in FORMATS.items() if each.record is Feedback],
         "documents": [name for name, each in FORMATS.items() if each.record is Document], "answers": ANSWERS}
MAKERS = {"pairs": strategies.pairs(), "verdicts": strategies.feedbacks(), "documents": strategies.documents,
          "answers": strategies.samples | strategies.conversations}
SIMPLEST = {"pairs": PreferencePair("Hi", "Hello", "No"), "verdicts": Feedback("Hi", "Hello", True),
            "documents": Document("Paris."), "answers": TrainingSample("Hi", output="Hello")}
PAIRS = [(kind, one, other) for kind, names in KINDS.items() for one in names for other in names]


def read(row, name):
    "The record of a row, after a journey through JSON."
    return to_record(Row(json.loads(json.dumps(row)), Place("row", 1)), mapping_of(name))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_format_carries_a_record_or_refuses_it_by_name(kind, data):
    record = data.draw(MAKERS[kind])
    n_carried = 0
    for name in FORMATS:
        if needs_of(record) <= CARRIES[name]:
            row = render_row(record, name)
            assert canonical(read(row, name)) == canonical(record), (name, row)
            n_carried += 1
        else:
            with pytest.raises(DataError, match=f"not_carried: `{name}` cannot carry "):
                render_row(record, name)
    assert n_carried or record.__class__.__name__ != "TrainingSample"


def there_and_back(record, one, other):
    "A record as a row of one format, read, written in the other, read, and written in the first again."
    first = read(render_row(record, one), one)
    second = read(render_row(first, other), other)
    return first, second, read(render_row(second, one), one)


@pytest.mark.parametrize("kind, one, other", PAIRS, ids=lambda value: value)
def test_every_pair_of_formats_carries_the_simplest_record(kind, one, other):
    assert {*map(str, map(canonical, there_and_back(SIMPLEST[kind], one, other)))} == {str(canonical(SIMPLEST[kind]))}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_records_survive_every_pair_of_formats_that_carries_them(kind, data):
    record = data.draw(MAKERS[kind])
    able = [name for name in FORMATS if needs_of(record) <= CARRIES[name]]
    for one in able:
        for other in able:
            seen = [canonical(each) == canonical(record) for each in there_and_back(record, one, other)]
            assert all(seen), (one, other)


def test_tools_and_thoughts_are_carried_by_many():
    rich = [name for name in FORMATS if {"an answer to learn", "tool calls", "thinking"} <= CARRIES[name]]
    assert {"messages", "trl_conversational_language_modeling"} <= {*rich}
    assert "sharegpt" in [name for name in FORMATS if {"tool calls", "tools on offer"} <= CARRIES[name]]
