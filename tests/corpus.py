"""What a case of the bad-input table is: a file, and the outcome it must have.

Outcomes: "E" stops at once; "R" rejects the rows on `lines`; "W" warns; "N" reads the rows as something else and says
so; "A" accepts. Lines are physical and count from 1. For N and W, `lines` are the places that the notice names first.
"""
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    number: int  # of the table
    name: str  # what is odd about the file
    content: bytes | Callable[[Path], None]  # the file's bytes, or what puts something at its path
    outcome: str  # E, R, W, N or A
    code: str = ""  # of the error, the rejects or the notice
    lines: tuple = ()  # where
    words: str = ""  # the message holds them
    column: int | None = None  # of the error
    file: str = "rows.jsonl"  # its name
    n_rows: int | None = None  # rows read, good and bad; None: as many as the file has lines
    stage: str = "load"  # who judges it: load, check or encode
    settings: dict = {}  # of the run that encodes it, and its chat template as `template`

    def write(self, folder: Path) -> Path:
        "Put the file into a folder."
        path = folder / self.file
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        return path

    def count(self) -> int:
        "Rows that are read."
        return self.content.count(b"\n") if self.n_rows is None else self.n_rows


def jsonl(*rows) -> bytes:
    "Rows as JSON Lines."
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def pairs(n, **more) -> list:
    "Good rows with a prompt and a completion."
    return [{"prompt": f"What is {k} + 1?", "completion": str(k + 1), **more} for k in range(n)]
