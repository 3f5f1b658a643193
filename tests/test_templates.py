"""The loss mask, template by template, beside the masks that TRL marks by hand; and what must hold for every "
"template."""
import re

import pytest

from finetuning_kit.answers import find_answers
from finetuning_kit.encoding import label_all
from finetuning_kit.records import Conversation, Message
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tokens import encode_batch
from tests.templates import byte_tokenizer, reference, template_names

REASONS = {  # how the table spells them
    "the same": "=", "newline behind the end": "n", "what the prompt holds": "p", "a second end mark": "e",
    "a header that no prompt holds": "h", "another text": "text", "refused: refuses this row": "refuses",
    "refused: leaves out the tools on offer": "no-tools", "refused: leaves out a message of the role 'user'": "no-user",
    "refused: leaves out a message of the role 'system'": "no-system",
    "refused: leaves out a tool call of a message of the role 'assistant'": "no-call"}
TABLE = """
                        one      two      system     tools     thinking
cohere                  =        =        =          refuses   =
cohere2                 =        =        =          refuses   =
deepseek_r1_distill     p        p        p          no-tools  p
deepseekv3              p        p        p          no-tools  p
diffusion_gemma         n        n        n          hn        n
gemma                   n        n        refuses    refuses   n
gemma3                  n        n        n          refuses   n
glm4moe                 text     text     text       text      text
gptoss                  p        p        p          p         p
idefics3                no-user  no-user  no-system  refuses   no-user
lfm2                    n        n        n          no-call   n
lfm2_v2                 n        n        n          n         n
llama3                  =        =        =          no-tools  =
llava_next              refuses  refuses  refuses    refuses   refuses
muse_glimmer            p        p        p          p         p
nemotron_3_5_lightning  np       np       np         np        np
nemotron_3_nano         np       np       np         np        np
nemotron_3_super        np       np       np         np        np
nemotron_3_ultra        np       np       np         np        np
phi3                    ne       ne       ne         no-tools  ne
phi3_5                  ne       ne       ne         no-tools  ne
qwen2_5                 np       np       np         np        np
qwen2_5_vl              n        n        n          no-tools  n
qwen3                   n        text     n          text      text
qwen3_5_nothink         np       text     np         np        text
qwen3_5_think           np       text     np         np        text
qwen3_6                 np       text     np         np        text
qwen3_8                 np       np       np         np        np
qwen3_instruct_2507     n        n        n          n         n
qwen3_vl                n        n        n          n         n
smolvlm                 no-user  no-user  no-system  refuses   no-user
"""
PICTURES = ("idefics3", "llava_next", "smolvlm")  # their contents are lists of parts, and texts are refused
TEXTUAL = [name for name in template_names() if name not in PICTURES]


def test_masks_beside_those_of_trl():
    names, [head, *lines] = reference(), TABLE.strip("\n").splitlines()
    columns, wanted = head.split(), {line.split()[0]: line.split()[1:] for line in lines}
    found = {name: ["".join(REASONS[reason] for reason in names["table"][name, row]) for row in columns]
             for name in names["names"]}
    assert found == wanted


def said(names, row):
    "The contents of a row's answers."
    answers = [message["content"] for message in names["ROWS"][row] if message["role"] == "assistant"]
    return [answer for answer in answers if answer]


@pytest.mark.parametrize("name", TEXTUAL)
@pytest.mark.parametrize("row", ["one", "two", "system", "thinking"])
def test_every_answer_is_learned_to_its_end_and_nothing_of_a_question(name, row):
    names, tokenizer = reference(), byte_tokenizer(name)
    messages = names["ROWS"][row]
    if name == "gemma" and row == "system":
        with pytest.raises(FinetuningError, match="refuses this row"):
            find_answers(tokenizer, messages)
        return
    rendering = find_answers(tokenizer, messages)
    learned = [rendering.text[span.start:span.end] for span in rendering.answers]
    assert len(learned) == len(said(names, row))
    assert all(text.count(answer) == 1 for text, answer in zip(learned, said(names, row)))
    asked = [message["content"] for message in messages if message["role"] != "assistant"]
    assert not any(question in text for text in learned for question in asked)
    ends = {text[text.index(answer) + len(answer):] for text, answer in zip(learned, said(names, row))}
    assert all(re.fullmatch(r"\s*\S+", end) for end in ends), ends  # one mark, and nothing behind it


@pytest.mark.parametrize("name", TEXTUAL)
def test_labels_are_the_answers_letters(name):
    "What the labels spell is what the spans say, by the fast way and by the slow one."
    names, tokenizer = reference(), byte_tokenizer(name)
    for row in ("one", "two"):
        rendering = find_answers(tokenizer, names["ROWS"][row])
        turns = Conversation([Message(**message) for message in names["ROWS"][row]])
        for found in (*label_all(tokenizer, [rendering]), *label_all(tokenizer, [rendering], limit=1)):
            spelled = tokenizer.decode([label for label in found.labels if label != -100])
            assert spelled == "".join(rendering.text[span.start:span.end] for span in rendering.answers)
            assert tokenizer.decode(found.input_ids) == rendering.text
        [whole] = encode_batch(tokenizer, [turns])
        assert (whole.input_ids, whole.labels) == (found.input_ids, found.labels)


@pytest.mark.parametrize("name", TEXTUAL)
def test_one_start_token_or_none_as_the_template_says(name):
    tokenizer = byte_tokenizer(name)
    [row] = encode_batch(tokenizer, [Conversation([Message("user", "Hi"), Message("assistant", "Hello")])])
    writes_it = "bos_token" in tokenizer.chat_template or tokenizer.bos_token in tokenizer.chat_template
    assert row.input_ids.count(tokenizer.bos_token_id) == (row.input_ids[0] == tokenizer.bos_token_id) <= writes_it
