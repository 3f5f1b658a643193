"""Demands on answers: any text gets a verdict with a reason, and what is read off an instruction can be checked."""
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning_kit.instructions import CONSTRAINTS, UNITS, check_constraints, find_constraints, read_constraints
from finetuning_kit.settings import FinetuningError

VALUES = {"number": 3, "texts": ["rome", "("], "text": "Rome", "flag": True, "keys": ["a"], "language": "de"}
EVERY = {name: VALUES[constraint.takes] for name, constraint in CONSTRAINTS.items()}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_gets_a_verdict_with_a_reason(text):
    for name, value in EVERY.items():
        [check] = check_constraints(text, {name: value})
        assert (check.strict is True) == (check.reason == "") and (check.strict is None) == (check.loose is None)
        assert check.loose or not check.strict, "what is met strictly is met loosely"
        assert check.demand and "{" not in check.demand


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(
    ["in one word", "Answer", "as JSON", "at most 3 words", "at least five words", "not", ".", "?", '"', ":",
     "in upper case", "in lower case", "exactly two sentences", "under 0 lines",
     "please", "Reply in Welsh", "`"]), max_size=9))
def test_demands_found_in_words_can_be_read(words):
    read_constraints(find_constraints(" ".join(words)))


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(max_size=30), st.dictionaries(st.sampled_from(sorted(CONSTRAINTS)), st.one_of(
    st.integers(-2, 5), st.booleans(), st.text(max_size=3), st.lists(st.text(max_size=2), max_size=2), st.none()))))
def test_demands_are_read_or_refused_in_a_sentence(demands):
    try:
        check_constraints("Rome is old.", demands)
    except FinetuningError as problem:
        assert len(str(problem)) > 20


def test_counting_units_agree_on_the_bounds():
    text = "One two. Three four!\n\n- five\n- six"
    for unit, count in UNITS.items():
        n = count(text)
        met = {f"max_{unit}": (n, n - 1), f"min_{unit}": (n, n + 1), f"n_{unit}": (n, n + 1)}
        for name, (good, bad) in met.items():
            assert check_constraints(text, {name: good})[0].strict
            assert not check_constraints(text, {name: bad})[0].strict
