"""The reader against Python's own decoder, against texts that JSON forbids, against any bytes, and over long files."""
import csv
import gzip
import io
import json
import math
import tracemalloc

import datasets
import pandas
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetuning_kit import decoding
from finetuning_kit.decoding import Limits
from finetuning_kit.ledger import DataError, Ledger
from finetuning_kit.reading import READERS, iter_rows, read_rows
from tests.json_texts import BAD, GOOD

FEW = settings(max_examples=200, deadline=None)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
cell_texts = texts.map(lambda text: text.replace("\r", ""))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12)
rows = st.dictionaries(texts, values, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder for files that are written again and again."
    return tmp_path_factory.mktemp("reading")


def read(path, raw, limits=decoding.LIMITS):
    "What is read from bytes: the rows, or the error; and the ledger."
    path.write_bytes(raw)
    ledger = Ledger(on_bad="skip")
    try:
        return [row.data for row in iter_rows(path, ledger, limits)], ledger
    except DataError as error:
        return error, ledger


# JSON, text by text.

def test_the_suite_is_as_large_as_the_public_one():
    assert len(set(BAD)) >= 188 and len(set(GOOD)) >= 95


def test_every_text_that_json_forbids_is_refused_at_its_line(folder):
    for raw in BAD:
        got, ledger = read(folder / "bad.jsonl", b'{"v": 0}\n' + raw + b'\n{"v": 0}\n')
        if isinstance(got, DataError):
            assert got.place.line == 2 and (got.column or got.code == "bare_return"), raw
        else:  # a number that no float holds, or a NUL: the row is rejected, and the rest is read
            assert [reject.place.line for reject in ledger.rejects] == [2] and got == [{"v": 0}] * 2, raw


def test_every_text_that_json_allows_is_read_as_python_reads_it(folder):
    for raw in GOOD:
        for name, whole in (("good.jsonl", raw + b"\n" + raw), ("good.json", b"[" + raw + b",\n" + raw + b"]")):
            got, ledger = read(folder / name, whole)
            assert got == [json.loads(raw)] * 2 and not ledger.rejects, raw


class NotStrict(ValueError):
    "Python's decoder would let this through."


def strict(line: bytes):
    "A row as Python reads it, with everything refused that JSON does not allow."
    def build(pairs):
        if len(dict(pairs)) != len(pairs):
            raise NotStrict("key")
        return dict(pairs)

    def number(digits):
        value = float(digits)
        if not math.isfinite(value) or value == 0 and set(digits.lower().partition("e")[0]) & set("123456789"):
            raise NotStrict("number")
        return value

    def check(value):
        if isinstance(value, str):
            value.encode("utf-8")
            if "\0" in value:
                raise NotStrict("NUL")
        held = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        for inner in held:
            check(inner)
    row = json.loads(line.decode("utf-8"), object_pairs_hook=build, parse_float=number, parse_constant=number)
    check(row)
    if not isinstance(row, dict):
        raise NotStrict("object")
    return row


pieces = st.sampled_from((
    '{', '}', '[', ']', ',', ':', '"', '"a"', '"a":', '{"a":1}', "1", "-1", "1e5", "01", "1.", "null", "true", "NaN",
    " ", "\t", "\r", "\\", "\\n", "\\u0041", "\\ud83d", "\\ude00", "\\u0000", "\x01", "é", "\u2028", "\ufeff", "//",
    "#", "'", "1e999", "{}"))
lines = st.one_of(
    st.lists(pieces, max_size=12).map("".join),
    rows.map(lambda row: json.dumps(row, ensure_ascii=False)),
    st.tuples(rows.map(json.dumps), st.integers(0, 40), pieces).map(
        lambda made: made[0][:made[1]] + made[2] + made[0][made[1]:]))


@FEW
@given(lines)
@example('{"a": 1}{')
@example('\ufeff{"a": 1}')
@example('\ufeff\ufeff{"a": 1}')
@example("\ufeff\ufeff")
@example('{"a": "\\ud83d\\ude00\\ud83d"}')
def test_a_line_is_read_as_python_reads_it_or_refused_where_strictness_refuses(folder, line):
    bom = "\ufeff".encode()
    raw = line.encode().removeprefix(bom).removeprefix(bom)  # one that begins the file, one that begins a line
    try:
        wanted = strict(raw.strip(b" \t\r"))
    except ValueError:
        wanted = None
    got, ledger = read(folder / "line.jsonl", line.encode() + b'\n{"last": 1}\n')
    if wanted is not None:
        assert got == [wanted, {"last": 1}]
        assert json.dumps(got[0]) == json.dumps(wanted)  # 1 and 1.0 and true are told apart
    elif not raw.strip(b" \t\r"):
        assert got == [{"last": 1}] and ledger.notices["blank_lines"].count == 1
    else:
        assert isinstance(got, DataError) or ledger.rejects


@FEW
@given(st.lists(rows, min_size=1, max_size=4), st.integers(1, 9), st.sampled_from(("\n", "\r\n", "\n\n")))
def test_rows_are_the_same_in_lines_in_an_array_and_in_pieces_of_any_size(folder, wanted, size, feed):
    as_lines = "".join(json.dumps(row, ensure_ascii=False) + feed for row in wanted).encode()
    as_array = json.dumps(wanted, ensure_ascii=False, indent=size % 3 or None).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "PIECE", size)
        for name, raw in (("a.jsonl", as_lines), ("a.json", as_array), ("a.json.gz", gzip.compress(as_array))):
            got, ledger = read(folder / name, raw)
            assert got == wanted and ledger.n_rows == len(wanted), name


