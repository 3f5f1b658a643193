"""What a model expects is the same alone and in a batch, for every method, and what lm-evaluation-harness measures."""
import pytest
import torch

from finetuning_kit.evaluation import compare, evaluate
from finetuning_kit.likelihood import (
    BITS_PER_BYTE, CHOICE_ACCURACY, PERPLEXITY, Continuation, choice_accuracy, choice_exchanges, encode_continuation,
    likelihood_extras, measure_likelihoods, reference_piece, text_exchanges, text_pieces)
from finetuning_kit.loading import load_records
from finetuning_kit.metrics import EXACT_MATCH
from finetuning_kit.models import load_model, load_tokenizer
from finetuning_kit.reading import read_rows


@pytest.fixture(scope="module")
def pocket():
    "Tokenizer and model."
    return load_tokenizer("pocket"), load_model("pocket")


QUIZ = [{"prompt": f"The capital of {land} is", "choices": ["Berlin", "Kyiv", "Oslo", "a town by the name of Athens"],
         "label": label} for label, land in enumerate(("Germany", "Ukraine", "Norway", "Greece"))]


@pytest.mark.parametrize("method", ["none", "lora", "prompt", "p_tuning", "prefix"])
def test_alone_and_in_a_batch(pocket, method):
    from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    tokenizer, model = pocket[0], load_model("pocket")
    kinds = {"lora": LoraConfig(r=4, target_modules="all-linear"), "prompt": PromptTuningConfig(num_virtual_tokens=5),
             "p_tuning": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=8),
             "prefix": PrefixTuningConfig(num_virtual_tokens=5)}
    torch.manual_seed(0)
    if method != "none":
        kinds[method].task_type = "CAUSAL_LM"
        model = get_peft_model(model, kinds[method])
    pieces = [reference_piece(tokenizer, record) for record in load_records("pocket:test")[:12]]
    model.train()
    together = measure_likelihoods(model, pieces, batch_size=12)
    assert model.training
    model.eval()
    for piece, found in zip(pieces, together):
        [alone] = measure_likelihoods(model, [piece])
        assert found.nats == pytest.approx(alone.nats, abs=1e-3) and found.n_tokens == alone.n_tokens
        with torch.no_grad():
            logits = model(torch.tensor([piece.ids])).logits[0, -len(piece.ids):].log_softmax(-1)
        by_hand = -sum(logits[n - 1, piece.ids[n]].item() for n in range(piece.begin, len(piece.ids)))
        assert alone.nats == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("context", [2, 3, 7, 16, 1024])
def test_windows_measure_every_token_once_with_half_a_window_before_it(pocket, context):
    text = "The capital of Germany is Berlin. " * 7
    [whole] = text_pieces(pocket[0], text)
    pieces = text_pieces(pocket[0], text, context)
    assert [id for piece in pieces for id in piece.ids[piece.begin:]] == whole.ids[1:]
    assert all(len(piece.ids) <= context for piece in pieces)
    assert all(piece.begin >= context // 2 for piece in pieces[1:])
    assert sum(piece.n_bytes for piece in pieces) == len(text)


def test_bytes_are_bytes(pocket):
    tokenizer, model = pocket
    [exchange] = text_exchanges(model, tokenizer, ["Köln 東京"])
    assert exchange.extra["bytes_read"] == len("Köln 東京".encode()) == 12
    assert encode_continuation(tokenizer, "The city is", "Köln").n_bytes == 5


def test_extras_bring_likelihoods_into_an_evaluation(pocket):
    tokenizer, model = pocket
    records = load_records("pocket:test")[:8]
    metrics = (EXACT_MATCH, PERPLEXITY, BITS_PER_BYTE)
    evaluation = evaluate(model, tokenizer, records, max_new_tokens=2, metrics=metrics,
                          extras=likelihood_extras(model, tokenizer, records))
    assert evaluation.scores["perplexity"] > 1 and evaluation.scores["bits_per_byte"] > 0
    change = compare(evaluation, evaluation, n_resamples=20).changes["perplexity"]
    assert (change.low, change.high, change.difference) == (0, 0, 0)


def test_the_harness_agrees(pocket):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer, model = pocket
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    quiz = choice_exchanges(model, tokenizer, QUIZ, plain=True)
    asked = [(row["prompt"], " " + choice) for row in QUIZ for choice in row["choices"]]
    probe = [(row.data["prompt"], " " + row.data["completion"]) for row in read_rows("pocket:probe")[:20]]
    answers = theirs.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(asked + probe)])
    ours = [nats for each in quiz for nats in each.extra["choice_nats"]]
    assert ours == pytest.approx([-nats for nats, _ in answers[:len(asked)]], abs=1e-3)
    pieces = [encode_continuation(tokenizer, *pair) for pair in probe]
    greedy = [is_greedy for _, is_greedy in answers[len(asked):]]
    assert [each.is_greedy for each in measure_likelihoods(model, pieces)] == greedy
    fact = "The capital of Germany is Berlin."
    [rolling] = theirs.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (fact,), 0)])
    [text] = text_exchanges(model, tokenizer, [fact])
    assert text.extra["nats"] == pytest.approx(-rolling, abs=1e-3)
    assert float(CHOICE_ACCURACY.figure(CHOICE_ACCURACY.count(quiz).sum(0))) < 1  # the long choice costs too much
    assert float(choice_accuracy("byte").figure(choice_accuracy("byte").count(quiz).sum(0))) > 0


def test_a_piece_is_read_where_it_begins():
    piece = Continuation([1, 2, 3], 2)
    assert piece.ids[piece.begin:] == [3]
