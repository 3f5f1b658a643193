"""The metrics give what their reference libraries give, on answers of every kind, for whole sets and for drawn ones."""
import random
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

from finetuning_kit.asking import Answer
from finetuning_kit.evaluation import Evaluation, compare
from finetuning_kit.metrics import (
    ACCURACY, BLEU, CHRF, MACRO_F1, N_COLUMNS, ROUGE_L, Exchange, bleu, chrf, count_distinct, count_rows,
    distinct_of_counts, macro_f1, ngrams, rouge, unicode_words)
from finetuning_kit.scoring import METRICS, check_metrics, metric_problems
from finetuning_kit.settings import FinetuningError

PIECES = ["the", "a", "cat", "Cat", "sat.", "on", ",", "mat!", "  ", "\n", "R2-D2", "naïve", "Straße", "東京", "は", "日本",
          "Привет", "мир", "नमस्ते", "ไทย", "🙂", "don't", "3.14", "&amp;", "<|im_end|>", "x" * 40]


ALWAYS = (  # what has a figure for any rows
    "exact_match token_f1 accuracy macro_f1 bleu chrf rouge1 rouge2 rougel stop_rate length length_ratio repetition "
    "distinct_1 distinct_2 distinct_1_row distinct_2_row perplexity bits_per_byte choice_accuracy choice_accuracy_norm")


def texts(n, most, seed):
    "Random texts of the pieces; some are empty."
    chance = random.Random(seed)
    return ["" if chance.random() < 0.05 else " ".join(chance.choices(PIECES, k=chance.randrange(most)))
            for _ in range(n)]


def rows(answers, references):
    "Exchanges of texts."
    return [Exchange("?", reference, Answer(text, len(text.split()) + 1, bool(text)))
            for text, reference in zip(answers, references)]


def figure(metric, exchanges):
    "A metric's figure over all rows."
    return float(metric.figure(count_rows(metric, exchanges).sum(0)))


@pytest.mark.parametrize("ours, options", [
    (BLEU, {}), (bleu(lowercase=True), {"lowercase": True}), (bleu("intl"), {"tokenize": "intl"}),
    (bleu("zh"), {"tokenize": "zh"}), (bleu("char"), {"tokenize": "char"}),
    (CHRF, {}), (chrf(2), {"word_order": 2}), (chrf(1, lowercase=True), {"word_order": 1, "lowercase": True})])
def test_sacrebleu_agrees(ours, options):
    from sacrebleu import metrics

    theirs = (metrics.BLEU if "bleu" in ours.name else metrics.CHRF)(**options)
    for seed in range(6):
        answers, references = texts(60, 14, seed), texts(60, 14, seed + 100)
        answers[:20] = references[:20]
        exchanges = rows(answers, references)
        for some in (slice(None), slice(0, 3), slice(30, 31), slice(7, 8)):
            expected = theirs.corpus_score(answers[some], [references[some]]).score
            assert figure(ours, exchanges[some]) == pytest.approx(expected, abs=1e-9)
    assert ours.source == f"sacrebleu {theirs.get_signature()}"


def test_drawn_sets_are_scored_as_if_they_were_sets():
    from sacrebleu import metrics

    answers, references = texts(25, 9, 1), texts(25, 9, 2)
    answers[:9] = references[:9]
    exchanges, generator = rows(answers, references), np.random.default_rng(3)
    times = generator.multinomial(25, np.full(25, 1 / 25), size=12)
    for ours, theirs in ((BLEU, metrics.BLEU()), (CHRF, metrics.CHRF())):
        drawn = ours.figure(times @ count_rows(ours, exchanges))
        for row, figures in zip(times, drawn):
            places = np.repeat(np.arange(25), row)
            expected = theirs.corpus_score([answers[n] for n in places], [[references[n] for n in places]]).score
            assert figures == pytest.approx(expected, abs=1e-9)


