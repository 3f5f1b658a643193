"Turns, shapes, mappings and loading under many spellings: one meaning, whatever a row looks like."
import copy
import itertools
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning_kit.formatting import ChatFormatter, read_turns, to_messages
from finetuning_kit.ledger import RowError
from finetuning_kit.ledger import DataError, Ledger
from finetuning_kit.loading import RowReader, iter_records, load_records
from finetuning_kit.mappings import read_mapping
from finetuning_kit.records import Conversation, Feedback, Message, Part, PreferencePair, ToolCall, TrainingSample
from finetuning_kit.settings import FinetuningError
from finetuning_kit.shapes import FORMATS, detect_shape

TALK = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
CALL = {"name": "weather", "arguments": {"city": "Lima"}}
USER, HELLO, NO = ({"role": role, "content": text} for role, text in (
    ("user", "Hi"), ("assistant", "Hello"), ("assistant", "No")))


def one(row, mapping=None):
    "The record of one row."
    return load_records([row], mapping)[0]


# --- turns ----------------------------------------------------------------------------------------------------------
ROLES = {"user": ("user", "User", "human", "HUMAN", "prompter", " user "),
         "assistant": ("assistant", "ASSISTANT ", "gpt", "GPT", "bot", "model", "chatgpt")}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_spelling_of_a_conversation_is_the_same_conversation(data):
    role, content = data.draw(st.sampled_from([("role", "content"), ("from", "value"), ("role", "value")]))
    column = data.draw(st.sampled_from(["messages", "conversations", "conversation"]))
    turns = []
    for speaker, text in TALK:
        spelt = data.draw(st.sampled_from([text, [{"type": "text", "text": text}], [{"type": "text", "value": text}],
                                           [{"text": text[:1]}, {"type": "input_text", "text": text[1:]}]]))
        turns.append({role: data.draw(st.sampled_from(ROLES[speaker])), content: spelt, "id": 7})
    assert one({column: turns, "extra": None}) == Conversation([Message(*turn) for turn in TALK])


@pytest.mark.parametrize("turn", [
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {
        "name": "weather", "arguments": json.dumps(CALL["arguments"])}}]},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": CALL}]},
    {"role": "assistant", "tool_calls": [{"id": "c1", **CALL}]},
    {"role": "assistant", "content": "", "tool_calls": json.dumps([{"id": "c1", **CALL}])},
    {"from": "function_call", "value": json.dumps({"id": "c1", **CALL})},
    {"from": "Function_Call", "value": json.dumps([{"id": "c1", **CALL}])},
    {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps({"id": "c1", **CALL})}]},
])
def test_calls_are_read_whichever_way_they_are_written(turn):
    assert read_turns([turn]) == [Message("assistant", "", tool_calls=[ToolCall(**CALL, id="c1")])]


def test_an_old_function_call_has_no_id():
    turn = {"role": "assistant", "content": None, "function_call": {**CALL, "arguments": '{"city": "Lima"}'}}
    assert read_turns([turn])[0].tool_calls == (ToolCall(**CALL),)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_has_three_names(key):
    assert read_turns([{**HELLO, key: "Polite."}]) == [Message("assistant", "Hello", thinking="Polite.")]


@pytest.mark.parametrize("turn, weight, parts", [
    ({**HELLO, "weight": 0}, 0, ()), ({**HELLO, "loss_weight": 1.0}, 1.0, ()),
    ({"role": "assistant", "content": [{"type": "text", "text": "Hel", "weight": 0}, {"type": "text", "text": "lo"}]},
     None, (Part("Hel", 0), Part("lo"))),
    ({"role": "assistant", "content": [{"type": "text", "value": "Hello"}], "loss_weight": 0.5}, 0.5, ()),
])
def test_weights_have_the_names_of_three_tools(turn, weight, parts):
    message = read_turns([turn])[0]
    assert (message.content, message.weight, message.parts) == ("Hello", weight, parts)


def test_what_to_messages_shows_is_read_back():
    record = Conversation([
        Message("system", "Be brief."), Message("user", "Weather?", name="Ann"),
        Message("assistant", "", thinking="Ask.", tool_calls=[ToolCall(**CALL, id="c1")], weight=0.5),
        Message("tool", "clear", tool_call_id="c1", name="weather"),
        Message("assistant", parts=[Part("Clear", 2), Part(".")])], tools=[{"name": "weather"}])
    assert Conversation(read_turns(to_messages(record)), record.tools) == record
    assert one(ChatFormatter().format_sample(record)) == record
    assert one(record.to_dict()) == record