@FEW
@given(st.binary(max_size=300), st.sampled_from(sorted(READERS)), st.booleans(),
       st.sampled_from((b"", b"[", b'{"a":1}\n')))
def test_any_bytes_give_rows_or_one_sentence(folder, raw, suffix, is_packed, start):
    raw = gzip.compress(start + raw) if is_packed else start + raw
    got, ledger = read(folder / f"any{suffix}{'.gz' * is_packed}", raw, Limits(row_bytes=200))
    if isinstance(got, DataError):
        assert got.code.isidentifier() and got.problem and "\n" not in str(got)
    else:
        assert len(got) + len(ledger.rejects) == ledger.n_rows


@FEW
@given(st.lists(st.lists(cell_texts, min_size=2, max_size=2), min_size=1, max_size=5), st.sampled_from((",", "\t")))
def test_a_table_gives_back_the_texts_that_python_wrote(folder, cells, delimiter):
    held = io.StringIO(newline="")
    writer = csv.writer(held, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([["one", "two"], *cells])
    got, ledger = read(folder / ("table.csv" if delimiter == "," else "table.tsv"), held.getvalue().encode())
    wanted = [dict(zip(("one", "two"), pair)) for pair in cells if pair != ["one", "two"]]
    if not wanted:
        assert got.code == "no_rows"
    else:
        assert got == wanted


# The same rows from everywhere.

def test_every_source_gives_the_same_rows_unchanged(folder):
    wanted = [{"prompt": "2024-01-05", "completion": "007"}, {"prompt": "1e5", "completion": "null"},
              {"prompt": "a,b;c\td", "completion": 'say "no"\nor yes'}, {"prompt": "é\u2028", "completion": "true"}]
    frame, folder = pandas.DataFrame(wanted), folder / "sources"
    (folder / "many").mkdir(parents=True)
    as_lines = "".join(json.dumps(row) + "\n" for row in wanted)
    (folder / "rows.jsonl").write_text(as_lines)
    (folder / "rows.json").write_text(json.dumps(wanted, indent=1))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(as_lines.encode()))
    frame.to_csv(folder / "rows.csv", index=False)
    frame.to_csv(folder / "rows.tsv", index=False, sep="\t")
    frame.to_parquet(folder / "rows.parquet")
    for number, row in enumerate(wanted):
        (folder / "many" / f"{number}.jsonl").write_text(json.dumps(row))
    files = [path for path in sorted(folder.iterdir())]
    assert len(files) == 7
    made = datasets.Dataset.from_list(wanted)
    memory = [wanted, tuple(wanted), iter(wanted), frame, made, made.to_iterable_dataset()]
    for source in [*files, *map(str, files), *memory]:
        assert [row.data for row in read_rows(source)] == wanted, source


def test_values_that_others_change_stay_as_they_are(folder):
    wanted = [{"day": "2024-01-05T00:00:00", "id": 2 ** 70, "score": 0.1, "n": 1, "flag": True, "none": None,
    "list": [1, "1"]},
              {"day": "never", "id": "seven", "score": 1e-300, "n": 1.0, "flag": 1, "none": "", "list": [[], {}]}]
    got, ledger = read(folder / "kept.jsonl", "".join(json.dumps(row) + "\n" for row in wanted).encode())
    assert json.dumps(got) == json.dumps(wanted)
    assert ledger.notices["long_number"].places[0].line == 1


# Long files.

@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.txt"])
def test_a_long_file_is_read_in_little_memory(folder, name):
    row = {"prompt": "What is it? " * 20, "completion": "It is what it is. " * 20}
    line, n_rows = json.dumps(row), 12_000
    if ".csv" in name:
        raw = ("prompt,completion\n" + ",".join(row.values()) + "\n").encode() + (
            ",".join(row.values()) + "\n").encode() * (n_rows - 1)
    elif name == "rows.json":
        raw = ("[" + ",\n".join([line] * n_rows) + "]").encode()
    else:
        raw = (line + "\n").encode() * n_rows
    path = folder / name
    path.write_bytes(gzip.compress(raw, 1) if name.endswith(".gz") else raw)
    limits = Limits(gzip_ratio=1000)
    tracemalloc.start()
    try:
        n_read = sum(1 for _ in iter_rows(path, Ledger(), limits))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_read == n_rows and len(raw) > 7_000_000
    assert peak < 5_000_000, f"{peak:,} bytes for a file of {len(raw):,}"
