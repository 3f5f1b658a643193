"""The ledger: sums that balance for any mixture of rows in any order, and a rejects file that survives a kill."""
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning_kit.ledger import (
    N_KEPT, N_SHOWN, DataError, Ledger, Reject, RejectedRows, RejectsFile, balance, balance_line, ledger_html,
    ledger_markdown, reject_line)
from finetuning_kit.records import Place
from finetuning_kit.settings import FinetuningError

QUICK = settings(max_examples=80, deadline=None, derandomize=True)
FATES = st.sampled_from(["trained", "held out", "skipped: too_long", "bad", "worse"])
ROWS = st.lists(st.tuples(FATES, st.integers(0, 50), st.integers(0, 20)), max_size=40)


def keep_books(rows, on_bad="skip", on_reject=None) -> Ledger:
    "A ledger of rows with a fate, tokens and tokens that were cut."
    ledger = Ledger(on_bad=on_bad, on_reject=on_reject)
    for line, (fate, n_tokens, n_cut) in enumerate(rows, 1):
        ledger.n_rows += 1
        if fate in ("bad", "worse"):
            ledger.reject(Place("rows.jsonl", line), fate, f"a {fate} row", {"line": line})
            continue
        ledger.n_tokens += n_tokens + n_cut
        ledger.spend(fate, 1, n_tokens)
        ledger.spend("cut: too_long", 0, n_cut)
    return ledger


@QUICK
@given(ROWS, st.randoms(use_true_random=False))
def test_any_mixture_balances_in_any_order(rows, draw):
    ledger = keep_books(rows)
    ledger.check()
    ledger.settle()
    other = keep_books(draw.sample(rows, len(rows)))
    assert (other.rows, other.tokens, other.n_rejected) == (ledger.rows, ledger.tokens, ledger.n_rejected)
    lines = balance(ledger)
    assert lines[0][1:] == lines[-1][1:] == (len(rows), ledger.n_tokens)
    assert sum(rows for _, rows, _ in lines[1:-1]) == len(rows)
    assert " read = " in balance_line(ledger) and " read = " in balance_line(ledger, "tokens")


@QUICK
@given(ROWS)
def test_skipping_gives_what_the_cleaned_rows_give(rows):
    good = [row for row in rows if row[0] not in ("bad", "worse")]
    skipped, clean = keep_books(rows), keep_books(good, on_bad="stop")
    clean.settle()
    n_bad = len(rows) - len(good)
    assert +Counter(skipped.tokens) == +Counter(clean.tokens)
    assert sum(skipped.n_rejected.values()) == n_bad
    if n_bad:
        with pytest.raises(RejectedRows, match=f"{n_bad} of {len(rows)} rows cannot be used"):
            keep_books(rows, on_bad="stop").settle()


@QUICK
@given(ROWS, st.sampled_from(["rows", "tokens"]), st.integers(-3, 3).filter(bool))
def test_what_is_unaccounted_for_is_found(rows, what, lost):
    ledger = keep_books(rows)
    setattr(ledger, f"n_{what}", getattr(ledger, f"n_{what}") + lost)
    with pytest.raises(DataError, match=f"{what} were read and"):
        ledger.check()
    assert "is not" in balance_line(ledger, what)


def test_errors_have_a_code_and_a_place():
    error = DataError("empty_file", "the file is empty", "a.jsonl")
    assert isinstance(error, FinetuningError) and str(error) == "a.jsonl: empty_file: the file is empty"
    assert str(DataError("x", "y", Place("a", 2), 7)) == "a:2:7: x: y" and str(DataError("x", "y")) == "x: y"
    with pytest.raises(FinetuningError, match="`on_bad` must be stop or skip, got None"):
        Ledger(on_bad=None)


def test_memory_is_bounded_and_the_message_short():
    ledger = keep_books([("bad", 0, 0)] * 5000)
    assert (len(ledger.rejects), ledger.n_rejected["bad"]) == (N_KEPT, 5000)
    assert len(str(RejectedRows(ledger)).splitlines()) == 3
    for line in range(5000):
        ledger.note("odd", "odd", Place("a", line))
    assert (len(ledger.notices["odd"].places), ledger.notices["odd"].count) == (N_KEPT, 5000)


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "a|b", "<img src=x onerror=y>", '"&<'])
def test_displays_escape_what_comes_from_data(evil):
    ledger = Ledger(n_rows=1)
    ledger.spend(f"skipped: {evil}", 1)
    ledger.note(evil, evil, Place(evil, 1))
    page = ledger_html(ledger)
    assert "<script" not in page and "<img" not in page
    table = ledger_markdown(ledger)
    assert "<script" not in table and "<img" not in table
    assert {line.count("|") for line in table.splitlines() if line} == {4}


# --- the rejects file -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", [
    {"a": 1}, "raw \u2028 text", None, {"x": float("nan")}, {"x": float("inf")}, "\ud800", b"bytes", {"t": {1, 2}},
    {"big": 10 ** 40}, {1: "a number as a key"}, ["ä", "\n", "\x00"]])
def test_any_row_is_one_line_of_strict_json(row):
    line = reject_line(Reject(Place("a", 1), "bad", "bad", row))
    assert line.endswith(b"\n") and line.count(b"\n") == 1

    def refuse(name):
        raise ValueError(name)
    read = json.loads(line.decode("utf-8"), parse_constant=refuse)
    assert set(read) == {"file", "line", "code", "problem", "row"}


def test_rows_are_on_disk_before_the_file_is_closed(tmp_path):
    path = tmp_path / "new folder" / "rejects.jsonl"
    with RejectsFile(path) as rejects:
        for n in range(1, 4):
            keep_books([("bad", 0, 0)], on_reject=rejects)
            assert len(path.read_bytes().splitlines()) == n == rejects.n_rows
    rejects.close()
    RejectsFile(path).close()
    assert path.read_bytes() == b""
    with pytest.raises(DataError, match="rejects_file: cannot be written"):
        RejectsFile(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_the_file_is_whole_when_the_process_is_killed(tmp_path):
    script = ("import sys, os\nfrom finetuning_kit.ledger import Place, Reject, RejectsFile\n"
              "rejects = RejectsFile(sys.argv[1])\n"
              "for line in range(1, 10**9):\n"
              "    rejects(Reject(Place('a', line), 'bad', 'ä' * (line % 5000), {'line': line}))\n"
              "    os.write(1, b'%d\\n' % line)\n")
    for trial in range(3):
        path = tmp_path / f"{trial}.jsonl"
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, env=os.environ)
        for _ in range(50 + 77 * trial):
            process.stdout.readline()
        process.kill()
        said = process.stdout.read().split(b"\n")
        process.wait()
        lines = [json.loads(line)["line"] for line in path.read_bytes().decode("utf-8").splitlines()]
        assert lines == list(range(1, len(lines) + 1))
        assert len(lines) >= max([0, *map(int, filter(None, said[:-1]))])
