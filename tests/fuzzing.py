"""Bytes in, rows or a listed error out: the reader under mutated files, each within two seconds and 256 MB.

    python -m tests.fuzzing --seed 7 --count 5000          this many inputs, in this process
    python -m tests.fuzzing --seed 7 --seconds 600         as many as fit
    python -m tests.fuzzing --seed 7 --show 123            the bytes of one input, and what becomes of it

An input is made anew from its seed and number, so a line of the output is all it takes to meet it again. The report is
one object of JSON: how many inputs, the slowest, the largest growth of memory, and the inputs that broke the rule.
"""
import argparse
import collections
import gzip
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import zlib
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow
from pyarrow import parquet

from finetuning_kit.decoding import FOREIGN_BYTES
from finetuning_kit.ledger import DataError, Ledger
from finetuning_kit.loading import iter_records
from finetuning_kit.reading import read_rows
from finetuning_kit.validation import validate_dataset
from tests import corpus_columns, corpus_files, corpus_turns, json_texts
from tests.corpus import jsonl, pairs

SECONDS = 2.0  # of computing, for one input and one way to read it
N_CHECKED = 5000  # rows that are checked; a check takes its time for each
MOST = 2_000_000  # bytes of an input, also when it is unpacked
MOST_LINES = 200_000  # lines of an input, each of which takes its time
MEGABYTES = 256  # that the process may grow by, beyond what it has after its imports

# Codes that a file may be refused with, and a row rejected with.
CODES = {
    *(code for _, code, *_ in FOREIGN_BYTES), "ambiguous", "bad_call", "bad_record", "bad_turn", "bare_return",
    "comment", "control_character", "cut_short", "delimiter", "empty_file", "empty_row", "extra_data", "field_count",
    "gzip_bomb", "gzip_damaged", "gzip_truncated", "half_character", "header", "inner_quote", "line_comma",
    "missing_field", "missing_key", "misspelt_column", "misspelt_key", "mixed_shapes", "name_differs", "nesting",
    "no_answer", "no_object", "no_preference", "no_rows", "no_shared_prompt", "no_turns", "no_value", "not_a_number",
    "not_json", "not_text", "nul_byte", "nul_text", "null_value", "number_range", "parquet_damaged", "python_word",
    "quotes", "repeated_key", "rounded_number", "row_bytes", "single_quotes", "spread_row", "stray_result", "syntax",
    "trailing_comma", "two_systems", "two_values", "unclosed", "unknown_columns", "unknown_kind", "unknown_role",
    "wrong_type",
}


# Seeds.

def packed_rows(rows) -> bytes:
    "Rows as Parquet; what has no one type of Arrow is written as JSON."
    held = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), held)
    except pyarrow.ArrowException:
        return packed_rows([{name: json.dumps(value) for name, value in row.items()} for row in rows])
    return held.getvalue()


def table(rows, delimiter=",") -> bytes:
    "Rows as a table of text."
    names = list(rows[0])
    lines = [names, *([str(row.get(name)) for name in names] for row in rows)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in lines]
    return "".join(delimiter.join(line) + "\n" for line in quoted).encode()


