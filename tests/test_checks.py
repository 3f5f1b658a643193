"""Each check passes a tiny tree of two chapters, and complains of a fault planted in it."""
import json
import os
import shutil

import pytest

from tests import checks, notebooks
from tests.notebooks import ROOT, WIDGET_VIEW

ALPHA = '''\
#| default_exp alpha
---
# Alpha

> It doubles numbers, and says so.

This chapter has one idea, and the reader who has understood doubling has understood it whole. Before you run the next
cell, say aloud what twice three is; then look, and be content. Nothing here needs more than a second on any machine.
---
#| export
def double(
    number: int,  # what to double
) -> int:  # twice as much
    "Twice the number."
    return 2 * number
---
print(double(3))
'''
BETA = '''\
#| default_exp beta
---
# Beta

> It doubles twice, with what the chapter above has built.

Four times is twice twice, so this chapter imports the doubling of the one above and applies it two times over. It says
so in more words than lines of code, for that is what a chapter should do: explain first, then run what it explained.
---
#| export
from finetuning_kit.alpha import double
---
#| export
def quadruple(
    number: int,  # what to take four times
) -> int:  # four times as much
    "Four times the number."
    return double(double(number))
---
quadruple(3), "and no network"
---
#| cuda
print("never run here")
'''
INDEX = '''\
# Tiny

Begin with [alpha](000_alpha.ipynb).
---
#| hide
print("hidden")
---
from finetuning_kit import quadruple
print(quadruple(10))
'''


def notebook_of(script) -> dict:
    "A notebook from cells parted by lines of three dashes; those that start like prose are prose."
    cells = []
    for i, cell in enumerate(script.split("---\n")):
        kind = {"cell_type": "markdown"} if cell.startswith("# ") else {
            "cell_type": "code", "outputs": [], "execution_count": None}
        cells.append({**kind, "id": f"cell{i}", "metadata": {}, "source": cell.strip("\n").splitlines(keepends=True)})
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "A tree in which all is well, its outputs stored and its modules exported."
    root = tmp_path_factory.mktemp("tiny tree")
    for folder in ("nbs", "finetuning_kit"):
        (root / folder).mkdir()
    shutil.copy(ROOT / "finetuning_kit" / "__init__.py", root / "finetuning_kit")
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, root)
    for name, script in {"000_alpha": ALPHA, "001_beta": BETA, "index": INDEX}.items():
        (root / "nbs" / f"{name}.ipynb").write_text(json.dumps(notebook_of(script)))
    export(root)
    for path in sorted(root.glob("nbs/*.ipynb")):
        notebooks.store(path, notebooks.run(path))
    (root / "README.md").write_text(notebooks.render(notebooks.read(root / "nbs" / "index.ipynb")))
    return root


@pytest.fixture
def tree(sound, tmp_path):
    "A copy of the sound tree to spoil."
    return shutil.copytree(sound, tmp_path / "tree")


def export(root) -> None:
    "Make the modules as `make export` does."
    from nbdev.export import nb_export

    before = os.getcwd()
    os.chdir(root)
    for path in checks.chapters("."):
        nb_export(path, lib_path="finetuning_kit")
    os.chdir(before)


def replace(path, old, new) -> None:
    "Change a text in a file; it must be there."
    page = path.read_text(encoding="utf-8")
    assert old in page, f"{old} is not in {path.name}"
    path.write_text(page.replace(old, new), encoding="utf-8")


def in_beta(tree, script) -> None:
    "Write the second chapter anew, keep its stored outputs, and export."
    path = tree / "nbs" / "001_beta.ipynb"
    outputs = {cell["id"]: cell["outputs"] for cell in notebooks.read(path)["cells"] if cell["cell_type"] == "code"}
    fresh = notebook_of(script)
    for cell in fresh["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs.get(cell["id"], [])
    path.write_text(json.dumps(fresh))
    export(tree)


def with_output(tree, **output) -> None:
    "Put an output into the second chapter's last but one cell."
    path = tree / "nbs" / "001_beta.ipynb"
    notebook = notebooks.read(path)
    notebook["cells"][4]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "", **output}]
    path.write_text(json.dumps(notebook))


def each(check, pages) -> list:
    "Apply a check of one page to several."
    return [complaint for page in pages for complaint in check(page)]


CHECKS = {
    "export": checks.export_problems, "layers": checks.layer_problems, "names": checks.public_name_problems,
    "readme": checks.readme_problems, "text": checks.text_problems,
    "documentation": lambda tree: each(checks.documentation_problems, checks.modules(tree).values()),
    "module": lambda tree: each(checks.module_budget_problems, checks.modules(tree).values()),
    "outputs": lambda tree: each(checks.output_problems, checks.chapters(tree)),
    "budgets": lambda tree: each(checks.budget_problems, checks.chapters(tree)),
}


