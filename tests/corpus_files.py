"""Sections A and B of the bad-input table: bytes, containers and the syntax of JSON."""
import gzip
import io
import json
import os
import tarfile
import zipfile
from functools import partial

import pyarrow
from pyarrow import parquet

from finetuning_kit.decoding import LIMITS
from tests.corpus import Case, jsonl, pairs

GOOD = jsonl(*pairs(10))
LINES = GOOD.splitlines(keepends=True)


def put(line, number=6) -> bytes:
    "The good file with one line replaced."
    raw = line if isinstance(line, bytes) else line.encode()
    return b"".join([*LINES[:number - 1], raw + b"\n", *LINES[number:]])


def row(prompt="Why?", completion="So.") -> str:
    "One row; its texts are given as they stand between the quotes."
    return f'{{"prompt": "{prompt}", "completion": "{completion}"}}'


def packed(kind) -> bytes:
    "The good file in a container."
    held = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(held, "w") as archive:
            archive.writestr("rows.jsonl", GOOD)
    elif kind == "tar":
        with tarfile.open(fileobj=held, mode="w") as archive:
            entry = tarfile.TarInfo("rows.jsonl")
            entry.size = len(GOOD)
            archive.addfile(entry, io.BytesIO(GOOD))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(pairs(10)), held)
    return held.getvalue()


def zipped(raw) -> bytes:
    "Bytes packed with gzip, the same on every run."
    return gzip.compress(raw, mtime=0)


def grow(path, size):
    "Put a file of this size, without using the disk."
    path.touch()
    os.truncate(path, size)


BOM = b"\xef\xbb\xbf"
CSV = b"prompt,completion\n" + b"".join(b"What is %d + 1?,%d\n" % (k, k + 1) for k in range(10))
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
LATER_BOM = b"".join(LINES[:4]) + BOM + b"".join(LINES[4:])
BIG = jsonl(*({"prompt": f"{k}?", "completion": "x" * 700} for k in range(15_000)))

BYTES = [
    Case(1, "control", GOOD, "A"),
    Case(2, "zero bytes", b"", "E", "empty_file", words="0 bytes"),
    Case(3, "only line feeds", b"\n\n\n", "E", "no_rows", words="3 blank lines"),
    Case(4, "only a byte order mark", BOM, "E", "no_rows"),
    Case(5, "byte order mark at the start", BOM + GOOD, "N", "byte_order_mark", (1,)),
    Case(6, "byte order mark on a later line", LATER_BOM, "N", "byte_order_mark", (5,)),
    Case(7, "UTF-16, little-endian, marked", b"\xff\xfe" + GOOD.decode().encode("utf-16-le"), "E", "encoding",
         words="UTF-16 text; convert it: `iconv -f UTF-16 -t UTF-8 rows.jsonl > utf8-rows.jsonl`"),
    Case(8, "UTF-16, big-endian, unmarked", GOOD.decode().encode("utf-16-be"), "E", "encoding", (1,),
         "probably UTF-16BE; convert it: `iconv", 1),
    Case(9, "one byte of Latin-1", put(row("Caf\xe9?").encode("latin-1")), "E", "encoding", (6,), "the byte 0xE9", 16),
    Case(10, "decoded twice", put(row("Caf\xc3\xa9?")), "W", "mojibake", (6,), "once read as Windows-1252"),
    Case(10, "decoded twice, as escapes", put(row("Caf\\u00c3\\u00a9?")), "W", "mojibake", (6,)),
    Case(11, "raw NUL", put(row("a\0b")), "E", "nul_byte", (6,), "a NUL character", 14),
    Case(12, "gzip", zipped(GOOD), "A", file="rows.jsonl.gz", n_rows=10),
    Case(13, "gzip under another name", zipped(GOOD), "W", "name_differs", (1,), "gzip", n_rows=10),
    Case(14, "gzip cut off", zipped(GOOD * 99)[:-40], "E", "gzip_truncated", words="whole lines", file="rows.jsonl.gz"),
    Case(15, "gzip bomb", zipped(b"\n" * 2 ** 24), "E", "gzip_bomb", words="unpack to more", file="rows.jsonl.gz"),
    Case(16, "zip archive", packed("zip"), "E", "container", words="a zip archive"),
    Case(16, "tar archive", packed("tar"), "E", "container", words="a tar archive"),
    Case(17, "CSV", CSV, "E", "no_object", (1,), "name the file .csv", 1),
    Case(17, "Parquet", packed("parquet"), "E", "container", words="name it .parquet"),
    Case(17, "Excel sheet", packed("zip"), "E", "container", words="save the sheet as CSV", file="rows.json"),
    Case(18, "HTML page", HTML, "E", "html_page", words="the download failed"),
    Case(19, "Git LFS pointer", POINTER, "E", "lfs_pointer", words="`git lfs pull`"),
    Case(20, "CRLF", GOOD.replace(b"\n", b"\r\n"), "A"),
    Case(21, "bare CR", GOOD.replace(b"\n", b"\r"), "E", "bare_return", (1,), "its lines end as on a Mac"),
    Case(22, "no line feed at the end", GOOD[:-1], "A", n_rows=10),
    Case(23, "last line cut", GOOD[:-9], "E", "cut_short", (10,), "probably cut short", 41),
    Case(24, "line separators inside text", put(row("a\u2028b\x85c\u2029d")), "A"),
    Case(25, "a row of 12 MB", put(row("x" * 12_000_000)), "R", "row_bytes", (6,), "the limit is 1,000,000"),
    Case(26, "a file over the limit", partial(grow, size=LIMITS.file_bytes + 1), "E", "file_bytes",
         words="the limit is 68,719,476,736"),
    Case(27, "no such file", lambda path: None, "E", "missing_file", words="there is no such file"),
    Case(27, "an empty folder", lambda path: path.mkdir(), "E", "no_data_files", words="holds no data files"),
    Case(27, "a pipe", os.mkfifo, "E", "not_a_file", words="a pipe or a device"),
]

