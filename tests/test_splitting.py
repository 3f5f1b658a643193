"""Splits and near copies: what must hold for any rows, planted leaks, and time that grows with the rows."""
import random
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning_kit.ledger import Ledger
from finetuning_kit.records import Conversation, Document, Feedback, Message, PreferencePair, TrainingSample, ToolCall
from finetuning_kit.settings import FinetuningError
from finetuning_kit.splitting import (
    NEAR, find_near_duplicates, first_question, join_links, normal_text, plan_split, prompt_key, share_out, split_rows,
    split_stream)

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
WORDS = [f"{a}{b}" for a in ("gold", "tin", "lead", "zinc", "neon", "argon", "iron") for b in ("en", "ish", "ly", "")]
QUESTIONS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
TABLE = st.lists(st.fixed_dictionaries({
    "instruction": QUESTIONS, "output": st.sampled_from(["yes", "no"]), "kind": st.sampled_from(["a", "b", None]),
    "owner": st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, None])}), min_size=2, max_size=40)


def vocabulary(draw, n=5000):
    "Words of letters."
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(n)]


def prose(n, seed=0) -> list:
    "Unrelated texts."
    draw = random.Random(seed)
    words = vocabulary(draw)
    return [" ".join(draw.choices(words, k=draw.randint(15, 60))) for _ in range(n)]


def shingles(text) -> set:
    "Pieces of five characters, as the chapter defines them."
    text = normal_text(text)
    return {text[k:k + 5] for k in range(len(text) - 4)} or {text}


def jaccard(one, other) -> float:
    "Share of the pieces that both have."
    one, other = shingles(one), shingles(other)
    return len(one & other) / len(one | other)


def split_or_skip(rows, **options) -> tuple:
    "Both sides; None where the rows are one group."
    try:
        return split_rows(rows, **options)
    except FinetuningError as error:
        assert "cannot be split" in str(error)
        return None


# --- what holds for any rows ----------------------------------------------------------------------------------------
@QUICK
@given(TABLE, st.floats(0, 0.95), st.integers(0, 5), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_any_split_is_whole_leaks_nothing_and_ignores_the_order(rows, ratio, seed, stratified, grouped, draw):
    rows = [{**row, "id": n} for n, row in enumerate(rows)]
    options = {"split_ratio": ratio, "seed": seed, "stratify_by": "kind" if stratified else None,
               "group_by": "owner" if grouped else None}
    try:
        sides = split_or_skip(rows, **options)
    except FinetuningError as error:
        assert "which no row has" in str(error)
        return
    if sides is None:
        return
    train, held_out = sides
    assert [row["id"] for row in train] == sorted(row["id"] for row in train)
    assert sorted(row["id"] for row in train + held_out) == list(range(len(rows)))
    assert train and bool(held_out) == (ratio > 0)
    asked = [{normal_text(row["instruction"]) for row in side} for side in sides]
    assert not asked[0] & asked[1]
    if grouped and ratio:
        assert not ({row["owner"] for row in train} & {row["owner"] for row in held_out}) - {None}
    shuffled = split_rows(draw.sample(rows, len(rows)), **options)
    assert {row["id"] for row in shuffled[1]} == {row["id"] for row in held_out}


@QUICK
@given(st.lists(st.text(max_size=30), min_size=2, max_size=12), st.sampled_from([0.5, 0.7, 0.8, 1.0]))
def test_near_copies_are_those_that_counting_finds(texts, threshold):
    found = {(one, other): share for one, other, share in find_near_duplicates(texts, threshold)}
    for (one, other), share in found.items():
        assert one < other and share == pytest.approx(jaccard(texts[one], texts[other])) and share >= threshold - 1e-6
    first = {}
    for n, text in enumerate(texts):
        first.setdefault(normal_text(text), n)
    true = {(a, b) for a in first.values() for b in first.values()
            if a < b and jaccard(texts[a], texts[b]) >= threshold}
    assert true <= found.keys()


@QUICK
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=15))
def test_groups_are_what_links_reach(links):
    groups, reach = join_links(10, links), {n: {n} for n in range(10)}
    for _ in range(10):
        for one, other in links:
            reach[one] = reach[other] = reach[one] | reach[other]
            for n in reach[one]:
                reach[n] = reach[one]
    assert groups == [min(reach[n]) for n in range(10)]


@QUICK
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), st.data())
def test_shares_add_up_and_are_fair(sizes, data):
    n_wanted = data.draw(st.integers(0, sum(sizes.values())))
    wanted = share_out(Counter(sizes), n_wanted)
    assert sum(wanted.values()) == n_wanted
    assert all(abs(wanted[name] - n_wanted * size / sum(sizes.values())) < 1 and wanted[name] <= size
               for name, size in sizes.items())


