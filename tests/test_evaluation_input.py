"""Bad input to an evaluation is refused in a sentence"""

import json

import pytest

from finetuning_kit.asking import Answer, check_prompts, generate_answers
from finetuning_kit.code_tests import CodeTests, pass_at_k, read_tests, run_tests, sample_answers, with_more_answers
from finetuning_kit.collecting import collect_answers
from finetuning_kit.endpoints import Endpoint, EndpointSettings, Reply, ask_all, read_replies
from finetuning_kit.evaluation import Evaluation, compare, evaluate, paired_bootstrap, samples_table
from finetuning_kit.familiar import compare_with_base, evaluate_finetuned_model, familiar_metrics
from finetuning_kit.gates import RunNoise, ask_probe, gate_of, read_probe, run_noise
from finetuning_kit.harness import run_harness, write_task
from finetuning_kit.judging import Judge, calibrate_judge, judge_answers, judge_pairs, key_judge, win_rate
from finetuning_kit.likelihood import choice_exchanges, completions_right, likelihood_extras, text_exchanges
from finetuning_kit.metrics import EXACT_MATCH, TOKEN_F1, Exchange, Metric, rouge, row_metric
from finetuning_kit.models import load_model, load_tokenizer
from finetuning_kit.peeking import GainTest, GainWatch, row_differences
from finetuning_kit.scorecards import load_scorecard, save_scorecard, to_scorecard
from finetuning_kit.scoring import check_metrics, domain_terms, domain_vocabulary, metric_table, metrics_for
from finetuning_kit.settings import FinetuningError
from finetuning_kit.side_by_side import compare_folders, load_answers, open_work, save_answers
from finetuning_kit.verdicts import flip_test, holm, judge_change, rows_needed, score_interval, verdicts_of
from finetuning_kit.votes import Ballot, VotePair, VotingPanel, ballot_of, cast_vote, win_interval

ROWS = [Exchange(f"q{n}", "a b", Answer("a b", 2, True)) for n in range(6)]


@pytest.mark.parametrize("n_tokens", [0, -1, None, "4", 2.5, float("nan"), True])
def test_lengths(n_tokens):
    with pytest.raises(FinetuningError, match="max_new_tokens"):
        check_prompts([], n_tokens, 1)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_that_the_model_does_not_know(token):
    model, tokenizer = load_model("pocket"), load_tokenizer("pocket")
    for ask in (generate_answers, collect_answers, sample_answers):
        with pytest.raises(FinetuningError, match=rf"`prompts\[1\]` holds token {token}, and the model knows 0 to"):
            ask(model, tokenizer, [[5, 6], [5, token, 6]], max_new_tokens=2)


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


ONE = Evaluation(ROWS, (EXACT_MATCH,))
BOTH = compare(ONE, ONE, 20)
ASKED = [{"role": "user", "content": "a"}]
QUESTIONS = [{"instruction": "What is the capital of Italy?", "output": "Rome"}]


def made(figure):
    "A metric with a figure of its own."
    return Metric("mine", "", lambda rows: [[1.0, 1.0]] * len(rows), figure, needs=())


