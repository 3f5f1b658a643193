"""Every turn of a conversation, asked through `evaluate`; and each metric falls as answers are spoilt."""
import numpy as np
import pytest

from finetuning_kit.asking import Answer
from finetuning_kit.conversations import (
    CONVERSATION_FLOW, DIVERSITY, SPOILINGS, TURN_COHERENCE, every_turn, flow_faults, spoil, sum_by_conversation)
from finetuning_kit.evaluation import Evaluation, compare, evaluate
from finetuning_kit.formatting import to_messages
from finetuning_kit.loading import load_records
from finetuning_kit.metrics import Exchange, count_rows
from finetuning_kit.models import load_model, load_tokenizer
from finetuning_kit.records import Conversation

METRICS = (CONVERSATION_FLOW, TURN_COHERENCE, DIVERSITY)
MUST_FALL = {("swapped", "turn_coherence"): 0.2, ("collapsed", "turn_coherence"): 0.2, ("collapsed", "diversity"): 0.5,
             ("repeated", "turn_coherence"): 0.1, ("repeated", "conversation_flow"): 0.6,
             ("cut off", "conversation_flow"): 0.9, ("other role", "conversation_flow"): 0.9}


@pytest.fixture(scope="module")
def talks():
    "Twenty conversations of three questions."
    said = [to_messages(record) for record in load_records("pocket:test")[:60]]
    return [Conversation(sum(said[start:start + 3], [])) for start in range(0, 60, 3)]


@pytest.fixture(scope="module")
def right(talks):
    "Every answer as the reference has it."
    asked, places = every_turn(talks)
    turns = [to_messages(talk) for talk in asked]
    return [Exchange(said[-2]["content"], said[-1]["content"], Answer(said[-1]["content"], 9, True), tuple(said[:-1]),
                     place) for said, place in zip(turns, places)]


@pytest.mark.parametrize("how, name", MUST_FALL)
def test_metric_falls_when_answers_are_spoilt(right, how, name):
    good, bad = (Evaluation(rows, METRICS).scores[name] for rows in (right, spoil(right, how)))
    assert good - bad > MUST_FALL[how, name]


def test_compare_draws_an_interval_for_each(right):
    table = compare(Evaluation(spoil(right, "collapsed"), METRICS), Evaluation(right, METRICS))
    for name in ("turn_coherence", "diversity"):
        assert 0 < table.changes[name].low < table.changes[name].difference < table.changes[name].high


def test_evaluate_asks_every_turn(talks):
    tokenizer, model = load_tokenizer("pocket"), load_model("pocket")
    asked, places = every_turn(talks[:3])
    found = evaluate(model, tokenizer, asked, max_new_tokens=8, metrics=METRICS, extras=places)
    assert len(found.exchanges) == 9 and [len(each.messages) for each in found.exchanges[:3]] == [1, 3, 5]
    assert sum_by_conversation(found.counts["conversation_flow"], found.exchanges).shape == (3, 2)


def test_spoiling_is_of_a_seed_and_leaves_the_questions(right):
    for how in SPOILINGS:
        once, again = spoil(right, how, 3), spoil(right, how, 3)
        assert once == again and [each.prompt for each in once] == [each.prompt for each in right]
    assert all(each.answer.text != each.reference for each in spoil(right, "swapped"))


@pytest.mark.parametrize("texts", [[], [""] * 3, ["same"] * 3, ["\u4e2d\u6587", "\ud83d\ude00", "a\nb"]])
def test_odd_sets_are_counted_without_complaint(texts):
    rows = [Exchange(f"Q{n}", None, Answer(text, 1, True)) for n, text in enumerate(texts)]
    for metric in METRICS:
        counts = count_rows(metric, rows)
        assert counts.shape == (len(rows), 2) and np.isfinite(counts).all()
    assert all(isinstance(flow_faults(row), list) for row in rows)
