"""Verdicts keep their word: thousands of runs that gain nothing, runs that do, and runs that are looked at."""
import math
import tempfile

import numpy as np
import pytest

from finetuning_kit.asking import Answer
from finetuning_kit.evaluation import Evaluation, compare
from finetuning_kit.gates import KNOWLEDGE, RunNoise, clear_bar, gate_of
from finetuning_kit.loading import load_records
from finetuning_kit.metrics import EXACT_MATCH, Exchange, Metric, row_metric
from finetuning_kit.models import load_tokenizer
from finetuning_kit.peeking import GainTest, GainWatch, bet_on_gains, evidence_of
from finetuning_kit.profiles import demo_config
from finetuning_kit.tokens import encode_records
from finetuning_kit.training import train
from finetuning_kit.verdicts import (
    flip_interval, flip_test, holm, judge_change, mcnemar, paired_effects, rows_needed, score_interval, verdicts_of)

RUNS, SIZES = 1000, (20, 100, 450)


def right_or_wrong(n_rows, gain=0.0, changed=0.3, seed=0):
    "Differences of 0/1 scores, [RUNS, n_rows]."
    shares = [(changed - gain) / 2, 1 - changed, (changed + gain) / 2]
    return np.random.default_rng([seed, n_rows]).choice([-1.0, 0.0, 1.0], (RUNS, n_rows), p=shares)


def like_f1(n_rows, gain=0.0, seed=0):
    "Differences of scores between 0 and 1, many of them at the ends."
    generator = np.random.default_rng([seed, n_rows])
    one, other = generator.beta(0.4, 0.6, (2, RUNS, n_rows))
    moved = np.where(generator.random((RUNS, n_rows)) < 0.4, other, one)
    return np.clip(moved + gain, 0, 1) - one


def bleu_figure(sums):
    "BLEU of up to four words from matches, totals and lengths, [..., 10] -> [...]; 0 where nothing matches."
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.log(sums[..., :4] / sums[..., 4:8]).mean(-1)
        return np.exp(precision + np.minimum(0, 1 - sums[..., 9] / sums[..., 8]))


BLEU_4 = Metric("bleu_4", "made up", lambda exchanges: np.zeros((len(exchanges), 10)), bleu_figure)


def like_bleu(n_rows, gain=0.0, seed=0):
    "Effects of BLEU's counts: lengths, and matches of one to four words."
    generator = np.random.default_rng([seed, n_rows])
    n_words, skill = generator.integers(8, 30, (RUNS, n_rows)), generator.beta(8, 4, (RUNS, n_rows))

    def write(more):
        matches, totals, left = [], [], n_words
        for order in range(4):
            totals.append(np.maximum(n_words - order, 0))
            left = generator.binomial(np.minimum(left, totals[-1]), np.minimum(skill + more, 1))
            matches.append(left)
        return np.stack([*matches, *totals, n_words, n_words], -1).astype(float)
    return paired_effects(BLEU_4, write(0.0), write(gain))


SCORES = {"0/1": right_or_wrong, "F1": like_f1, "BLEU": like_bleu}


def says_better(effects):
    return float(((flip_test(effects, 2000) <= 0.05) & (effects.mean(-1) > 0)).mean())


# --- levels ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_rows", SIZES)
@pytest.mark.parametrize("kind", SCORES)
def test_equal_models_are_called_better_in_five_per_cent_or_fewer(kind, n_rows):
    effects = SCORES[kind](n_rows)
    low, high = flip_interval(effects, n_draws=2000)
    assert says_better(effects) <= 0.05
    assert ((low > 0) | (high < 0)).mean() <= 0.07, "two-sided"


@pytest.mark.parametrize("n_rows", SIZES)
def test_the_exact_test_of_right_and_wrong_keeps_its_level(n_rows):
    effects = right_or_wrong(n_rows, seed=1)
    won, lost = (effects > 0).sum(1), (effects < 0).sum(1)
    assert np.mean([mcnemar(w, n) <= 0.05 and w > n for w, n in zip(won, lost)]) <= 0.05


def test_several_metrics_together_keep_the_level():
    p_values = np.stack([flip_test(right_or_wrong(100, seed=seed), 1000) for seed in (2, 3, 4, 5)], 1)
    assert np.mean([min(holm(list(row))) <= 0.05 for row in p_values]) <= 0.06
    assert np.mean(p_values.min(1) <= 0.05) > 0.1, "without a correction"


def test_groups_keep_the_level_where_rows_do_not():
    generator = np.random.default_rng(0)
    rows = np.repeat(generator.normal(0, 0.3, (RUNS, 30)), 8, axis=1) + generator.normal(0, 0.3, (RUNS, 240))
    assert says_better(rows) > 0.1
    assert says_better(rows.reshape(RUNS, 30, 8).mean(-1)) <= 0.05


# --- power ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gain", (0.05, 0.1, 0.2))
def test_as_many_rows_as_were_named_find_the_gain_four_times_in_five(gain):
    n_rows = rows_needed(math.sqrt(0.3 - gain ** 2), gain, step=1.0)
    assert 0.75 <= says_better(right_or_wrong(n_rows, gain)) <= 0.88