RUBBISH = {  # part of the sentence -> calls without a model
    "`exchanges`": [lambda: Evaluation(None), lambda: Evaluation([3]), lambda: check_metrics((EXACT_MATCH,), [3]),
                    lambda: metrics_for("chat", 3), lambda: save_answers("a.jsonl", [3]),
                    lambda: calibrate_judge(Judge(len), [3]), lambda: with_more_answers(None, [])],
    "`metrics`": [lambda: Evaluation(ROWS, None), lambda: Evaluation(ROWS, EXACT_MATCH),
                  lambda: check_metrics(None, ROWS), lambda: check_metrics(("exact_match",), ROWS),
                  lambda: metric_table(3), lambda: verdicts_of(BOTH, metrics=3), lambda: familiar_metrics(None),
                  lambda: compare_folders("x", metrics=("exact_match",)),
                  lambda: compare_with_base(["a"], ["a"], ["a"], metrics=3)],
    "`mine` failed": [lambda: Evaluation(ROWS, (made(lambda counts: 1 / 0),)),
                      lambda: Evaluation(ROWS, (made(lambda counts: "x"),)),
                      lambda: Evaluation(ROWS, (row_metric("mine", "", lambda row: 1 / 0),))],
    "shapes": [lambda: Evaluation(ROWS, (made(lambda counts: counts[0]),)),
               lambda: Evaluation(ROWS, (made(lambda counts: None),))],
    "`figure` must be a function": [lambda: made(3)], "`score` must be a function": [lambda: row_metric("mine", "", 3)],
    "`better` must be one of higher, lower, neither; got 'up'": [lambda: Metric("mine", "", len, better="up")],
    "`needs`": [lambda: Metric("mine", "", len, needs="reference")], "`name`": [lambda: Metric("", "", len)],
    "`seed` must be a whole number, at least 0": [
        lambda: compare(ONE, ONE, seed=-1), lambda: compare(ONE, ONE, seed="x"), lambda: Ballot([], seed=[]),
        lambda: calibrate_judge(Judge(len), ROWS, seed=-1), lambda: paired_bootstrap([1], [1], seed=-1)],
    "`n` must be a whole number, at least 0": [lambda: BOTH.samples(-1), lambda: BOTH.samples("x")],
    "`n_resamples`": [lambda: compare(ONE, ONE, True), lambda: paired_bootstrap([1], [1], 0)],
    "`n_draws`": [lambda: judge_change(ONE, ONE, EXACT_MATCH, n_draws=0)], "`n_rows`": [lambda: flip_test([])],
    "`after` must be a list": [lambda: paired_bootstrap([1], ["x"])], "`samples`": [lambda: samples_table([{}])],
    "`group`": [lambda: verdicts_of(BOTH, group=3), lambda: gate_of(BOTH, group=3),
                lambda: verdicts_of(BOTH, group=[[1]] * 6)],
    "`alpha` must be a number between 0 and 1": [
        lambda: verdicts_of(BOTH, alpha=1), lambda: gate_of(BOTH, alpha="x"), lambda: GainTest(3, alpha=0),
        lambda: rows_needed(1.0, 1.0, alpha=0)],
    "`confidence`": [lambda: win_interval(1, 1, 2), lambda: score_interval(1, 1, 4, 1)],
    "`correction` must be one of holm, none": [lambda: verdicts_of(BOTH, correction=[])],
    "there is no verdict on 'nope'; judged were exact_match": [lambda: verdicts_of(BOTH)["nope"]],
    "there is no verdict on 3": [lambda: verdicts_of(BOTH)[3]], "`p_values`": [lambda: holm(["x"])],
    "`metric` must be a metric": [lambda: judge_change(ONE, ONE, "exact_match"), lambda: row_differences("x", [], [])],
    "`metric` token_f1 was not measured": [lambda: judge_change(ONE, ONE, TOKEN_F1)],
    "`repeats`": [lambda: run_noise(None), lambda: run_noise(ONE, ONE), lambda: run_noise([ONE, 3])],
    "got 0; train again": [lambda: run_noise()], "`n_runs` must be 2 or more": [lambda: RunNoise({}, 1, "x")],
    "`noise` must be what `run_noise` gives or None; got 'x'": [lambda: gate_of(BOTH, noise="x")],
    "`budget`": [lambda: gate_of(BOTH, budget=True), lambda: gate_of(BOTH, budget=float("nan"))],
    "": [lambda: read_probe(None), lambda: read_probe(3), lambda: read_probe([3]), lambda: read_probe({}),
         lambda: read_probe("nowhere"), lambda: read_probe("")],
    "`n_looks`": [lambda: GainTest("x")], "`wanted`": [lambda: GainTest(3, wanted=2)],
    "`differences`": [lambda: GainTest(3).add(["x"]), lambda: GainTest(3).add(None)],
    "`before` and `after`": [lambda: row_differences(EXACT_MATCH, [1], [1, 2])],
    "`base_predictions`": [lambda: compare_with_base(["a"], ["a"], 3)],
    "`found` must be what `compare` gives or what `evaluate` gives; got None": [lambda: to_scorecard(None)],
    "`names`": [lambda: to_scorecard(BOTH, names=3), lambda: to_scorecard(BOTH, names="ab"),
                lambda: Ballot([], names=("a",))],
    "`notes`": [lambda: to_scorecard(BOTH, notes="x")], "`card`": [lambda: save_scorecard(None, "a.json")],
    "`path`": [lambda: save_scorecard(to_scorecard(BOTH), None), lambda: load_answers(None), lambda: read_replies(3),
               lambda: save_answers("", ROWS), lambda: Ballot([], path=3), lambda: read_replies(".")],
    "is no file": [lambda: load_answers("nowhere"), lambda: load_answers(".")],
    "`folder` must be the path": [lambda: open_work(None), lambda: write_task(3, "t", [])],
    "`first` must be the path": [lambda: compare_folders(None), lambda: compare_folders(3, 4)],
    "there is no task": [lambda: metrics_for([]), lambda: metrics_for({})],
    "`texts`": [lambda: domain_terms([3], [4])], "`terms`": [lambda: domain_vocabulary("term")],
    "`kind`": [lambda: rouge(3)], "`pairs`": [lambda: Ballot([3])],
    "`comparison` must be what `compare` gives; got ": [lambda: ballot_of(ONE), lambda: verdicts_of(None)],
    "`ballot`": [lambda: cast_vote(None, "left"), lambda: VotingPanel(None)], "`wins`": [lambda: win_interval(-1, 2)],
    "`rows`": [lambda: write_task(".", "t", [3])], "`settings`": [lambda: Endpoint(None)],
    "is no address": [lambda: Endpoint(EndpointSettings(base_url="http://[x", model="m"))],
    "`ask` must be a function": [lambda: ask_all(None, [ASKED]), lambda: judge_answers(Judge(3), ["a"], ["b"])],
    "`prompts": [lambda: ask_all(len, [3]), lambda: ask_all(len, [[{}]])],
    "`reply`": [lambda: ask_all(lambda asked: "x", [ASKED])],
    "`on_progress`": [lambda: ask_all(lambda asked: Reply("x"), [ASKED], on_progress=3)],
    "`judge`": [lambda: judge_pairs(None, ["a"], ["b"], ["c"]), lambda: win_rate(None)],
    "`key`": [lambda: key_judge(3)],
    "`k`": [lambda: pass_at_k(None)], "`limits`": [lambda: pass_at_k(1, 3, True)], "`row`": [lambda: read_tests(None)],
    "needs its tests": [lambda: read_tests({"tests": 3})],
    "`tests`": [lambda: run_tests("x", 3, allow_running_code=True)],
    "`code`": [lambda: run_tests(3, CodeTests(("assert 1",)), allow_running_code=True)],
}


