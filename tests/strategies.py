"""Random records of every kind, for tests that say what must hold for all of them.

Texts are short and awkward: line ends of every kind, letters of several scripts, and words that look like dates,
numbers, JSON, roles or markers. They never begin or end a conversation in a way that no reader takes (see
`conversations`).
"""
from hypothesis import strategies as st

from finetuning_kit.records import (Conversation, Document, Feedback, Message, Part, PreferencePair, ToolCall,
                                    TrainingSample)

AWKWARD = ("2024-01-05", "null", "007", "1e5", "true", '{"a": 1}', "[1]", "a,b;c\td", 'say "x"',
           "### Response:\nno", "user", "line\nline", "line\r\nline", "\u2028", "\x85", "e\u0301",
           "👩‍🚀", "日本語", "\ufeff", "=1+1", " both ends ", "\\n", "<|im_end|>")
LETTERS = st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",))
texts = st.one_of(st.sampled_from(AWKWARD), st.text(LETTERS, min_size=1, max_size=12)).filter(str.strip)
names = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
weights = st.sampled_from((0, 1, 0.5, 2.0))
plain_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                            | texts, lambda inner: st.lists(inner, max_size=3)
                            | st.dictionaries(names, inner, max_size=3), max_leaves=5)
arguments = st.dictionaries(names, plain_values, max_size=3)
tools = st.lists(st.builds(lambda name, parameters: {"type": "function", "function": {
    "name": name, "description": "does it", "parameters": {"type": "object", "properties": parameters}}},
    names, st.dictionaries(names, st.just({"type": "string"}), max_size=2)), max_size=2)

samples = st.builds(TrainingSample, instruction=texts, input=st.just("") | texts, output=texts,
                    system=st.none() | st.just("") | texts)
documents = st.builds(Document, texts)


@st.composite
def rounds_of_tools(draw, numbered):
    "An assistant's turn with calls, and a result for each, in order or not."
    calls = draw(st.lists(st.builds(ToolCall, names, arguments), min_size=1, max_size=2))
    if numbered:
        start = draw(st.integers(0, 10**6))
        calls = [ToolCall(call.name, call.arguments, f"id{start + n}") for n, call in enumerate(calls)]
    beside = draw(st.just("") | texts) if draw(st.booleans()) else ""
    results = [Message("tool", draw(texts), tool_call_id=call.id, name=draw(st.sampled_from((None, call.name))))
               for call in calls]
    if numbered and draw(st.booleans()):
        results.reverse()
    return [Message("assistant", beside, tool_calls=tuple(calls)), *results]


@st.composite
def answers(draw, rich):
    "An assistant's turn of text, with thinking, a weight or weighted parts where it is rich."
    kind = draw(st.sampled_from(("plain", "thinking", "weight", "parts", "name"))) if rich else "plain"
    if kind == "parts":
        parts = draw(st.lists(st.builds(Part, texts, st.none() | weights), min_size=1, max_size=3))
        return Message("assistant", parts=tuple(parts))
    more = {"thinking": texts, "weight": weights, "name": names}
    return Message("assistant", draw(texts), **({kind: draw(more[kind])} if kind in more else {}))


@st.composite
def turns(draw, rich=True, answered=True):
    "Turns of a conversation: perhaps a system text, questions, calls, results, answers; ends with an answer if asked."
    has_tools, numbered = rich and draw(st.booleans()), draw(st.booleans())
    said = [Message("system", draw(texts))] if draw(st.booleans()) else []
    n_rounds = draw(st.sampled_from((1, 1, 2, 3)))
    for n in range(n_rounds):
        said.append(Message("user", draw(texts)))
        if has_tools and draw(st.booleans()):
            said += draw(rounds_of_tools(numbered))
        if answered or n < n_rounds - 1:
            said.append(draw(answers(rich)))
    return said


conversations = st.one_of(st.builds(Conversation, turns(rich=False)), st.builds(Conversation, turns(), tools=tools))


@st.composite
def pairs(draw):
    "A preference of texts, of messages, or of longer answers; the two answers differ."
    if draw(st.booleans()):
        prompt, chosen, rejected = draw(texts), draw(texts), draw(texts)
    else:
        rich = draw(st.booleans())
        prompt = draw(turns(rich=rich, answered=False))
        chosen, rejected = ([Message("assistant", draw(texts))] for _ in range(2))
        if rich and draw(st.booleans()):
            chosen = [*chosen, Message("user", draw(texts)), Message("assistant", draw(texts))]
    if chosen == rejected:
        rejected = "another" if isinstance(rejected, str) else [Message("assistant", "another" + rejected[0].content)]
    return PreferencePair(prompt, chosen, rejected, draw(tools) if draw(st.booleans()) else ())


@st.composite
def feedbacks(draw):
    "A verdict on an answer, of texts or of messages."
    if draw(st.booleans()):
        return Feedback(draw(texts), draw(texts), draw(st.booleans()))
    prompt = draw(turns(rich=draw(st.booleans()), answered=False))
    return Feedback(prompt, [draw(answers(draw(st.booleans())))], draw(st.booleans()), draw(tools))


records = st.one_of(samples, conversations, pairs(), feedbacks(), documents)