# Rows of every shape that is known.
SHAPES = [
    pairs(4), [corpus_columns.ALPACA] * 3, [corpus_columns.PAIR] * 2, [corpus_columns.SHAREGPT] * 2,
    [corpus_columns.VERDICT] * 2, [corpus_columns.TURNS], [{"text": "Bees make honey."}, {"text": "Mars looks red."}],
    corpus_turns.GOOD[:3],
    [{"instruction": "Go on.", "output": "On.", "history": [["Hi", "Hello"]], "system": "Be kind."}],
    [{"segments": [{"label": False, "text": "2 + 3 ="}, {"label": True, "text": " 5"}]}],
    [{"messages": [corpus_turns.ASKED, corpus_turns.CALLS, {"role": "tool", "content": "21", "tool_call_id": "call_1"},
                   corpus_turns.SAYS], "tools": '[{"name": "look", "parameters": {}}]'}],
    [{"conversations": [{"from": "human", "value": "Weather?"},
                        {"from": "function_call", "value": '{"name": "look", "arguments": {"city": "Lima"}}'},
                        {"from": "observation", "value": "21"}, {"from": "gpt", "value": "Fine."}],
      "tools": "[]", "system": "Be kind."}],
    [{"question": "What?", "response": "That."}, {"prompt": "a", "response": "b", "id": 7}],
    [{"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
      "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]}],
    [{"messages": [corpus_turns.ASKED, {"role": "assistant", "content": corpus_columns.TEXTS, "weight": 0.5}]}],
]
SEEDS = [(case.content, case.file) for case in corpus_files.BYTES + corpus_files.SYNTAX + corpus_columns.CASES
         + corpus_turns.CASES if isinstance(case.content, bytes) and len(case.content) < 200_000]
SEEDS += [(b"\n".join(lines), "rows.jsonl") for lines in (json_texts.GOOD, json_texts.BAD)]
SEEDS += [(line, "rows.jsonl") for line in json_texts.GOOD[::3] + json_texts.BAD[::3]]
for rows in SHAPES:
    SEEDS += [(jsonl(*rows), "rows.jsonl"), (json.dumps(rows, indent=1).encode(), "rows.json"),
              (table(rows), "rows.csv"), (table(rows, "\t"), "rows.tsv"), (packed_rows(rows), "rows.parquet"),
              (gzip.compress(jsonl(*rows), mtime=0), "rows.jsonl.gz")]
SEEDS += [(b"One.\n\nTwo,\nthree.\n", "rows.txt"), (corpus_files.CSV.decode().encode("utf-16"), "rows.csv"),
          (corpus_files.GOOD.decode().encode("utf-16-le"), "rows.jsonl"), (corpus_files.packed("zip"), "rows.xlsx"),
          (gzip.compress(corpus_files.CSV, mtime=0), "rows.csv.gz"), (b"a;b\n1;2\n", "rows.csv"), (b"", "rows.parquet")]
NAMES = ["rows" + end for end in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".csv.gz",
                                  ".ndjson", ".xlsx", ".gz", "")]


# Mutations. Each takes the bytes and a source of chance.

TOKENS = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"'", b"\n", b"\r", b"\r\n", b"\t", b"\0", b" ", b"\xef\xbb\xbf",
    b"\xff", b"\xe2\x80\xa8", b"\xc3\x83\xc2\xa9", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\\u0000", b"\\ud800",
    b"\\udc00", b"\\u00c3\\u00a9", b"\\u", b"\\x", b"NaN", b"-Infinity", b"1e999", b"-0", b"0.1e-400", b"1" * 25,
    b"null", b"true", b"[]", b"{}", b'""', b'{"a":1}', b"//", b"#", b"/*", b"<html", b"PK\x03\x04", b"\x1f\x8b",
    b"PAR1", b"None", b"True", b'"messages":', b'"role":"user",', b'"content":', b'"weight":-1,',
    b'"tool_calls":[{}],', b'"from":"gpt",', b"<s>[INST]", b"<|im_end|>", b"\xe2\x80\xae", b"\x1b[0m", b"\\\\",
    b'\\"', b'""""', b";", b"|", b"=1+1", b"\xf0\x9f\x98\x80\xe2\x80\x8d",
]


def place(raw, chance) -> int:
    "An offset."
    return chance.randrange(len(raw) + 1)


def stretch(raw, chance, most=4096) -> tuple[int, int]:
    "A stretch, mostly a short one."
    start = place(raw, chance)
    return start, min(len(raw), start + int(2 ** chance.uniform(0, most.bit_length())))


def flip(raw, chance):
    "Turn some bits over."
    raw = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if raw:
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(raw)


def overwrite(raw, chance):
    "Put other bytes in place of some."
    start, end = stretch(raw, chance, 16)
    return raw[:start] + bytes(chance.choices((0, 1, 127, 128, 255, chance.randrange(256)), k=end - start)) + raw[end:]


def insert(raw, chance):
    "Insert a word."
    at = place(raw, chance)
    return raw[:at] + chance.choice(TOKENS) * chance.choice((1, 1, 1, 2, 3)) + raw[at:]


def cut(raw, chance):
    "Take a stretch out."
    start, end = stretch(raw, chance)
    return raw[:start] + raw[end:]


def truncate(raw, chance):
    "Break off."
    return raw[:place(raw, chance)] if chance.random() < 0.7 else raw[place(raw, chance):]