@pytest.mark.parametrize("sentence", RUBBISH)
def test_rubbish_is_told(sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in RUBBISH[sentence]:
        with pytest.raises(FinetuningError) as told:
            call()
        assert sentence in str(told.value)


def test_rubbish_beside_a_model_is_told_before_it_is_asked(tmp_path):
    model, tokenizer = load_model("pocket"), load_tokenizer("pocket")
    asked = (model, tokenizer, QUESTIONS)
    calls = {
        "`keep_in`": [lambda: evaluate(*asked, keep_in=3), lambda: evaluate_finetuned_model(*asked, keep_in=3),
                      lambda: collect_answers(model, tokenizer, [[1]], keep_in=3)],
        "`on_progress`": [lambda: evaluate(*asked, on_progress=3),
                          lambda: text_exchanges(*asked[:2], ["a"], 8, None, 3),
                          lambda: evaluate_finetuned_model(*asked, on_progress=3)],
        "`on_note`": [lambda: evaluate(*asked, on_note=3)],
        "`mine` failed": [lambda: evaluate(*asked, metrics=(row_metric("mine", "", lambda each: 1 / 0),)),
                          lambda: evaluate(*asked, metrics=(made(lambda counts: 1 / 0),))],
        "`prompts": [lambda: generate_answers(*asked[:2], 3), lambda: generate_answers(*asked[:2], [["x"]]),
                     lambda: sample_answers(*asked[:2], [[]])],
        "`model`": [lambda: ask_probe(None, tokenizer, [{"prompt": "a", "completion": "b"}]),
                    lambda: run_harness(None, tokenizer, ["x"])],
        "`rows`": [lambda: completions_right(*asked[:2], [3]), lambda: choice_exchanges(*asked[:2], [3])],
        "`batch_size`": [lambda: ask_probe(*asked[:2], [{"prompt": "a", "completion": "b"}], "x")],
        "`completion`": [lambda: ask_probe(*asked[:2], [{"prompt": "a", "completion": 3}])],
        "`texts`": [lambda: text_exchanges(*asked[:2], "abc")], "`records`": [lambda: likelihood_extras(*asked[:2], 3)],
        "`ends`": [lambda: GainWatch(tokenizer, QUESTIONS, ends="better")],
        "`extras`": [lambda: GainWatch(tokenizer, QUESTIONS, extras=[{}, {}])],
        "`asking`": [lambda: GainWatch(tokenizer, QUESTIONS, keep_in="x")],
        "`limit`": [lambda: run_harness(*asked[:2], ["x"], limit="x")],
        "`temperature`": [lambda: sample_answers(*asked[:2], [[1]], temperature=None)]}
    for sentence, some in calls.items():
        for call in some:
            with pytest.raises(FinetuningError) as told:
                call()
            assert sentence in str(told.value)


def test_files_of_votes_that_cannot_be_read_or_written(tmp_path):
    pairs = [VotePair(f"q{n}", ("a", "b")) for n in range(3)]
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b'\xff\xfe\n{"key": {}, "winner": "first"}\n[1]\nnull\n{"key": "' + pairs[0].key.encode()
                     + b'", "winner": "first"}\n{"key": "')
    ballot = Ballot(pairs, path=torn)
    assert ballot.counts == (0, 1, 0)
    cast_vote(ballot, "tie")
    assert Ballot(pairs, path=torn).counts == (0, 1, 1)
    for path in (tmp_path, torn / "x", "/proc/votes.jsonl"):
        with pytest.raises(FinetuningError, match="cannot keep votes"):
            cast_vote(Ballot(pairs, path=path), "left")
