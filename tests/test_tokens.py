"""From records to ids and labels: every token accounted for, the fast way equal to the slow one, the cache never "
"stale."""
import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning_kit.answers import find_answers
from finetuning_kit.encoding import label_all
from finetuning_kit.formatting import AlpacaFormatter, to_messages, tools_of
from finetuning_kit.ledger import Ledger
from finetuning_kit.lengths import POLICIES_OVER
from finetuning_kit.models import load_tokenizer
from finetuning_kit.outlines import encode_by_outlines
from finetuning_kit.records import Conversation, Document, Message, TrainingSample
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tokens import cache_key, encode_batch, encode_records, to_dataset
from tests.strategies import texts
from tests.templates import byte_tokenizer

QUICK = settings(max_examples=60, deadline=None)
POCKET = load_tokenizer("pocket")
words = texts | st.sampled_from((" ", "", "</think>", "a" * 400, "<|im_start|>user", " x ", "\n\n"))
samples = st.builds(TrainingSample, words, words, words, st.none() | words)
talks = st.lists(st.tuples(words, words), min_size=1, max_size=3).map(lambda pairs: Conversation(
    [Message(*turn) for asked, said in pairs for turn in (("user", asked), ("assistant", said))]))
documents = texts.map(Document)
records = st.lists(samples | talks | documents, min_size=1, max_size=8)


@QUICK
@given(records, st.integers(12, 90), st.sampled_from(POLICIES_OVER), st.sampled_from(("answers", "last_answer", "all")))
def test_every_row_and_token_is_accounted_for(rows, limit, policy, learn):
    ledger = Ledger(on_bad="skip")
    try:
        found = encode_records(POCKET, rows, limit, over_length=policy, learn=learn, ledger=ledger)
    except FinetuningError as problem:
        assert "longer than `max_seq_length`" in str(problem)
        return
    ledger.check()
    assert ledger.n_rows == len(rows)
    assert all(row.n_tokens <= limit and len(row.labels) == row.n_tokens for row in found)
    assert all(any(label != -100 for label in row.labels[1:]) for row in found)
    assert all(label in (-100, id) for row in found for id, label in zip(row.input_ids, row.labels))
    if policy != "split":  # a split repeats a token at each seam
        assert ledger.tokens["trained"] == found.n_tokens


@QUICK
@given(records, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing_but_the_order(rows, draw):
    order = draw.sample(range(len(rows)), len(rows))
    one, other = encode_batch(POCKET, rows), encode_batch(POCKET, [rows[n] for n in order])
    assert [str(one[n]) for n in order] == [str(row) for row in other]


@QUICK
@given(st.lists(samples, min_size=1, max_size=8))
def test_skipping_bad_rows_is_the_same_as_not_having_them(rows):
    ledger = Ledger(on_bad="skip")
    kept = encode_records(POCKET, rows, None, ledger=ledger).rows
    bad = {reject.place.line for reject in ledger.rejects}
    good = [row for n, row in enumerate(rows, 1) if n not in bad]
    assert len(kept) == len(good)
    if good:
        clean = Ledger()
        again = encode_records(POCKET, good, None, ledger=clean).rows
        clean.settle()
        assert [(row.input_ids, row.labels) for row in kept] == [(row.input_ids, row.labels) for row in again]


@pytest.mark.parametrize("name", ["pocket", "qwen3", "llama3_1", "gemma3", "deepseekv3", "gptoss", "phi3"])
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(samples | talks, min_size=1, max_size=6), learn=st.sampled_from(("answers", "last_answer", "all")))
def test_rows_from_outlines_are_rows_from_the_template(name, rows, learn):
    tokenizer = POCKET if name == "pocket" else byte_tokenizer(name)
    for record, row in zip(rows, encode_by_outlines(tokenizer, rows, learn)):
        if row is not None:
            [slow] = label_all(tokenizer, [find_answers(tokenizer, to_messages(record), learn, tools_of(record))],
            limit=1)
            assert (row.input_ids, row.labels, row.weights) == (slow.input_ids, slow.labels, slow.weights)


def test_outlines_are_used_for_everyday_rows():
    rows = [TrainingSample(f"Question {n}?", "", f"Answer {n}.") for n in range(50)]
    for name in ("qwen3", "llama3_1", "gemma3"):
        assert all(encode_by_outlines(byte_tokenizer(name), rows))


@QUICK
@given(st.lists(talks, min_size=1, max_size=5), st.integers(20, 60))
def test_a_shortened_prompt_keeps_its_answers(rows, limit):
    whole = [row for row in encode_batch(POCKET, rows) if not isinstance(row, FinetuningError)]
    ledger = Ledger(on_bad="skip")
    try:
        found = encode_records(POCKET, rows, limit, over_length="cut_prompt", ledger=ledger)
    except FinetuningError:
        return
    learned = [[label for label in row.labels if label != -100] for row in whole]
    assert all([label for label in row.labels if label != -100] in learned for row in found)