def test_scikit_learn_agrees_whatever_labels_a_model_invents():
    from sklearn.metrics import accuracy_score, f1_score

    chance = random.Random(0)
    for _ in range(30):
        truth = chance.choices(["cat", "dog", "very good", "bird"], [9, 3, 2, 1], k=40)
        guess = [chance.choice([label, "dog", "cat", "a whale, I think"]) for label in truth]
        exchanges = rows(guess, truth)
        assert figure(ACCURACY, exchanges) == pytest.approx(accuracy_score(truth, guess), abs=1e-12)
        expected = f1_score(truth, guess, labels=sorted(set(truth)), average="macro")
        assert figure(MACRO_F1, exchanges) == pytest.approx(expected, abs=1e-12)
        cased = rows([f"It is {text.upper()}!" for text in guess], truth)
        named = macro_f1(("cat", "dog", "very good", "bird"))
        assert figure(named, cased) == pytest.approx(expected, abs=1e-12)


def test_rouge_agrees_row_by_row():
    from rouge_score.rouge_scorer import RougeScorer

    answers, references = texts(80, 12, 5), texts(80, 12, 6)
    for kind in ("rouge1", "rouge2", "rouge3", "rougeL"):
        theirs = RougeScorer([kind])
        expected = [theirs.score(reference, answer)[kind].fmeasure for answer, reference in zip(answers, references)]
        assert rouge(kind).count(rows(answers, references))[:, 0] == pytest.approx(expected, abs=1e-12)


def test_words_of_plain_english_are_rouge_scores_words():
    from rouge_score.tokenizers import DefaultTokenizer

    theirs = DefaultTokenizer()
    for text in texts(200, 12, 7):
        plain = text.encode("ascii", "ignore").decode()
        assert unicode_words(plain) == theirs.tokenize(plain)


def test_a_sample_of_n_grams_stands_for_all():
    generator = np.random.default_rng(0)
    exchanges = rows([" ".join(f"w{n}" for n in generator.zipf(1.3, 60)) for _ in range(800)], [""] * 800)
    words = [unicode_words(each.text) for each in exchanges]
    runs = set().union(*(ngrams(each, 2) for each in words))
    assert len(runs) > 2 * N_COLUMNS
    counts = count_distinct(exchanges, 2)
    assert counts.shape[1] <= N_COLUMNS + 1
    assert distinct_of_counts(counts.sum(0)) == pytest.approx(len(runs) / sum(map(len, words)), rel=0.04)


def test_every_metric_takes_every_answer_and_gets_an_interval():
    references = [text or "yes" for text in texts(40, 9, 8)]
    extra = {"nats": 3.0, "tokens_read": 2, "bytes_read": 5, "choices": ["a", "b"], "choice_nats": [1.0, 2.0],
             "choice_tokens": [1, 1], "label": 0}
    base, tuned = ([replace(each, extra=extra) for each in rows(answers, references)]
                   for answers in (texts(40, 9, 9), references))
    metrics = [METRICS[name] for name in ALWAYS.split()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = compare(Evaluation(base, tuple(metrics)), Evaluation(tuned, tuple(metrics)), n_resamples=50)
    assert len(comparison.changes) == len(metrics)
    for name, change in comparison.changes.items():
        assert np.isfinite([change.before, change.after, change.low, change.high]).all(), name
        assert change.low <= change.high


@pytest.mark.parametrize("metric, module", [(BLEU, "sacrebleu.metrics"), (CHRF, "sacrebleu.metrics"),
                                            (ROUGE_L, "rouge_score.rouge_scorer")])
def test_a_missing_package_is_named(metric, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FinetuningError, match=r"install it with: pip install 'finetuning_kit\[eval\]'"):
        count_rows(metric, rows(["a"], ["a"]))


def test_scoring_needs_no_package_to_be_listed():
    assert all(metric.help and not metric.help.endswith(".") for metric in METRICS.values())
    heavy = "import finetuning_kit.scoring, sys; print(*({'sacrebleu', 'rouge_score', 'sklearn'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_all_that_does_not_suit_is_said_at_once():
    asked = rows([""] * 6, ["Rome", "Oslo", "Kyiv", "Bern", "Doha", "Lima"])
    with pytest.raises(FinetuningError) as caught:
        check_metrics([METRICS[name] for name in ("bleu", "macro_f1", "perplexity", "exact_match")], asked)
    lines = str(caught.value).splitlines()
    assert [line.split("`")[1] for line in lines] == ["bleu", "macro_f1", "perplexity"]
    assert metric_problems(METRICS["chrf"], asked) == []
