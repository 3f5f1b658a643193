"""Answers that are killed while they are collected: gone on with, and the same in the end."""
import copy
import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from finetuning_kit.asking import generate_answers
from finetuning_kit.collecting import AnswerFile, collect_answers
from finetuning_kit.loading import load_records
from finetuning_kit.models import load_model, load_tokenizer
from finetuning_kit.settings import FinetuningError
from finetuning_kit.tokens import encode_prompt

TOKENIZER, MODEL = load_tokenizer("pocket"), load_model("pocket")
MODELS = {"fp32": MODEL, "bf16": copy.deepcopy(MODEL).to(torch.bfloat16)}
PROMPTS = [encode_prompt(TOKENIZER, record) for record in load_records("pocket:test")[:14]]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.test_collecting"])


def collect(path, precision="fp32"):
    "Answer the questions into a file."
    return collect_answers(MODELS[precision], TOKENIZER, PROMPTS, max_new_tokens=6, batch_size=4, keep_in=path)


def work(path, precision, n_bytes):
    "Answer in a process that dies when it has written so many bytes, be it in the middle of a letter."
    torch.set_num_threads(1)
    left, write = [n_bytes], AnswerFile.write

    def torn(self, raw):
        if len(raw) > left[0]:
            self.file.write(raw[:left[0]])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= len(raw)
        write(self, raw)

    AnswerFile.write = torn
    collect(path, precision)


def run_and_kill(path, precision, n_bytes, after_s):
    "Start, and end it after some bytes or some seconds; returns whether it had finished."
    process = CONTEXT.Process(target=work, args=(path, precision, n_bytes))
    process.start()
    process.join(after_s)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode == 0


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random(tmp_path, seed):
    draw, path = random.Random(seed), tmp_path / "deep" / "answers.jsonl"
    precision = ("fp32", "bf16")[seed % 2]
    n_kills = 0
    while n_kills < 4 and not run_and_kill(path, precision, draw.randrange(900),
                                           60 if seed % 3 else draw.uniform(1, 4)):
        n_kills += 1
    found = collect(path, precision)
    assert found.answers == generate_answers(MODELS[precision], TOKENIZER, PROMPTS, 6, batch_size=4)
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    assert "answers_of" in json.loads(head)
    assert sorted(json.loads(line)["row"] for line in lines) == list(range(1, len(PROMPTS) + 1))
    assert n_kills


def test_torn_anywhere(tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = collect(path).answers
    raw = path.read_bytes()
    for n_bytes in range(0, len(raw), 211):
        path.write_bytes(raw[:n_bytes])
        assert collect(path).answers == whole
        assert sorted(path.read_bytes().splitlines()) == sorted(raw.splitlines())


def test_torn_in_the_middle(tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = collect(path).answers
    lines = path.read_bytes().splitlines(keepends=True)
    strange = b'{"row": 99, "text": "", "n_tokens": 1, "stopped": true}\n'
    for damage in (b"\0" * 40 + b"\n", strange, b"[]\n", b"\xff\n"):
        path.write_bytes(b"".join([*lines[:6], damage, *lines[6:9]]))
        found = collect(path)
        assert found.answers == whole and "torn after 5 answers" in found.notes[0]


@pytest.mark.parametrize("content", [b"holiday notes\n", b'{"row": 1}\n', b"no end of line", b"[1, 2]\n",
                                     b"\xff\xfe\n"])
def test_other_files_stay(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(FinetuningError, match="holds something else than answers"):
        collect(path)
    assert path.read_bytes() == content


def test_two_at_once(tmp_path):
    path = tmp_path / "answers.jsonl"
    process = CONTEXT.Process(target=work, args=(path, "fp32", 10**9))
    process.start()
    while not (path.exists() and path.stat().st_size):
        time.sleep(0.02)
    try:
        with pytest.raises(FinetuningError, match="being written by another process"):
            collect(path)
    finally:
        process.kill()
        process.join()
    assert len(collect(path).answers) == len(PROMPTS)