# The cache.

def change(record):
    "A record, a little different."
    return TrainingSample(record.instruction + "!", record.input, record.output)


def test_the_cache_key_holds_all_that_decides():
    rows = [TrainingSample("What?", "", "Paris."), TrainingSample("And?", "", "Rome.")]
    choices = {"learn": "answers", "obey_marks": False, "limit": 64}
    template, vocabulary = load_tokenizer("pocket"), load_tokenizer("pocket")
    template.chat_template += " "
    vocabulary.add_tokens(["Paris"])
    alpaca, chat = AlpacaFormatter(), None
    keys = [cache_key(POCKET, rows, chat, **choices), cache_key(POCKET, rows[::-1], chat, **choices),
            cache_key(POCKET, [change(rows[0]), rows[1]], chat, **choices), cache_key(POCKET, rows[:1], chat,
            **choices),
            cache_key(template, rows, chat, **choices), cache_key(vocabulary, rows, chat, **choices),
            cache_key(POCKET, rows, alpaca, **choices)]
    keys += [cache_key(POCKET, rows, chat, **{**choices, **more}) for more in (
        {"learn": "all"}, {"obey_marks": True}, {"limit": 65})]
    assert len({*keys}) == len(keys)
    assert cache_key(load_tokenizer("pocket"), copy.deepcopy(rows), chat, **choices) == keys[0]


def test_the_cache_key_holds_the_versions(monkeypatch):
    rows = [TrainingSample("What?", "", "Paris.")]
    before = cache_key(POCKET, rows, None)
    for package in ("tokenizers", "transformers", "jinja2", "finetuning_kit"):
        with monkeypatch.context() as patch:
            from finetuning_kit import tokens
            usual = tokens.version
            patch.setattr(tokens, "version", lambda name, package=package: "0" if name == package else usual(name))
            assert cache_key(POCKET, rows, None) != before, package


def test_the_cache_gives_the_same_rows_and_mends_itself(tmp_path):
    rows = [TrainingSample("What?", "", "Paris."), TrainingSample("Say <|im_end|>", "", "Rome.")]
    first = encode_records(POCKET, rows, cache=tmp_path).rows
    [kept] = tmp_path.iterdir()
    for damage in (None, b"", kept.read_bytes()[:100]):
        if damage is not None:
            kept.write_bytes(damage)
        ledger = Ledger(on_bad="skip")
        again = encode_records(POCKET, rows, cache=tmp_path, ledger=ledger).rows
        assert again == first and [row.n_marks for row in again] == [0, 1]
        assert ("cache_damaged" if damage is not None else "cache") in ledger.notices
        ledger.check()
    assert [*tmp_path.iterdir()] == [kept]


# Start tokens and weights.

def test_one_start_token_whoever_writes_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer("pocket")
    tokenizer.bos_token = "<|im_start|>"
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    record = TrainingSample("What?", "", "Paris.")
    counted = {}
    for name, template in (("template writes it", "{{ bos_token }}" + plain), ("nobody writes it", plain)):
        tokenizer.chat_template = template
        [row] = encode_batch(tokenizer, [record])
        counted[name] = row.input_ids.count(start)
    [text] = encode_batch(tokenizer, [Document("Paris is a town.")])
    [formatted] = encode_batch(tokenizer, [record], AlpacaFormatter())
    assert counted == {"template writes it": 1, "nobody writes it": 0}
    assert [each.input_ids.count(start) for each in (text, formatted)] == [1, 1]
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + plain
    [twice] = encode_batch(tokenizer, [record])
    assert "two start tokens" in str(twice)


def test_weights_reach_the_data_set():
    rows = [json.loads(line) for line in (
        '{"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B", "weight": 0.5}]}',
        '{"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B", "weight": 0},'
        ' {"role": "user", "content": "C?"}, {"role": "assistant", "content": "D"}]}',
        '{"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": ['
        '{"type": "text", "text": "one ", "weight": 0}, {"type": "text", "text": "two", "weight": 1}]}]}')]
    found = encode_records(POCKET, rows)
    table = to_dataset(found)
    spelled = [POCKET.decode([label for label in row.labels if label != -100]) for row in found]
    assert spelled == ["B<|im_end|>", "D<|im_end|>", "two<|im_end|>"]
    assert {weight for weight in table["weights"][0] if weight} == {0.5} and {*table["weights"][1]} <= {0.0, 1.0}
