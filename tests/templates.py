"""Tokenizers of bytes for the chat templates that TRL ships, with every mark that a template spells.

The chapter `answers` builds them in the reader's view; its cells are run here, so that there is one way to do it.
"""
import ast
import contextlib
import functools
import io
import re
from pathlib import Path

from tests.notebooks import ROOT, code, is_run, read, source


def in_section(cells, heading) -> list:
    "The cells under a heading of the second level, up to the next one."
    found, inside = [], False
    for cell in cells:
        if cell["cell_type"] == "markdown" and "## " in source(cell):
            inside = f"## {heading}" in source(cell)
        elif inside:
            found.append(cell)
    return found


def is_preface(cell) -> bool:
    "Does a cell only import, or is it exported?"
    tree = ast.parse(code(cell)).body
    return source(cell).startswith("#| export") or all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree)


@functools.cache
def section(name, heading) -> dict:
    "The names that one section of a chapter defines, with the chapter's imports and exports."
    [path] = (ROOT / "nbs").glob(f"[0-9][0-9][0-9]_{name}.ipynb")
    cells, names = [cell for cell in read(path)["cells"] if is_run(cell) or cell["cell_type"] == "markdown"], {}
    wanted = in_section(cells, heading)
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in (cell for cell in cells if cell["cell_type"] == "code"):
            if cell in wanted or is_preface(cell):
                exec(compile(code(cell), path.name, "exec", dont_inherit=True), names)
    return names


def reference() -> dict:
    "The section of the chapter `answers` that compares with TRL."
    return section("answers", "Against the reference")


def byte_tokenizer(name):
    "A tokenizer with TRL's template of that name."
    template = (Path(reference()["folder"]) / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = reference()["byte_tokenizer"](name, template)
    tokenizer.chat_template = template
    return tokenizer


def template_names() -> list[str]:
    "The templates that TRL ships, without those that it made for training."
    paths = sorted(Path(reference()["folder"]).glob("*.jinja"))
    return [path.stem for path in paths if not re.search("_training$", path.stem)]