def test_the_rows_of_an_open_verdict_would_tell():
    seen = right_or_wrong(100, 0.08, seed=9)[3]
    n_rows = rows_needed(seen.std(ddof=1), seen.mean(), step=1.0)
    drawn = np.random.default_rng(1).choice(seen, (RUNS, n_rows))
    assert 0.72 <= says_better(drawn) <= 0.9


def test_power_grows_with_the_rows_and_the_gain():
    for kind in SCORES:
        found = [[says_better(SCORES[kind](n_rows, gain)[:300]) for n_rows in SIZES] for gain in (0.03, 0.12)]
        assert found[1] == sorted(found[1]) and found[1][2] > 0.95, (kind, found)
        assert all(few <= many for few, many in zip(*found)), (kind, found)


# --- one verdict ----------------------------------------------------------------------------------------------------
def answered(values, metric=EXACT_MATCH):
    "An evaluation whose rows are right (1) or wrong (0)."
    rows = [Exchange(f"q{row}", "yes", Answer("yes" if value else "no", 1, True)) for row, value in enumerate(values)]
    return Evaluation(rows, (metric,))


def test_a_verdict_is_what_the_simulation_tested():
    for effects in right_or_wrong(60, 0.1, seed=7)[:25]:
        base, tuned = answered(effects < 0), answered(effects > 0)
        found = judge_change(base, tuned, EXACT_MATCH)
        won, lost = int((effects > 0).sum()), int((effects < 0).sum())
        assert found.p == mcnemar(won, lost) and math.isclose(found.difference, effects.mean(), abs_tol=1e-12)
        assert (found.verdict == "better") == (mcnemar(won, lost) <= 0.05 and won > lost)
        assert (found.low > 0) == (found.verdict == "better") and (found.high < 0) == (found.verdict == "worse")
        assert abs(found.p - float(flip_test(effects))) < 0.04, "drawn twice, from both sides"


@pytest.mark.parametrize("n_rows", (1, 2, 5))
def test_few_rows_tell_nothing_and_say_so(n_rows):
    found = verdicts_of(compare(answered([0] * n_rows), answered([1] * n_rows))).verdicts[0]
    assert found.verdict == "cannot tell" and found.notes and found.low <= 0 and found.high == 1
    whole = judge_change(*(Evaluation(answered([0] * n_rows).exchanges, (row_metric("half", "", lambda e: v),))
                           for v in (0.25, 0.75)), row_metric("half", "", lambda e: 0.0))
    assert (whole.verdict, whole.low, whole.high) == ("cannot tell", -1.0, 1.0)


def test_the_order_of_rows_changes_nothing():
    effects, order = right_or_wrong(50, 0.1)[0], np.random.default_rng(0).permutation(50)
    one = judge_change(answered(effects < 0), answered(effects > 0), EXACT_MATCH)
    two = judge_change(answered(effects[order] < 0), answered(effects[order] > 0), EXACT_MATCH)
    assert (one.p, one.verdict, one.n_needed) == (two.p, two.verdict, two.n_needed)


def test_sacrebleu_finds_the_same_p():
    pytest.importorskip("sacrebleu")
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    generator, words = np.random.default_rng(3), [f"w{k}" for k in range(40)]
    wanted = [list(generator.choice(words, generator.integers(8, 20))) for _ in range(150)]
    texts = [[" ".join(str(generator.choice(words)) if generator.random() < share else str(word) for word in line)
              for line in wanted] for share in (0.24, 0.2)]
    references = [[" ".join(map(str, line)) for line in wanted]]
    bleu = BLEU(smooth_method="none")
    # sacrebleu's statistics of a sentence: length, reference's length, four matches, four totals
    counts = [np.array(bleu._extract_corpus_statistics(text, references), float) for text in texts]
    counts = [each[:, [*range(2, 10), 0, 1]] for each in counts]
    effects = paired_effects(BLEU_4, *counts)
    theirs = bleu.corpus_score(texts[1], references).score - bleu.corpus_score(texts[0], references).score
    assert math.isclose(100 * effects.mean(), theirs, abs_tol=1e-6)
    tested = PairedTest([("a", texts[0]), ("b", texts[1])], {"BLEU": BLEU(smooth_method="none", references=references)},
                        None, test_type="ar", n_samples=4000)()[1]["BLEU"][1]
    assert abs(tested.p_value - float(flip_test(effects))) < 0.02, (tested.p_value, float(flip_test(effects)))


# --- gates ----------------------------------------------------------------------------------------------------------
def probed(right):
    return Evaluation([Exchange(f"r{row}", "", Answer("", 0, True), extra={"right": bool(value)})
                       for row, value in enumerate(right)], (KNOWLEDGE,))


def test_a_model_that_loses_its_whole_budget_passes_seldom():
    for n_rows, budget in ((100, 0.05), (450, 0.02), (1000, 0.02)):
        generator = np.random.default_rng(n_rows)
        lost, won = generator.multinomial(n_rows, [0.04 + budget / 2, 0.04 - budget / 2, 0.92], RUNS)[:, :2].T
        passed = [clear_bar(*score_interval(w, n, n_rows), -budget) == "passed" for w, n in zip(won, lost)]
        assert np.mean(passed) <= 0.05, (n_rows, budget)


