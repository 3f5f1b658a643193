"""Every notebook runs, offline and in a process of its own, and shows what its stored outputs show."""
import pytest

from tests.checks import none_of, run_problems
from tests.notebooks import ROOT

NOTEBOOKS = sorted(ROOT.glob("nbs/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, flags):
    none_of(run_problems(path, flags))