def repeat(raw, chance):
    "Repeat a stretch, now and then very often."
    start, end = stretch(raw, chance)
    times = min(chance.choice((2, 2, 3, 10, 1000, 10 ** 6)), 400_000 // max(1, end - start))
    return raw[:end] + raw[start:end] * times + raw[end:]


def splice(raw, chance):
    "Go on with another seed."
    other, _ = chance.choice(SEEDS)
    return raw[:place(raw, chance)] + other[place(other, chance):]


def nest(raw, chance):
    "Open brackets, many of them, perhaps closed again."
    at, depth = place(raw, chance), chance.choice((3, 60, 64, 65, 100, 1000, 3000, 100_000))
    opened, closed = chance.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]"), (b'"', b'"'), (b"\\", b"\\")))
    return raw[:at] + opened * depth + chance.choice((b"", b"1")) + closed * chance.choice((0, depth)) + raw[at:]


def number(raw, chance):
    "Put a large number in place of a digit."
    digits = [found.start() for found in re.finditer(rb"\d", raw)] or [len(raw)]
    at, n = chance.choice(digits), chance.choice((20, 400, 4000, 4001, 4301, 5000, 100_000))
    large = chance.choice((b"9" * n, b"0." + b"0" * n + b"1", b"1e" + b"9" * min(n, 400), b"-" + b"1" * n + b".5",
                           b"1" + b"0" * n, b"0" * n))
    return raw[:at] + large + raw[at + 1:]


