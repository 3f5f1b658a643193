"""The modules are what the notebooks say, in layers, light where they promise it, and explained."""
import pytest

from tests import checks
from tests.checks import none_of
from tests.notebooks import ROOT

ORDER = [path.stem[4:] for path in checks.chapters(ROOT)]
LOOKS = ORDER[:ORDER.index("review") + 1]  # what looks at data is light
LIGHT = [name for name in LOOKS if name not in ("packing", "targets", "methods")]
LIGHT += ["screens", "flags", "cli"]
MODULES = list(checks.modules(ROOT).values())


def test_modules_equal_notebooks():
    none_of(checks.export_problems(ROOT))


def test_layers():
    none_of(checks.layer_problems(ROOT))


@pytest.mark.parametrize("name", LIGHT)
def test_imports_without_heavy_packages(name):
    none_of(checks.blocked_import_problems(ROOT, [name]))


@pytest.mark.parametrize("script", [
    "import finetuning_kit; dir(finetuning_kit); finetuning_kit.__version__",
    "from finetuning_kit.cli import main; main(['--help'])",
    "from finetuning_kit.cli import main; main(['train', '--help'])"])
def test_loads_nothing_heavy(script):
    none_of(checks.loaded_problems(ROOT, script))


def test_public_names():
    none_of(checks.public_name_problems(ROOT))


def test_star_import():
    names = {}
    exec("from finetuning_kit import *", names)
    assert {"fine_tune", "panel", "load_config", "pretrain"} <= names.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_documentation(path):
    none_of(checks.documentation_problems(path))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_budget(path):
    none_of(checks.module_budget_problems(path))
