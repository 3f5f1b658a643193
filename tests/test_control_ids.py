"""No text that somebody typed becomes a control token, whatever it spells, in any role and template; and it stays "
"itself."""
import re

import pytest

from finetuning_kit.encoding import find_marks
from finetuning_kit.models import load_tokenizer
from finetuning_kit.records import Conversation, Message
from finetuning_kit.tokens import encode_batch
from tests.templates import byte_tokenizer, template_names

TEMPLATES = ("qwen3", "qwen2_5", "llama3_1", "gemma3", "phi3", "deepseekv3", "gptoss", "glm4moe", "cohere2", "lfm2_v2")
COMMON = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<think>",
"</think>",
          "<tool_call>", "</tool_call>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "### Response:", "<|user|>")


def markers(tokenizer) -> list:
    "Every added token of a tokenizer, and everything that its template spells like a mark."
    spelled = re.findall(r"<[^<>{}%'\"\s]{1,40}>|\[/?[A-Z_]+\]", str(tokenizer.chat_template))
    return sorted({*map(str, tokenizer.get_added_vocab()), *spelled, *COMMON})


def talk(tokenizer, role, text):
    "A conversation in which somebody of this role says a text."
    words = {"system": "Be kind.", "user": "What?", "assistant": "Paris.", "last": "Rome.", role: text}
    turns = [("user", words["user"]), ("assistant", words["assistant"]), ("user", "And Italy?"), ("assistant",
    words["last"])]
    return Conversation([Message("system", words["system"])] * (role == "system") + [Message(*turn) for turn in turns])


def rows(tokenizer, role, texts) -> list:
    "Encoded conversations, one for each text."
    return encode_batch(tokenizer, [talk(tokenizer, role, text) for text in texts])


@pytest.mark.parametrize("role", ["system", "user", "assistant", "last"])
@pytest.mark.parametrize("name", ["pocket", *TEMPLATES])
def test_no_control_ids_from_what_somebody_says(name, role):
    tokenizer = load_tokenizer("pocket") if name == "pocket" else byte_tokenizer(name)
    marks, [harmless] = find_marks(tokenizer), rows(tokenizer, role, ["Tell me, please"])
    control = [id for id in harmless.input_ids if id in marks.known]
    typed = markers(tokenizer)
    for mark, row in zip(typed, rows(tokenizer, role, [f"Tell {mark} me" for mark in typed])):
        assert [id for id in row.input_ids if id in marks.known] == control, mark
        assert row.n_marks == (mark in marks.ids), mark
        is_thought = mark == "</think>" and role in ("assistant", "last")  # some templates take it for the end of one
        assert f"Tell {mark} me" in tokenizer.decode(row.input_ids) or is_thought, mark


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_is_encoded_as_ever(name):
    "Around what was typed, the ids are those around a harmless text."
    tokenizer = byte_tokenizer(name)
    [harmless] = rows(tokenizer, "user", ["What?"])
    for mark in list(find_marks(tokenizer).ids)[:12]:
        [row] = rows(tokenizer, "user", [f"a {mark} b"])
        at = next(n for n, (one, other) in enumerate(zip(row.input_ids, harmless.input_ids)) if one != other)
        n_behind = len(harmless.input_ids) - at - len(tokenizer.encode("What?", add_special_tokens=False))
        assert row.input_ids[-n_behind:] == harmless.input_ids[-n_behind:]
        assert row.n_loss_tokens == harmless.n_loss_tokens


def test_marks_steer_where_that_is_asked_for():
    tokenizer = load_tokenizer("pocket")
    [row] = encode_batch(tokenizer, [talk(tokenizer, "user", "Say <|im_end|>")], obey_marks=True)
    [safe] = encode_batch(tokenizer, [talk(tokenizer, "user", "Say <|im_end|>")])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row.input_ids.count(end) == safe.input_ids.count(end) + 1 == 5
    assert (row.n_marks, safe.n_marks) == (1, 1)


def test_most_templates_of_trl_are_covered():
    assert {*TEMPLATES} <= {*template_names()} and len(TEMPLATES) >= 8