json_like = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                         lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                             st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "name",
                                              "text", "type", "weight", "arguments", "thinking"]), inner, max_size=4),
                         max_leaves=10)


@given(turns=json_like, other=json_like,
       column=st.sampled_from(["messages", "conversations", "prompt", "chosen", "instruction", "text"]))
@settings(max_examples=300, deadline=None)
def test_no_row_is_the_end(turns, column, other):
    "Whatever a row holds, it is read or refused in a sentence, and is left as it was."
    row = {column: turns, "completion": other, "rejected": other, "output": other, "tools": other, "system": other}
    before = copy.deepcopy(row)
    for mapping in (None, *FORMATS):
        ledger = Ledger(on_bad="skip")
        try:
            records = load_records([row], mapping, ledger=ledger)
        except DataError as error:
            assert error.code == "unknown_columns"
        else:
            assert len(records) + len(ledger.rejects) == 1
    assert row == before


# --- pairs and feedback ---------------------------------------------------------------------------------------------
PAIR = PreferencePair([Message("user", "Hi")], [Message("assistant", "Hello")], [Message("assistant", "No")])


@pytest.mark.parametrize("row", [
    {"prompt": [USER], "chosen": [HELLO], "rejected": [NO]}, {"prompt": "Hi", "chosen": [HELLO], "rejected": [NO]},
    {"prompt": [USER], "chosen": "Hello", "rejected": "No"}, {"chosen": [USER, HELLO], "rejected": [USER, NO]},
    {"prompt": "Hi", "chosen": [USER, HELLO], "rejected": [USER, NO]},
    {"messages": [USER], "chosen": HELLO, "rejected": NO},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
     "rejected": {"from": "gpt", "value": "No"}},
])
def test_a_pair_in_many_spellings_is_one_pair(row):
    assert one(row) == PAIR


@pytest.mark.parametrize("row", [
    {"prompt": [USER], "completion": [HELLO], "label": True}, {"messages": [USER, HELLO], "label": True},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "label": True},
    {"completion": [USER, HELLO], "label": True}, {"prompt": [USER], "completion": "Hello", "label": True},
])
def test_feedback_in_many_spellings_is_one_feedback(row):
    assert one(row) == Feedback([Message("user", "Hi")], [Message("assistant", "Hello")], True)


def test_a_system_text_goes_into_the_prompt():
    pair = one({"system": "Be brief.", "question": "Hi", "chosen": "Hello", "rejected": "No"})
    assert pair == PreferencePair([Message("system", "Be brief."), *PAIR.prompt], PAIR.chosen, PAIR.rejected)
    implicit = one({"system": "Be brief.", "chosen": [USER, HELLO], "rejected": [USER, NO]})
    assert implicit == pair


def test_an_answer_that_begins_with_the_prompts_only_word_is_left_alone():
    pair = one({"prompt": "Python", "chosen": "Python is fine", "rejected": "Python is a snake"})
    assert pair == PreferencePair("Python", "Python is fine", "Python is a snake")


# --- mappings -------------------------------------------------------------------------------------------------------
def test_llama_factory_reads_its_own_shapes():
    talk = {"instruction": "And?", "input": "Peru", "output": "Lima", "history": [["France?", "Paris"]]}
    entry = {"columns": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}}
    assert [turn.content for turn in one(talk, entry).messages] == ["France?", "Paris", "And?\n\nPeru", "Lima"]
    liked = {"formatting": "sharegpt", "columns": {"messages": "talk", "kto_tag": "ok"}}
    row = {"talk": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "ok": False}
    assert one(row, liked) == Feedback([Message("user", "Hi")], [Message("assistant", "Hello")], False)
    tags = {"formatting": "sharegpt", "columns": {"messages": "talk", "tools": "functions", "system": "s"}, "tags": {
        "role_tag": "who", "content_tag": "what", "user_tag": "Q", "assistant_tag": "A", "function_tag": "F"}}
    row = {"talk": [{"who": "Q", "what": "Hi"}, {"who": "F", "what": json.dumps(CALL)}],
           "functions": json.dumps([CALL]), "s": "Be brief."}
    record = one(row, tags)
    assert [turn.role for turn in record.messages] == ["system", "user", "assistant"] and record.tools == (CALL,)