def long_line(raw, chance):
    "Take the line feeds out, or make one line very long."
    if chance.random() < 0.3:
        return raw.replace(b"\n", b"")
    at = place(raw, chance)
    word = chance.choice((*TOKENS, b"a", b"ab ", b"\xc3\xa9", b"A" * 50 + b" ", b"\xc3\x83\xc2\xa9 "))
    return raw[:at] + word * (chance.choice((10 ** 3, 10 ** 5, 1_100_000)) // len(word)) + raw[at:]


def line_ends(raw, chance):
    "Other line ends."
    return raw.replace(b"\n", chance.choice((b"\r", b"\r\n", b"\n\n", b"\x0b", b"\xe2\x80\xa8", b",\n", b"\0")))


def shuffle(raw, chance):
    "The lines in another order, some twice."
    lines = raw.splitlines(keepends=True)
    return b"".join(chance.choices(lines, k=len(lines))) if lines else raw


def encode(raw, chance):
    "Another encoding."
    text = raw.decode("utf-8", "replace")
    return text.encode(chance.choice(("utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp1252")),
                       "replace")


def pack(raw, chance):
    "Pack with gzip, perhaps twice, perhaps damaged."
    raw = gzip.compress(raw[:MOST], mtime=0)
    return chance.choice((lambda raw, _: raw, lambda raw, _: gzip.compress(raw, mtime=0), lambda raw, _: raw * 2,
                          flip, truncate))(raw, chance)


ODD = [
    None, True, False, 0, -1, 7, 0.5, 1e300, 10 ** 30, "", " ", "a", "user", "assistant", "tool", "system",
    "narrator", "gpt", "5", "true", "{}", "[]", "[1]", '{"a":', "null", '{"name": "f", "arguments": {}}',
    '{"a": 1e999}', "\\ud800", [], {}, [[]], [{}], [None], [""], {"": ""}, {"text": "a"}, [{"text": "a"}],
    {"role": "user", "content": "Hi"}, [{"role": "user", "content": "Hi"}], [["a", "b"]], [["a"]], [[1, 2]], "\u202e",
    "\ufffd", "e\u0301", "x" * 5000, {"a": {"b": {"c": [1, [2, [3]]]}}}, [True],
    [{"type": "image", "image": "a.png"}], "<|im_end|>", "\u0000",
]
KEYS = [
    "prompt", "completion", "messages", "role", "content", "from", "value", "weight", "tools", "tool_calls", "label",
    "chosen", "rejected", "instruction", "input", "output", "system", "history", "segments", "text", "conversations",
    "id", "name", "arguments", "function", "thinking", "parts", "response", "question", "Prompt", "mesages", "",
    "a.b",
]


def vary(value, chance, share=0.15):
    "Change some of what is nested in a value."
    if chance.random() < share / 2:
        return chance.choice(ODD)
    if isinstance(value, dict):
        items = [(chance.choice(KEYS) if chance.random() < share / 3 else key, vary(item, chance, share))
                 for key, item in value.items() if chance.random() > share / 3]
        if chance.random() < share:
            items.insert(chance.randrange(len(items) + 1), (chance.choice(KEYS), chance.choice(ODD)))
        return dict(items)
    if isinstance(value, list):
        items = [vary(item, chance, share) for item in value for _ in range(chance.choice((1,) * 9 + (0, 2, 3)))]
        return chance.sample(items, len(items)) if chance.random() < share else items
    return value


def varied_rows(chance) -> list:
    "Rows of one shape or of two, changed in places."
    rows = [*chance.choice(SHAPES), *(chance.choice(SHAPES) if chance.random() < 0.2 else ())]
    return [vary(row, chance, chance.choice((0.05, 0.15, 0.4))) for row in rows * chance.choice((1, 1, 1, 2, 30))]


# Columns that a table of Parquet may have.
COLUMNS = [
    lambda n: pyarrow.array([date(2024, 1, 5)] * n), lambda n: pyarrow.array([datetime(1, 1, 1)] * n),
    lambda n: pyarrow.array([2 ** 62] * n, pyarrow.timestamp("ns", "Europe/Paris")),
    lambda n: pyarrow.array([-2 ** 62] * n, pyarrow.timestamp("ms")),
    lambda n: pyarrow.array([2 ** 62] * n, pyarrow.duration("s")), lambda n: pyarrow.array([b"\xff\xfe"] * n),
    lambda n: pyarrow.array([Decimal("1.5")] * n), lambda n: pyarrow.nulls(n),
    lambda n: pyarrow.array([float("nan"), float("inf")] * n)[:n],
    lambda n: pyarrow.array(["a"] * n).dictionary_encode(),
    lambda n: pyarrow.array([[("a", 1)]] * n, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    lambda n: pyarrow.array([2 ** 40] * n, pyarrow.time64("us")),
    lambda n: pyarrow.array([2 ** 30] * n, pyarrow.date32()),
    lambda n: pyarrow.array([b"\xff"] * n).view(pyarrow.string()),
    lambda n: pyarrow.array(["a\0b", "\ud7ff", ""] * n)[:n],
    lambda n: pyarrow.array([[{"role": "user"}], None] * n)[:n],
]


def parquet_bytes(columns, **options) -> bytes:
    "Columns, as arrays of Arrow by name, as a file of Parquet."
    held = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(list(columns.values()), names=list(columns)), held, **options)
    return held.getvalue()


def odd_parquet(chance) -> bytes:
    "A table of Parquet whose columns hold what columns can."
    n, names, columns = chance.choice((1, 3, 100, 201)), chance.sample(KEYS, chance.choice((1, 2, 3))), {}
    for name in names:
        plain = pyarrow.array([chance.choice(("Hi", "", "a b"))] * n)
        columns[name] = chance.choice(COLUMNS)(n) if chance.random() < 0.6 else plain
    return parquet_bytes(columns, compression=chance.choice(("none", "snappy", "gzip", "zstd")))


MUTATIONS = (flip, flip, overwrite, insert, insert, insert, cut, cut, truncate, repeat, splice, nest, number, long_line,
             line_ends, shuffle, encode, pack)


def within_most(raw) -> bytes:
    "As much of an input as should be read in two seconds; packed, a little where it would unpack to more."
    try:
        text = zlib.decompressobj(31).decompress(raw, MOST)
        return raw[:1000] if len(text) == MOST or text.count(b"\n") > MOST_LINES else raw[:MOST]
    except zlib.error:
        return b"\n".join(raw[:MOST].split(b"\n", MOST_LINES)[:MOST_LINES])


def make_input(seed, n) -> tuple[bytes, str]:
    "Input number `n`: its bytes and the file's name."
    chance = random.Random(f"{seed}/{n}")
    kind = chance.random()
    if kind < 0.3:
        rows, name = varied_rows(chance), chance.choice(("rows.jsonl", "rows.jsonl", "rows.json"))
        raw = jsonl(*rows) if name == "rows.jsonl" else json.dumps(rows).encode()
        raw = raw if chance.random() < 0.8 else chance.choice(MUTATIONS)(raw, chance)
    elif kind < 0.37:
        raw, name = odd_parquet(chance), "rows.parquet"
        raw = raw if chance.random() < 0.6 else chance.choice((flip, flip, overwrite, cut, truncate))(raw, chance)
    else:
        raw, name = chance.choice(SEEDS)
        for _ in range(chance.choice((1, 1, 2, 2, 3, 5))):
            raw = chance.choice(MUTATIONS[:9] if name.endswith("parquet") else MUTATIONS)(raw, chance)[:MOST]
    return within_most(raw), name if chance.random() < 0.95 else chance.choice(NAMES)


# Running.

class TooSlow(BaseException):
    "An input has computed for too long; not even `except Exception` may hold it up."


def ring(*_):
    "End what runs."
    raise TooSlow


def memory(name="VmHWM") -> float:
    "Megabytes of this process: VmHWM, the most since the last reset, or VmRSS, now."
    try:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2 ** 20)