def test_gates_open_close_and_abstain():
    task = compare(answered([0] * 60 + [1] * 40), answered([0] * 40 + [1] * 60))
    same, half = probed([1] * 300), probed([1] * 150 + [0] * 150)
    steady, wild = (RunNoise({"exact_match": s, "knowledge": s}, 5, "five runs") for s in (0.001, 0.2))
    assert [gate_of(task, compare(same, each), 0.02, steady).exit_code for each in (same, half)] == [0, 1]
    assert gate_of(task, compare(same, same), 0.02, wild).exit_code == 3
    assert gate_of(task, compare(same, same), 0.01).exit_code == 3, "300 rows cannot exclude a loss of one point"
    assert gate_of(compare(task.tuned, task.base)).exit_code == 1
    told = gate_of(task, compare(same, same), 0.02)
    assert any("noise between runs was not measured" in reason for reason in told.reasons)


# --- peeking --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_looks, n_rows", ((15, 30), (50, 9), (5, 90)))
@pytest.mark.parametrize("wanted", (0.0, 0.2))
def test_peeking_at_every_evaluation_calls_no_gain_better_in_five_per_cent_or_fewer(n_looks, n_rows, wanted):
    changed = 0.4
    shares = [(changed - wanted) / 2, 1 - changed, (changed + wanted) / 2]
    runs = np.random.default_rng(n_looks).choice([-1.0, 0.0, 1.0], (RUNS, n_looks, n_rows), p=shares)
    assert (evidence_of(bet_on_gains(runs, wanted)) >= 20).any(1).mean() <= 0.05
    hopeless = np.exp(bet_on_gains(-runs, -wanted)[:, n_looks // 2:].cumsum(1)).mean(-1)
    assert (hopeless >= 20).any(1).mean() <= 0.05


def test_a_naive_peeker_errs_and_a_gain_is_found():
    runs = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (RUNS, 20, 300), p=[0.15, 0.7, 0.15])
    naive = (runs.mean(-1) > 1.96 * runs.std(-1) / math.sqrt(300)).any(1).mean()
    gains = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], (RUNS, 15, 30), p=[0.05, 0.7, 0.25])
    found = evidence_of(bet_on_gains(gains)) >= 20
    assert naive > 0.2 and found.any(1).mean() > 0.99 and (found.argmax(1) + 1).mean() < 5


def test_a_test_in_words_is_the_test_of_the_simulation():
    batches = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], (6, 20), p=[0.1, 0.5, 0.4])
    test = GainTest(6, wanted=0.1)
    looks = [test.add(batch) for batch in batches]
    evidence = np.maximum.accumulate(evidence_of(bet_on_gains(batches, 0.1)))
    assert np.allclose([look.better for look in looks], evidence)
    assert [look.verdict == "better" for look in looks] == list(evidence >= 20)
    assert all(look.low <= 0.31 for look in looks) and looks[-1].low <= looks[-1].high


@pytest.fixture(scope="module")
def parts():
    tokenizer = load_tokenizer("pocket")
    rows = encode_records(tokenizer, load_records("pocket")[:320], max_length=128).rows
    return tokenizer, rows, rows[:8], load_records("pocket:test")


def watched_run(parts, folder, resume=None, should_stop=None, **options):
    tokenizer, rows, held_out, questions = parts
    config = demo_config(**{"training.max_steps": 8, "training.eval_steps": 2, "training.save_steps": 2,
                            "output_dir": folder})
    stops = row_metric("ended", "answers that end", lambda each: float(each.answer.stopped), needs=())
    watch = GainWatch(tokenizer, questions[:48], metric=stops, max_new_tokens=6, **options)
    return train(config, rows, held_out, tokenizer=tokenizer, callbacks=[watch], resume=resume,
                 should_stop=should_stop), watch


def test_a_run_that_is_resumed_has_seen_what_it_saw(parts):
    folder = tempfile.mkdtemp()
    whole, whole_watch = watched_run(parts, tempfile.mkdtemp(), ends=())
    steps = iter(range(1, 9))
    watched_run(parts, folder, ends=(), should_stop=lambda: next(steps) == 5)
    run, watch = watched_run(parts, folder, resume="auto", ends=())
    assert run.status == whole.status == "finished" and len(watch.looks) == 4
    assert [look.gain for look in watch.looks] == [look.gain for look in whole_watch.looks]
    assert [entry["step"] for entry in run.history if "look" in entry] == [2, 4, 6, 8]


def test_a_hopeless_run_ends_and_has_nothing_left_to_do(parts):
    folder = tempfile.mkdtemp()
    run, _ = watched_run(parts, folder, wanted=0.98)
    assert run.status == "finished" and run.ended.startswith("stopped early: hopeless") and run.n_steps == 6
    again, _ = watched_run(parts, folder, wanted=0.98, resume="auto")
    assert (again.status, again.n_steps, again.ended) == ("finished", 6, run.ended)
