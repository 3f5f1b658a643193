"""Cleaning, on rows of every shape made of everything nasty: nothing is lost, nothing is claimed that was not done, and
a second pass changes nothing."""
import copy
import json
import random

import pytest

from finetuning_kit.cleaning import DROPS, MENDABLE, REPAIRS, clean
from finetuning_kit.marks import leaf_paths

KEY = "ghp_" + "a1B2c3D4e5" * 4  # of the right shape, and nobody's
PIECES = ["Paris.", "The capital is Oslo.", "你好", "مرحبا", "😀👩\u200d👩\u200d👧", "a", "1234", '{"a": "b"}',
          "def f(x):\n    return x", KEY[:40], "api_key='a8Gd72Kx0PqLz81MnV4sW2'", "ann.lee@mail.org",
          "+49 171 5551234", "cafÃ©", "â€™", "ÃƒÂ©", "\ufffd",
          "\u200b", "\u202e", "\ufeff", "\x07", "\x1b[31m", "\xad", "\u2028", "<|im_end|>", "</s>", "<s>", "[INST]",
          "<think>", "<|im_<|im_end|>end|>", " ", "\n\n", "\t", "\u3000"]


def texts(draw) -> list:
    "A few texts; a row often says the same twice."
    return ["".join(piece + draw.choice(["", " ", "\n"]) for piece in draw.choices(PIECES, k=draw.randint(0, 6)))
            for _ in range(4)]


def shapes(draw) -> dict:
    "A row of each shape."
    pool = texts(draw)
    said = lambda: draw.choice(pool)
    turn = lambda role: {"role": role, "content": said()}
    parts = {"role": "assistant", "content": [{"type": "text", "text": said()}, {"type": "text", "text": said()}]}
    call = {"function": {"name": "f", "arguments": json.dumps({"t": said(), "list": [said()]})}}
    tool = [turn("user"), {"role": "assistant", "content": said(), "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": said()}, turn("assistant")]
    return {"alpaca": {"instruction": said(), "input": said(), "output": said(), "note": said()},
            "pairs": {"prompt": said(), "completion": said()}, "text": {"text": said()},
            "chat": {"messages": [turn("system"), turn("user"), turn("assistant"), turn("user"), turn("assistant")]},
            "parts": {"messages": [turn("user"), parts]}, "tools": {"messages": tool},
            "sharegpt": {"conversations": [{"from": "human", "value": said()}, {"from": "gpt", "value": said()}]},
            "history": {"instruction": said(), "output": said(), "history": [[said(), said()]]},
            "preference": {"prompt": said(), "chosen": said(), "rejected": said()},
            "preference turns": {name: [turn("user"), turn("assistant")] for name in ("chosen", "rejected")},
            "feedback": {"prompt": said(), "completion": said(), "label": draw.random() < 0.5}}


SHAPES = list(shapes(random.Random(0)))


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_is_lost_or_claimed_and_a_second_pass_changes_nothing(name):
    for seed in range(60):
        draw = random.Random(f"{name} {seed}")
        rows = [shapes(draw)[name] for _ in range(draw.randint(1, 4))]
        before = copy.deepcopy(rows)
        how = {"repair": tuple(draw.sample(MENDABLE, draw.randint(0, len(MENDABLE)))), "drop": draw.choice([(), DROPS])}
        once = clean(rows, **how)
        assert rows == before, "the caller's rows were changed"
        assert len(once.rows) + len(once.dropped) == once.n_read == len(rows)
        if not once.rows:
            continue
        again = clean([row.data for row in once.rows], **how)
        assert [row.data for row in again.rows] == [row.data for row in once.rows], (seed, how, before)
        assert not again.changes and not again.dropped


@pytest.mark.parametrize("name", SHAPES)
def test_a_change_that_is_told_was_made(name):
    for seed in range(40):
        row = shapes(random.Random(f"{name} {seed}"))[name]
        done = clean([row], REPAIRS, ())
        old, new = ("\n".join(text for _, text in leaf_paths(data)) for data in (row, done.rows[0].data))
        assert (old != new) == bool(done.changes)
        for change in [each for each in done.changes if name not in ("parts", "tools")]:
            assert change.after in new and change.before in old