def reset_peak():
    "Forget the most; where the system cannot, it stays."
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def read_all_ways(path) -> str:
    "Read a file in three ways; give what became of it, in a word, or raise what is not allowed."
    ledger, ends, rows = Ledger("skip"), set(), ()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        rows = read_rows(path, ledger)
        assert len(rows) + ledger.n_rejected.total() == ledger.n_rows, "rows are lost"
        codes = set(ledger.n_rejected)
        ends.add("rows")
    except DataError as error:
        codes = {error.code}
        ends.add(error.code)
    ledger = Ledger("skip")
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        records = list(iter_records(path, None, ledger, allow_mixture=len(str(codes)) % 2 == 0))
        assert len(records) + ledger.n_rejected.total() == ledger.n_rows, "records are lost"
        codes |= set(ledger.n_rejected)
    except DataError as error:
        codes.add(error.code)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        str(validate_dataset(path if len(rows) <= N_CHECKED else rows[:N_CHECKED]))
    except DataError as error:
        codes.add(error.code)
    assert codes <= CODES, f"codes {codes - CODES}"
    return min(ends)


def judge(raw, name, folder) -> tuple[str, float, float, str]:
    "What becomes of an input, its seconds, its megabytes, and what broke the rule."
    path = Path(folder, name)
    path.write_bytes(raw)
    signal.signal(signal.SIGPROF, ring)
    reset_peak()
    began, fault, end = time.process_time(), "", ""
    try:
        try:
            end = read_all_ways(path)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except TooSlow:
        fault = f"slower than {SECONDS} s\n" + "".join(traceback.format_exc(limit=-6))
    except Exception as error:  # noqa: BLE001 (that is what is looked for)
        fault = f"{type(error).__name__}: {error}"[:500] + "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
    seconds, grown = time.process_time() - began, memory()
    path.unlink()
    return end, seconds, grown, fault


def run(seed, count=None, seconds=None, progress=None, inputs=None) -> dict:
    "Judge many inputs."
    with tempfile.TemporaryDirectory() as folder:
        for raw, name in SEEDS[::9]:  # what is imported late is imported now
            judge(raw, name, folder)
        base, ends, faults, most = memory("VmRSS"), collections.Counter(), [], {"slowest": (0, -1), "largest": (0, -1)}
        limit = int(float(Path("/proc/self/statm").read_text().split()[0]) * 4096) + 2 ** 31 if os.path.exists(
            "/proc/self/statm") else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        began, n = time.monotonic(), 0
        while (count is None or n < count) and (seconds is None or time.monotonic() - began < seconds):
            if progress is not None:
                os.pwrite(progress, f"{n:12}".encode(), 0)
            raw, name = make_input(seed, n) if inputs is None else inputs[n]
            end, spent, grown, fault = judge(raw, name, folder)
            grown -= base
            if not fault and grown > MEGABYTES:
                fault = f"grew by {grown:.0f} MB"
            ends[end] += 1
            most["slowest"], most["largest"] = max(most["slowest"], (spent, n)), max(most["largest"], (grown, n))
            if fault:
                faults.append({"seed": seed, "n": n, "name": name, "bytes": len(raw), "fault": fault})
                print(json.dumps(faults[-1]), file=sys.stderr, flush=True)
            n += 1
    return {"seed": seed, "inputs": n, "seconds": round(time.monotonic() - began, 1), **most,
            "ends": dict(ends.most_common()), "faults": faults}


def main() -> int:
    "The command."
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--progress", help="a file that holds the number of the input at hand")
    parser.add_argument("--inputs", help="JSON: inputs in place of made ones, as pairs of digits and name")
    parser.add_argument("--show", type=int)
    options = parser.parse_args()
    if options.show is not None:
        raw, name = make_input(options.seed, options.show)
        print(name, len(raw), raw[:2000])
        with tempfile.TemporaryDirectory() as folder:
            print(*judge(raw, name, folder), sep="\n")
        return 0
    progress = os.open(options.progress, os.O_RDWR | os.O_CREAT) if options.progress else None
    given = json.loads(Path(options.inputs).read_text()) if options.inputs else []
    inputs = [(bytes.fromhex(raw), name) for raw, name in given] or None
    report = run(options.seed, len(given) if inputs else options.count, options.seconds, progress, inputs)
    print(json.dumps(report))
    return bool(report["faults"])


if __name__ == "__main__":
    sys.exit(main())