@QUICK
@given(TABLE, st.integers(0, 3))
def test_a_stream_sends_equal_questions_to_one_side_row_by_row(rows, seed):
    sides = [side for side, _ in split_stream(rows, 0.5, seed)]
    assert set(sides) <= {"train", "held out"} and len(sides) == len(rows)
    seen = defaultdict(set)
    for side, row in zip(sides, rows):
        seen[normal_text(row["instruction"])].add(side)
    assert all(len(of_one) == 1 for of_one in seen.values())
    assert [side for row in rows for side, _ in split_stream([row], 0.5, seed)] == sides


# --- conversations --------------------------------------------------------------------------------------------------
TURNS = st.lists(QUESTIONS, min_size=2, max_size=8)


@QUICK
@given(st.lists(TURNS, min_size=2, max_size=8), st.booleans())
def test_cuts_of_one_conversation_stay_together(talks, streamed):
    records = []
    for number, texts in enumerate(talks):
        turns = [Message("user" if n % 2 == 0 else "assistant", f"{number} {text}") for n, text in enumerate(texts)]
        records += [Conversation(turns[:n]) for n in range(2, len(turns) + 1, 2)]
    if streamed:
        sides = {id(record): side for side, record in split_stream(records, 0.5)}
    else:
        split = split_or_skip(records, split_ratio=0.5)
        if split is None:
            return
        sides = {id(record): side for side, part in zip(("train", "held out"), split) for record in part}
    found = defaultdict(set)
    for record in records:
        found[record.messages[0].content].add(sides[id(record)])
    assert all(len(of_one) == 1 for of_one in found.values())


def test_keys_of_every_kind_of_record():
    ask = [Message("system", "Be brief."), Message("user", "Hi  THERE"), Message("assistant", "Hello"),
           Message("user", "Bye")]
    assert prompt_key(Conversation(ask)) == "system\nbe brief.\nuser\nhi there\nassistant\nhello\nuser\nbye"
    assert first_question(Conversation(ask)) == "system\nbe brief.\nuser\nhi there"
    assert first_question(TrainingSample("Hi", "there", "x", "Be brief.")) == first_question(Conversation(ask))
    assert prompt_key(PreferencePair(ask, "a", "b")) == prompt_key(Conversation(ask))
    assert prompt_key(Feedback(ask[1:2], "a", True)) == "user\nhi there"
    assert prompt_key(TrainingSample("Hi there", output="")) == "user\nhi there"
    implicit = PreferencePair("", ask[:3], [*ask[:2], Message("assistant", "No")])
    assert prompt_key(implicit) == "system\nbe brief.\nuser\nhi there"
    assert prompt_key(Document("A  b")) == "user\na b"
    assert prompt_key(Conversation(ask[2:3])) == "assistant\nhello"
    call = Message("assistant", "", tool_calls=[ToolCall("capital_of", {"country": "Peru"})])
    other = Message("assistant", "", tool_calls=[ToolCall("capital_of", {"country": "Chile"})])
    assert prompt_key(Conversation([ask[1], call, ask[3]])) != prompt_key(Conversation([ask[1], other, ask[3]]))


# --- planted leaks --------------------------------------------------------------------------------------------------
def replaced(text, draw, words, share=0.1):
    "One word in ten is another word."
    parts = text.split()
    for place in draw.sample(range(len(parts)), max(1, int(len(parts) * share))):
        parts[place] = draw.choice(words)
    return " ".join(parts)