@pytest.mark.parametrize("check", CHECKS)
def test_sound_tree_has_no_problems(sound, check):
    assert CHECKS[check](sound) == []


def test_sound_tree_is_light(sound):
    assert checks.blocked_import_problems(sound, ["alpha", "beta"]) == []
    assert checks.loaded_problems(sound, "import finetuning_kit; finetuning_kit.quadruple") == []


LONG = "\n".join(f"a{i} = {i}" for i in range(45))
FIELD = 'import dataclasses\n@dataclasses.dataclass\nclass Pair:\n    "Two."\n    left: int\n\n\ndef quad'
METHOD = 'class Pair:\n    "Two."\n    def total(self):\n        pass\n\n\ndef quad'
LAST = 'quadruple(3), "and no network"'


def beta_with(old, new):
    "A fault: the second chapter with one text in place of another."
    assert old in BETA
    return lambda tree: in_beta(tree, BETA.replace(old, new))


def renamed(old, new):
    "A fault: a notebook under another name."
    return lambda tree: os.rename(tree / "nbs" / old, tree / "nbs" / new)


FAULTS = [  # what does it, which check, words of its complaint
    (lambda t: replace(t / "finetuning_kit/alpha.py", "2 * num", "3 * num"), "export", "differs from its notebook"),
    (lambda t: (t / "finetuning_kit/gamma.py").write_text("__all__ = []\n"), "export", "no notebook exports it"),
    (lambda t: (t / "finetuning_kit/beta.py").unlink(), "export", "beta.py is missing"),
    (renamed("001_beta.ipynb", "002_beta.ipynb"), "layers", "the next number in order is 001"),
    (renamed("001_beta.ipynb", "001_gamma.ipynb"), "layers", "default_exp is ['beta'], not gamma"),
    (renamed("001_beta.ipynb", "draft.ipynb"), "layers", "a notebook is called NNN_name"),
    (beta_with("_kit.alpha import double", "_kit import quadruple as double"), "layers",
     "`beta`, which is no lower chapter"),
    (beta_with("_kit.alpha", "_kit.later"), "layers", "`later`, which is no lower chapter"),
    (beta_with("quadruple", "double"), "names", "exported by beta and by another"),
    (beta_with("quadruple", "alpha"), "names", "is a module's name too"),
    (beta_with("import double", "import double, nothing"), "names", "cannot import name 'nothing'"),
    (beta_with("  # what to take four times", ""), "documentation", "parameter `number` has no comment"),
    (beta_with("  # four times as much", ""), "documentation", "no comment behind what it returns"),
    (beta_with('    "Four times the number."\n', ""), "documentation", "`quadruple` has no docstring"),
    (beta_with("def quad", "class Pair:\n    pass\n\n\ndef quad"), "documentation", "`Pair` has no docstring"),
    (beta_with("def quad", METHOD), "documentation", "`Pair.total` has no docstring"),
    (beta_with("def quad", FIELD), "documentation", "`Pair.left` has no comment"),
    (beta_with("def quad", "\n".join([LONG] * 10) + "\n\n\ndef quad"), "module", "beta.py has 457 lines"),
    (beta_with(f"---\n{LAST}", f"---\n2\n---\nprint(3)\n---\n{LAST}"), "outputs", "prints, but has no stored output"),
    (lambda t: replace(t / "nbs/001_beta.ipynb", '"metadata": {\n  "k', '"metadata": {"widgets": {},\n  "k'), "outputs",
     "metadata holds widget state"),
    (lambda t: replace(t / "nbs/001_beta.ipynb", '"metadata": {}', '"metadata": {"lines_to_next_cell": 1}'), "outputs",
     "jupytext's metadata"),
    (lambda t: with_output(t, output_type="error", ename="", evalue="", traceback=[]), "outputs", "holds an error"),
    (lambda t: with_output(t, name="stderr", text="Loading"), "outputs", "error stream"),
    (lambda t: with_output(t, output_type="display_data", data={WIDGET_VIEW: {}}), "outputs", "a widget view"),
    (lambda t: with_output(t, text="Traceback (most recent call last)"), "outputs", "shows an error"),
    (lambda t: with_output(t, text="UserWarning: look out"), "outputs", "shows a warning"),
    (lambda t: with_output(t, text="<object at 0x7fb5c0d1e2f0>"), "outputs", "shows a memory address"),
    (lambda t: with_output(t, text="saved in /" "tmp/run"), "outputs", "shows an absolute path"),
    (lambda t: with_output(t, text="line\n" * 41), "outputs", "shows 41 lines"),
    (lambda t: with_output(t, text="a" * 200_000), "outputs", "KB; the limit is 200"),
    (beta_with(LAST, LONG), "budgets", "has 45 lines; the limit is 30"),
    (beta_with("def quad", LONG + "\n\n\ndef quad"), "budgets", "lines; the limit is 40"),
    (beta_with("    return", "    number += 0\n" * 30 + "    return"), "budgets", "the body of `quadruple` has 31"),
    (beta_with(LAST, LAST + " " * 99 + "# end"), "budgets", "a line of 134 columns"),
    (beta_with("Four times is", "Four " * 120), "budgets", "words; the limit is 150"),
    (beta_with("chapter above has built.", "chapter above has built"), "budgets", "has no promise under its title"),
    (beta_with("---\n#| cuda", "---\n# More\n" * 160 + "---\n#| cuda"), "budgets", "cells; the limit is 160"),
    (lambda t: in_beta(t, BETA.replace("Four times is", "```\nFour is").replace("what it explained.", "```")),
     "budgets", "words of prose for a line"),
    (beta_with(LAST, '2, "times two"'), "budgets", "missed: quadruple"),
    (beta_with("import double", "import double, half"), "budgets", "imports what it does not use: half"),
    (lambda t: replace(t / "README.md", "Begin", "Start"), "readme", "differs from nbs/index"),
    (renamed("000_alpha.ipynb", "000_a.ipynb"), "readme", "links to nbs/000_alpha.ipynb, which is not there"),
    (lambda t: replace(t / "README.md", "Begin", "TO" "DO: begin"), "text", "holds a leftover"),
    (lambda t: replace(t / "README.md", "Begin", "See /" "home/ada/notes. Begin"), "text", "holds somebody's path"),
    (lambda t: replace(t / "settings.ini", "[DEFAULT]", "# pypi" ".org\n[DEFAULT]"), "text", "holds a registry's host"),
    (lambda t: (t / "setup.py").write_text("# " + "long " * 24), "text", "overlong line"),
]