def test_axolotl_weighs_turns():
    entry = {"type": "chat_template", "field_messages": "conversations", "roles_to_train": [],
             "message_property_mappings": {"role": "from", "content": "value"}, "message_field_training": "train",
             "message_field_training_detail": "detail"}
    row = {"conversations": [
        {"from": "human", "value": "Hi", "train": True}, {"from": "gpt", "value": "Hello"},
        {"from": "gpt", "value": "Hello", "detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}]}
    user, assistant, cut = one(row, entry).messages
    assert (user.weight, assistant.weight) == (1.0, 0.0)
    assert cut.parts == (Part("He", 1.0), Part("llo", 0.0))


def test_segments_become_parts_and_are_warned_about():
    ledger = Ledger()
    row = {"segments": [{"label": False, "text": "2 + 3 ="}, {"label": True, "text": " 5"}]}
    record = load_records([row], "axolotl:input_output", ledger)[0]
    assert [(part.text, part.weight) for part in record.messages[0].parts] == [("2 + 3 =", 0.0), (" 5", 1.0)]
    assert ledger.notices["segments"].kind == "warning"


def test_a_mapping_overrides_what_would_be_ambiguous():
    row = {"messages": [USER, HELLO], "prompt": "Hi", "completion": "No"}
    assert one(row, "messages").messages[1].content == "Hello"
    assert one(row, "prompt_completion") == TrainingSample("Hi", output="No")
    assert one({"q": [USER], "a": [HELLO]}, "q=prompt, a=completion") == Conversation([*PAIR.prompt, *PAIR.chosen])


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_mapping_or_is_refused_in_a_sentence(text):
    try:
        read_mapping(text)
    except FinetuningError as error:
        assert "`mapping`" in str(error) or ".json" in str(error)


# --- files ----------------------------------------------------------------------------------------------------------
def test_a_detection_does_not_depend_on_the_order_of_rows():
    rows = [{"instruction": "a", "output": "b"}] * 3 + [{"prompt": "a", "completion": "b"}] * 2 + [{"foo": "a"}]
    found = {(detect_shape(list(order)).mapping, detect_shape(list(order)).confidence)
             for order in itertools.permutations(rows)}
    assert len(found) == 1


def test_rows_stream(tmp_path):
    def rows():
        for n in range(100_000):
            yield {"instruction": f"What is {n} + 1?", "output": str(n + 1)}

    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    ledger = Ledger()
    stream = iter_records(path, ledger=ledger)
    assert next(stream)[1].output == "1"
    tracemalloc.start()
    n = sum(1 for _ in stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 99_999 and ledger.n_rows == 100_000 and ledger.notices["shape"].count == 100_000
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"


def test_a_stream_that_is_left_still_tells_what_it_read():
    ledger = Ledger()
    stream = iter_records([{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}] * 5,
                          ledger=ledger)
    next(stream)
    stream.close()
    assert ledger.notices["role_names"].count == 2


def test_a_reader_plans_once_for_each_set_of_columns(monkeypatch):
    from finetuning_kit import loading

    calls, plan = [], loading.plan_columns
    monkeypatch.setattr(loading, "plan_columns", lambda *args: calls.append(1) or plan(*args))
    row = {"instruction": "a", "output": "b", "id": 1}
    reader = RowReader(detect_shape([row]).mapping)
    for n in range(100):
        reader.read({**row, "id": n})
    assert len(calls) == 1


def test_faults_of_turns_have_codes():
    for turns, code in (([], "no_turns"), ([5], "wrong_type"), ([{"role": "narrator", "content": "x"}], "unknown_role"),
                        ([{"role": "user", "content": "x", "weigth": 0}], "misspelt_key"),
                        ([{"role": "user", "content": "x", "value": "y"}], "two_values"),
                        ([{"role": "user", "content": "x", "weight": "no"}], "bad_turn"),
                        ([{"from": "function_call", "value": "weather()"}], "not_json")):
        with pytest.raises(RowError) as caught:
            read_turns(turns)
        assert caught.value.code == code, turns