def turned(text, draw, words):
    "One word in ten has changed places with its neighbour."
    parts = text.split()
    for place in draw.sample(range(len(parts) - 1), max(1, len(parts) // 20)):
        parts[place:place + 2] = parts[place + 1], parts[place]
    return " ".join(parts)


KINDS = {"exact": (lambda text, *_: text, 1.0), "cased": (lambda text, *_: text.swapcase(), 1.0),
         "blanks": (lambda text, *_: "\t" + text.replace(" ", " \n"), 1.0), "words turned": (turned, 0.95),
         "words replaced": (replaced, 0.95), "few words replaced": (lambda *given: replaced(*given, 0.05), 0.99)}


@pytest.mark.parametrize("kind", KINDS)
def test_planted_copies_are_found_without_false_alarms(kind):
    draw, base, (change, least) = random.Random(4), prose(1000), KINDS[kind]
    words = vocabulary(draw)
    copies = [change(text, draw, words) for text in base[:300]]
    links = find_near_duplicates(base + copies, NEAR)
    planted = {(n, n + 1000) for n in range(300)}
    found = planted & {(one, other) for one, other, _ in links}
    near = {pair for pair in planted if jaccard(base[pair[0]], copies[pair[0]]) >= 0.8}
    assert len(found) >= least * 300
    assert len(found & near) >= 0.95 * len(near)
    assert len(links) - len(found) <= 0.01 * 300


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_records", (False, True))
def test_rows_of_which_a_fifth_repeat_leak_nothing(kind, as_records):
    draw, base, (change, _) = random.Random(5), prose(400), KINDS[kind]
    words = vocabulary(draw)
    rows = [{"instruction": text, "output": f"answer {n}", "source": n} for n, text in enumerate(base)]
    rows += [{"instruction": change(base[n], draw, words), "output": "another", "source": n} for n in range(100)]
    draw.shuffle(rows)
    given_rows = [TrainingSample(row["instruction"], output=row["output"]) for row in rows] if as_records else rows
    for seed in range(3):
        plan = plan_split(given_rows, 0.1, seed)
        sides = defaultdict(set)
        for row, held in zip(rows, plan.held_out):
            sides[row["source"]].add(held)
        n_leaked = sum(len(of_one) == 2 for of_one in sides.values())
        assert n_leaked <= (5 if kind == "words replaced" else 0)
        assert sum(plan.held_out) == 50


def test_a_copied_answer_keeps_rows_together_though_the_question_differs():
    essays = prose(60)
    rows = [TrainingSample(f"Task {n}", output=essay) for n, essay in enumerate(essays)]
    rows += [TrainingSample(f"Write number {n}, please", output=essay) for n, essay in enumerate(essays[:20])]
    train, held_out = split_rows(rows, 0.3)
    assert not {row.output for row in train} & {row.output for row in held_out}


def test_a_long_system_text_joins_nothing():
    system = prose(1)[0] * 3
    rows = [TrainingSample(question, output="x", system=system) for question in prose(200, seed=7)]
    plan = plan_split(rows)
    assert (plan.n_joined, sum(plan.held_out), plan.unmet) == (0, 20, [])
    few = [TrainingSample(row.instruction, output="x", system=prose(2)[n % 2] * 3) for n, row in enumerate(rows[:14])]
    assert plan_split(few).n_joined == 0


# --- shares ---------------------------------------------------------------------------------------------------------
def test_strata_get_equal_shares():
    kinds = ["a"] * 600 + ["b"] * 300 + ["c"] * 100
    rows = [{"instruction": text, "output": "x", "kind": kind} for text, kind in zip(prose(1000), kinds)]
    plan = plan_split(rows, 0.1, stratify_by="kind")
    assert plan.strata == {"a": (600, 60, 60), "b": (300, 30, 30), "c": (100, 10, 10)} and not plan.unmet


def test_what_cannot_be_met_is_said():
    rows = [{"instruction": text, "output": "x", "owner": n % 2} for n, text in enumerate(prose(40))]
    train, held_out = split_rows(rows, 0.1, group_by="owner")
    assert (len(train), len(held_out)) == (20, 20)
    three = [{**row, "owner": 0 if n < 30 else 1} for n, row in enumerate(rows)]
    plan = plan_split(three, 0.6, group_by="owner")
    assert plan.unmet == ["the split: 24 of 40 rows were wanted, 10 are held out; groups stay together",
                          "one group holds 30 of 40 rows, so the rows held out say little about it"]
    ledger = Ledger()
    split_rows(three, 0.6, group_by="owner", ledger=ledger)
    assert list(ledger.notices) == ["split_unmet"] and plan.unmet[0] in ledger.notices["split_unmet"].message
    assert "10 held out" in str(plan) and "<" not in plan._repr_markdown_()


@pytest.mark.parametrize("options, words", [
    ({"stratify_by": "topic"}, "`stratify_by` is 'topic', which no row has; the columns are `instruction`"),
    ({"group_by": "topic"}, "`group_by` is 'topic'"), ({"split_ratio": 1}, "below 1, got 1"),
    ({"split_ratio": -0.1}, "at least 0"), ({"near": 70}, "`threshold` must be above 0 and at most 1, got 70")])
def test_refusals_are_sentences(options, words):
    rows = [{"instruction": text, "output": "x"} for text in prose(10)]
    with pytest.raises(FinetuningError) as caught:
        split_rows(rows, **options)
    assert words in str(caught.value)
    records = [TrainingSample(row["instruction"], output="x") for row in rows]
    with pytest.raises(FinetuningError, match="`group_by` needs rows with columns, and records have none"):
        split_rows(records, group_by="instruction")
    with pytest.raises(FinetuningError, match="no rows"):
        split_rows([])


# --- time -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [
    lambda n: ["the same text"] * n, lambda n: [f"the same long text with a number behind it: {k}" for k in range(n)],
    lambda n: ["".join(map(chr, (97 + k % 26, 97 + k // 26 % 26, 97 + k // 676))) for k in range(n)],
    lambda n: [""] * n, lambda n: [f"What is {k % 50} plus {k // 50}?" for k in range(n)]])
def test_time_grows_with_the_rows_and_not_with_their_pairs(make):
    find_near_duplicates(make(100))
    started = time.perf_counter()
    links = find_near_duplicates(make(10_000), 0.7)
    assert time.perf_counter() - started < 40  # all pairs would take half an hour
    assert len(links) <= 10_000 * 400


def test_many_near_copies_of_one_text_are_one_group():
    text = prose(1)[0]
    texts = [f"{text} {k}" for k in range(3000)]
    assert len(set(join_links(3000, find_near_duplicates(texts)))) == 1
