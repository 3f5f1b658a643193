"""What a reader sees: the chapters as stored, the README, and the text of every file."""
import pytest

from tests import checks
from tests.checks import none_of
from tests.notebooks import ROOT

NOTEBOOKS = sorted(ROOT.glob("nbs/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs(path):
    none_of(checks.output_problems(path))


@pytest.mark.parametrize("path", checks.chapters(ROOT), ids=lambda path: path.stem)
def test_style_budgets(path):
    none_of(checks.budget_problems(path))


def test_readme():
    none_of(checks.readme_problems(ROOT))


def test_text():
    none_of(checks.text_problems(ROOT))
