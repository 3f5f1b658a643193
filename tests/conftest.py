"""All tests run without a network, in an empty home, in processes that know only the source tree."""
import os
import runpy
import shutil
import tempfile

import pytest

from tests.notebooks import ROOT, environment

HOME = tempfile.mkdtemp(prefix="finetuning_kit_tests_")
os.environ.update(environment(HOME))
runpy.run_path(str(ROOT / "tests" / "offline" / "sitecustomize.py"))


def pytest_addoption(parser):
    "Flagged cells run only when asked for."
    parser.addoption("--flags", default="", help="run the notebooks' cells with these flags too: cuda slow net")


def pytest_unconfigure():
    "Leave nothing behind."
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def flags(request):
    "The flags of cells to run."
    return request.config.getoption("--flags").split()


@pytest.fixture
def typed(tmp_path, capsys, monkeypatch):
    "Run a command as typed in an empty folder; give exit code, output and errors."
    from finetuning_kit.cli import main  # not before the environment is set
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        return code, shown.out, shown.err
    return run
