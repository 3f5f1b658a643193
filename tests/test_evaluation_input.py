"""Bad input to an evaluation is refused in a sentence"""

import json

import pytest

from finetuning_kit.asking import Answer, check_prompts
from finetuning_kit.evaluation import Evaluation, compare
from finetuning_kit.gates import gate_of
from finetuning_kit.metrics import EXACT_MATCH, Exchange, Metric, row_metric
from finetuning_kit.scorecards import load_scorecard, save_scorecard, to_scorecard
from finetuning_kit.settings import FinetuningError
from finetuning_kit.side_by_side import load_answers
from finetuning_kit.verdicts import verdicts_of

ROWS = [Exchange(f"q{n}", "a b", Answer("a b", 2, True)) for n in range(6)]


@pytest.mark.parametrize("n_tokens", [0, -1, None, "4", 2.5, float("nan"), True])
def test_lengths(n_tokens):
    with pytest.raises(FinetuningError, match="max_new_tokens"):
        check_prompts([], n_tokens, 1)


@pytest.mark.parametrize("score", [lambda row: 1 / 0, lambda row: "abc", lambda row: [1, 2]])
def test_metric_that_fails(score):
    with pytest.raises(FinetuningError, match="`mine`"):
        Evaluation(ROWS, (row_metric("mine", "", score),))


@pytest.mark.parametrize("counted", [None, 3.0, [1.0] * 6, [[1.0, 1.0]]])
def test_counts_of_another_shape(counted):
    with pytest.raises(FinetuningError, match="n_counts"):
        Evaluation(ROWS, (Metric("mine", "", lambda rows: counted, needs=()),))


def test_comparisons():
    one = Evaluation(ROWS, (EXACT_MATCH,))
    found = compare(one, one)
    for call in (lambda: compare(one, None), lambda: compare(Evaluation([]), Evaluation([])),
                 lambda: compare(one, one, 0), lambda: verdicts_of(one), lambda: verdicts_of(found, alpha=0),
                 lambda: verdicts_of(found, metrics="exact_match"), lambda: gate_of(one), lambda: gate_of(found, one),
                 lambda: gate_of(found, budget="x")):
        with pytest.raises(FinetuningError):
            call()


@pytest.mark.parametrize("change", [{"lines": None}, {"lines": [3]}, {"names": None}, {"title": 3}, {"runs": [3]}])
def test_damaged_reports(tmp_path, change):
    one = Evaluation(ROWS, (EXACT_MATCH,))
    path = save_scorecard(to_scorecard(compare(one, one)), tmp_path / "card.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FinetuningError, match="damaged"):
        load_scorecard(path)


@pytest.mark.parametrize("change", [{"text": 3}, {"reference": 5}, {"prompt": None}, {"n_tokens": "x"}, {"extra": 3}])
def test_damaged_answers(tmp_path, change):
    path = tmp_path / "answers.jsonl"
    line = {"prompt": "q", "reference": "r", "text": "a", "n_tokens": 1, "stopped": True}
    path.write_text(json.dumps(line | change) + "\n")
    with pytest.raises(FinetuningError, match="answers.jsonl:1"):
        load_answers(path)
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(FinetuningError, match="UTF-8"):
        load_answers(path)
