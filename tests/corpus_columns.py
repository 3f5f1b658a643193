"""Section C of the bad-input table: columns and types."""
from tests.corpus import Case, jsonl, pairs


def chat(*turns, **more) -> dict:
    "A good conversation, or one with the turns given."
    return {"messages": list(turns) or [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            **more}


def say(content, role="assistant") -> dict:
    "A conversation whose second turn holds this content."
    return chat({"role": "user", "content": "Hi"}, {"role": role, "content": content})


ALPACA = {"instruction": "Name the capital of France.", "input": "", "output": "Paris"}
PAIR = {"prompt": "Name the capital of France.", "chosen": "Paris", "rejected": "Lyon"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
VERDICT = {"prompt": "Name the capital of France.", "completion": "Paris", "label": True}
TEXTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
PICTURE = [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
ASKED = [{"role": "user", "content": "Name the capital of France."}]
TURNS = {"prompt": ASKED, "completion": [{"role": "assistant", "content": "Paris"}]}

CASES = [
    Case(52, "two row shapes", jsonl(*pairs(3), ALPACA, *pairs(1)), "R", "mixed_shapes", (4,), "alpaca"),
    Case(52, "two row shapes, texts and turns", jsonl(*pairs(3), {"prompt": ASKED, "completion": ASKED}), "R",
         "mixed_shapes", (4,), "trl_conversational_prompt_completion"),
    Case(52, "two row shapes, turns and texts", jsonl(TURNS, *pairs(1), TURNS), "R", "mixed_shapes", (2,)),
    Case(52, "a pair of messages among texts", jsonl(PAIR, {**PAIR, "chosen": ASKED, "rejected": ASKED * 2}, PAIR), "R",
         "mixed_shapes", (2,), "preference_messages"),
    Case(52, "a minority of conversations", jsonl(ALPACA, chat(), ALPACA), "R", "mixed_shapes", (2,), "messages"),
    Case(53, "new column late", jsonl(*pairs(4), *pairs(1, source="web")), "W", "unknown_column", (5,), "`source`"),
    Case(54, "text turns into number late", jsonl(*pairs(4), {"prompt": "Five?", "completion": 5}), "R", "wrong_type",
         (5,), "`completion` must be text, got the number 5; put it in quotes"),
    Case(55, "id is a number, then a text", jsonl(*pairs(1, id=1), *pairs(1, id="two")), "A"),
    Case(56, "completion is a number", jsonl({"prompt": "Two and three?", "completion": 5}), "R", "wrong_type", (1,),
         "put it in quotes"),
    Case(57, "prompt looks like a date", jsonl({"prompt": "2024-01-01", "completion": "2024-01-01T00:00:00"}), "A"),
    Case(58, "content is a boolean", jsonl(chat(), say(True)), "R", "wrong_type", (2,), "turn 2: `content` must be"),
    Case(58, "content is an object", jsonl(chat(), say({"text": "Hello"})), "R", "wrong_type", (2,), "an object"),
    Case(58, "content is a number", jsonl(chat(), say(7)), "R", "wrong_type", (2,), "the number 7"),
    Case(59, "content in parts, all of them text", jsonl(chat(), say(TEXTS)), "N", "content_parts", (2,)),
    Case(59, "content in parts, one a picture", jsonl(chat(), say(PICTURE)), "R", "not_text", (2,), "image_url"),
    Case(60, "only unknown columns", jsonl({"foo": "a", "bar": "b"}), "E", "unknown_columns", (1,), "`bar`, `foo`"),
    Case(61, "required field missing", jsonl(*pairs(2), {"prompt": "And?"}), "R", "missing_field", (3,),
         "`completion` is missing"),
    Case(62, "column in another case", jsonl(chat(), {"Messages": chat()["messages"]}), "R", "misspelt_column", (2,),
         "rename it to `messages`"),
    Case(62, "column misspelt in every row", jsonl(*({"Prompt": "a", "completion": "b"} for _ in range(2))), "E",
         "unknown_columns", (1,), "rename `Prompt` to `prompt`"),
    Case(62, "optional column misspelt", jsonl(ALPACA, {"instruction": "a", "imput": "b", "output": "c"}), "R",
         "misspelt_column", (2,), "rename it to `input`"),
    Case(62, "key of a turn with a blank", jsonl(chat(), chat({"role ": "user", "content": "Hi"})), "R", "misspelt_key",
         (2,), "rename it to `role`"),
    Case(63, "ShareGPT keys", jsonl(SHAREGPT, SHAREGPT), "N", "shape", (1,), "sharegpt"),
    Case(63, "ShareGPT roles", jsonl(SHAREGPT), "N", "role_names", (1,), "human as user, gpt as assistant"),
    Case(64, "Alpaca keys", jsonl(ALPACA), "N", "shape", (1,), "alpaca as TrainingSample"),
    Case(65, "messages and prompt with completion", jsonl(chat(), chat(**pairs(1)[0])), "R", "ambiguous", (2,),
         "choose one with `mapping`"),
    Case(65, "every row is ambiguous", jsonl(chat(**pairs(1)[0]), chat(**pairs(1)[0])), "R", "ambiguous", (1, 2)),
    Case(66, "preference without rejected", jsonl(PAIR, {"prompt": "a", "chosen": "b"}), "R", "missing_field", (2,),
         "`rejected` is missing"),
    Case(67, "chosen equals rejected", jsonl(PAIR, {**PAIR, "rejected": "Paris"}), "R", "no_preference", (2,)),
    Case(68, "no shared prompt", jsonl({"chosen": "Paris it is.", "rejected": "It is Lyon."}), "R", "no_shared_prompt",
         (1,)),
    Case(68, "prompt repeated inside", jsonl({**PAIR, "chosen": PAIR["prompt"] + " Paris",
                                              "rejected": PAIR["prompt"] + " Lyon"}), "N", "prompt_repeated", (1,)),
    Case(68, "prompt repeated inside, as messages", jsonl({
        "prompt": PAIR["prompt"], "chosen": [*ASKED, {"role": "assistant", "content": "Paris"}],
        "rejected": [*ASKED, {"role": "assistant", "content": "Lyon"}]}), "N", "prompt_repeated", (1,)),
    Case(69, "label is no verdict", jsonl(VERDICT, {**VERDICT, "label": 1}), "R", "wrong_type", (2,),
         "`label` must be true or false, got the number 1"),
    Case(69, "no label is a verdict", jsonl({**VERDICT, "label": "good"}), "R", "wrong_type", (1,), "true or false"),
    Case(70, "messages null", jsonl(chat(), {"messages": None}), "R", "null_value", (2,)),
    Case(70, "content null", jsonl(chat(), say(None)), "R", "null_value", (2,), "`content` must be text, got null"),
    Case(70, "role null", jsonl(chat(), say("Hello", None)), "R", "null_value", (2,), "`role` must be text, got null"),
    Case(70, "completion null", jsonl(*pairs(1), {"prompt": "a", "completion": None}), "R", "null_value", (2,)),
    Case(71, "empty object", jsonl(*pairs(1), {}), "R", "empty_row", (2,)),
]