@pytest.mark.parametrize("spoil, check, words", FAULTS, ids=[words for *_, words in FAULTS])
def test_planted_fault_is_found(tree, spoil, check, words):
    spoil(tree)
    found = CHECKS[check](tree)
    assert any(words in complaint for complaint in found), found


def test_heavy_import_is_found(tree):
    in_beta(tree, BETA.replace("from finetuning_kit.alpha", "import json\nfrom finetuning_kit.alpha"))
    assert "beta" in checks.blocked_import_problems(tree, ["alpha", "beta"], ["json.tool", "json"])[0]
    script = "import finetuning_kit; finetuning_kit.quadruple"
    assert checks.loaded_problems(tree, script, ["json"]) == ["json was loaded"]


def test_failing_cell_is_found(tree):
    in_beta(tree, BETA.replace("quadruple(3), ", "assert quadruple(3) == 13, "))
    found, = checks.run_problems(tree / "nbs" / "001_beta.ipynb")
    assert "AssertionError" in found


def test_dead_kernel_is_found(tree):
    in_beta(tree, BETA.replace(LAST, "import os\nos._exit(1)"))
    found, = checks.run_problems(tree / "nbs" / "001_beta.ipynb")
    assert "Kernel died" in found


def test_missing_and_stale_outputs_are_found(tree):
    in_beta(tree, BETA.replace(LAST, "quadruple(3);").replace("#| cuda", ""))
    found = " ".join(checks.run_problems(tree / "nbs" / "001_beta.ipynb"))
    assert "has a stored output, but shows nothing" in found and "shows something, but has no stored output" in found


def test_flagged_cell_runs_when_asked_for(sound):
    path = sound / "nbs" / "001_beta.ipynb"
    assert notebooks.run(path, ["cuda"]).keys() - notebooks.run(path).keys() == {"cell5"}


@pytest.mark.parametrize("start", ["", "import subprocess, sys; subprocess.run([sys.executable, '-c', '''", ])
def test_network_is_refused(tree, start):
    request = 'import urllib.request; urllib.request.urlopen("http://192.0.2.1/", timeout=5)'
    in_beta(tree, BETA.replace(LAST, start + request + ("'''], check=True)" if start else "")))
    found, = checks.run_problems(tree / "nbs" / "001_beta.ipynb")
    assert ("CalledProcessError" if start else "the network is off") in found


def test_loopback_is_not_refused():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_home_is_empty_and_apart(tree):
    in_beta(tree, BETA.replace(LAST, "import os\nassert os.listdir(os.environ['HOME']) == ['ipython']\n1, 2"))
    assert checks.run_problems(tree / "nbs" / "001_beta.ipynb") == []
