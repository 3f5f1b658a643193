"""Whatever a file holds, reading it ends in rows or in a listed error, within two seconds and 256 MB."""
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzzing
from tests.corpus import jsonl
from tests.fuzzing import CODES, COLUMNS, KEYS, ODD, SHAPES, judge, packed_rows, parquet_bytes
from tests.notebooks import ROOT

SEEDS, COUNT = (1, 2, 3), 3000  # inputs a seed; `python -m tests.fuzzing` tries as many as you like


def turn(**fields) -> bytes:
    "A row whose only turn has these fields."
    return jsonl({"messages": [{"role": "assistant", "content": "Hi", **fields}]})


BROKE = {  # inputs that ended otherwise once: as another exception, too slowly, or in too much memory
    **{f"Parquet of {array.type}, {k}": (parquet_bytes({"prompt": array, "completion": array}), "rows.parquet")
       for k, array in enumerate(column(3) for column in COLUMNS)},
    "a Parquet column's name is no UTF-8": (packed_rows([{"prompt": "a"}]).replace(b"prompt", b"pr\xffmpt"),
                                             "rows.parquet"),
    "parts that are text": (turn(parts="abc"), "rows.jsonl"),
    "parts that are a number": (turn(parts=5), "rows.jsonl"),
    "a part that is null": (turn(parts=[None]), "rows.jsonl"),
    "a part whose type is a list": (turn(content=[{"type": ["text"], "text": "x"}]), "rows.jsonl"),
    "a part that thinks behind a number": (turn(thinking=5, content=[{"type": "thinking", "text": "x"}]), "rows.jsonl"),
    "an exponent beyond decimals": (b'{"v": 0e-11111111111111111111.5}\n{"v": 0e-11111111111111111111}', "rows.jsonl"),
    "blank lines that end as on Windows": (b"\r\n" * 400_000, "rows.jsonl"),
    "a blank line behind every row": (b'{"text": "a"}\n\n' * 60_000, "rows.jsonl"),
    "blank lines, packed": (gzip.compress(b"\n" * 30_000_000, mtime=0) + bytes(150_000), "rows.jsonl.gz"),
    "blanks before an array": (b" " * 900_000 + b"[{}]", "rows.json"),
    "a quote left open": (b'a,b\n"' + b"null" * 249_000, "rows.csv"),
    "quotes upon quotes": (b'a,b\n"' + b'"' * 990_000, "rows.csv"),
}


def run(*words, timeout=300, code=None) -> dict:
    "Fuzz in a process of its own; a process that dies or hangs is told with the number of its input."
    start = ["-c", code] if code else ["-m", "tests.fuzzing"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "offline"), str(ROOT)])}
    done = subprocess.run([sys.executable, *start, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout, env=environment)
    assert done.returncode in (0, 1) and done.stdout, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_files(seed, tmp_path):
    progress = tmp_path / "progress"
    try:
        report = run("--seed", seed, "--count", COUNT, "--progress", progress)
    except (subprocess.TimeoutExpired, AssertionError) as error:
        pytest.fail(f"input {progress.read_text().strip()} of seed {seed}: {error}")
    assert report["inputs"] == COUNT and not report["faults"], report["faults"][:3]
    assert report["ends"]["rows"] > COUNT / 8 and len(report["ends"]) > 25  # inputs reach all parts of the reader


def test_what_broke_it_once(tmp_path):
    Path(tmp_path, "inputs.json").write_text(json.dumps([(raw.hex(), name) for raw, name in BROKE.values()]))
    report = run("--inputs", tmp_path / "inputs.json")
    assert report["inputs"] == len(BROKE)
    assert not report["faults"], [(list(BROKE)[fault["n"]], fault["fault"]) for fault in report["faults"]]


GREEDY = {
    "another exception": "lambda *_: {}['a']", "an unlisted code": "lambda *_: refuse('news')",
    "lost rows": "lambda path, ledger: setattr(ledger, 'n_rows', 5) or []",
    "slower than": "lambda *_: [1 for _ in iter(int, 1)]",
    "grew by": "lambda *_: (bytearray(b'x') * (300 << 20)) and []", "MemoryError": "lambda *_: bytes(1 << 40)"}


@pytest.mark.parametrize("what", GREEDY)
def test_faults_are_seen(what):
    "The fuzzer finds each kind of fault when it is planted."
    code = ("import json\nfrom finetuning_kit.ledger import DataError\nfrom tests import fuzzing\n"
            "def refuse(code):\n    raise DataError(code, 'no')\nread = fuzzing.read_rows\n"
            f"bad = {GREEDY[what]}\nfuzzing.SEEDS = []\nfuzzing.read_rows = bad\n"
            "print(json.dumps(fuzzing.run(0, inputs=[(b'{}', 'rows.jsonl')], count=1)))")
    [fault] = run(code=code)["faults"]
    words = {"another exception": "KeyError", "an unlisted code": "news", "lost rows": "rows are lost"}.get(what, what)
    assert words in fault["fault"]


def test_codes_are_those_of_the_package():
    "No code of the list is a leftover."
    modules = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "finetuning_kit").glob("*.py"))
    assert not [code for code in CODES if f'"{code}"' not in modules]


def test_inputs_are_made_anew():
    "A seed and a number are all that it takes to meet an input again."
    assert [fuzzing.make_input(7, n) for n in range(20)] == [fuzzing.make_input(7, n) for n in range(20)]
    assert fuzzing.make_input(7, 3) != fuzzing.make_input(8, 3)


values = st.recursive(st.sampled_from([odd for odd in ODD if not isinstance(odd, (list, dict))]) | st.text(max_size=8),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner,
                                                                                  max_size=4), max_leaves=14)
odd_rows = st.lists(st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=400, deadline=None)
@given(odd_rows, st.sampled_from(SHAPES))
def test_rows_of_any_values(tmp_path_factory, rows, shape):
    raw = json.dumps([*shape, *({**shape[0], **row} for row in rows), *rows]).encode()
    *_, fault = judge(raw, "rows.json", tmp_path_factory.getbasetemp())
    assert not fault