SYNTAX = [
    Case(29, "broken in the middle", put('{"prompt": "a" "completion": "b"}'), "E", "syntax", (6,), "comma", 16),
    Case(30, "broken behind 10 MB", BIG + b'{"prompt": oops}\n', "E", "syntax", (15_001,), column=12),
    Case(31, "broken behind blank lines", b"".join(LINES[:5]) + b"\n" * 10 + b'{"prompt": oops}\n', "E", "syntax", (16,
    ),
         column=12),
    Case(32, "blank lines between rows", GOOD.replace(b"\n", b"\n\n"), "N", "blank_lines", (2,), n_rows=10),
    Case(33, "comma at an object's end", put('{"prompt": "a", "completion": "b",}'), "E", "trailing_comma", (6,),
         "remove the comma", 34),
    Case(34, "comma behind every line", GOOD.replace(b"}\n", b"},\n"), "E", "line_comma", (1,), "comma", 48),
    Case(35, "an array", json.dumps(pairs(10)).encode(), "W", "name_differs", (1,), "holds one array", n_rows=10),
    Case(35, "an array, named as one", json.dumps(pairs(10)).encode(), "A", file="rows.json", n_rows=10),
    Case(36, "rows over many lines", b"".join(json.dumps(each, indent=2).encode() + b"\n" for each in pairs(3)), "E",
         "spread_row", (1,), "spread over the lines 1 to 4", 1),
    Case(37, "single quotes", put(str(pairs(1)[0])), "E", "single_quotes", (6,), "as Python prints them", 2),
    Case(38, "comment with slashes", put("// good rows"), "E", "comment", (6,), column=1),
    Case(38, "comment with a hash", put("# good rows"), "E", "comment", (6,), column=1),
    Case(38, "comment behind a row", put(row() + " # good"), "E", "comment", (6,), column=41),
    *(Case(39, word, put(f'{{"prompt": "a", "completion": "b", "score": {word}}}'), "E", "not_a_number", (6,), word, 45)
      for word in ("NaN", "Infinity", "-Infinity")),
    Case(40, "1e999", put('{"prompt": "a", "completion": "b", "score": 1e999}'), "R", "number_range", (6,), "no float"),
    Case(41, "a key twice", put('{"prompt": "a", "completion": "b", "prompt": "c"}'), "E", "repeated_key", (6,),
         "`prompt` stands twice", 36),
    Case(42, "half a character", put(row("a\\ud83db")), "E", "half_character", (6,), "\\ud83d is half", 14),
    Case(43, "raw tab inside text", put(row("a\tb")), "E", "control_character", (6,), "U+0009", 14),
    Case(43, "raw line feed inside text", put(row("a\nb")), "E", "control_character", (6,), "U+000A", 14),
    Case(44, "escaped NUL", put(row("a\\u0000b")), "R", "nul_text", (6,), "\\u0000"),
    Case(45, "3,000 brackets", put("[" * 3_000 + "]" * 3_000), "E", "nesting", (6,), "deeper than 64", 65),
    Case(45, "100,000 brackets", put('{"a":' * 100_000 + "1" + "}" * 100_000), "E", "nesting", (6,), "than 64", 321),
    Case(46, "a number of 30 digits", jsonl(*pairs(3, id=int("7" * 30))), "W", "long_number", (1,), "kept exactly"),
    Case(47, "a list as a row", put('["a", "b"]'), "E", "no_object", (6,), "got a list", 1),
    *(Case(48, f"{word} as a row", put(word), "E", "no_object", (6,), words, 1)
      for word, words in (('"a"', "got text"), ("7", "the number 7"), ("true", "got true"), ("null", "got null"))),
    Case(49, "two objects on a line", put(row() + " " + row()), "E", "extra_data", (6,), column=41),
    Case(50, "a quote inside text", put(row('say "no" twice')), "E", "inner_quote", (6,), column=18),
]
