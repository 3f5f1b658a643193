"""The sdist and the wheel hold what they should, and the wheel runs where it is installed; no network is used."""
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.checks import none_of
from tests.notebooks import ROOT

NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache",
                                    ".ipynb_checkpoints", "_modidx.py")


def build(root, out) -> None:
    "Build the sdist, and the wheel from it, with the setuptools that is installed here."
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(root)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def pin_problems(root) -> list:
    "Requirements in settings.ini whose range the pins of constraints.txt for this Python leave."
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(Path(root, "settings.ini"), encoding="utf-8")
    lines = Path(root, "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {pin.name.lower(): str(pin.specifier)[2:] for pin in pinned if not pin.marker or pin.marker.evaluate()}
    wanted = [Requirement(text) for key in settings.defaults() if key.endswith("requirements")
              for text in settings.defaults()[key].split()]
    return [f"{wish} has the pin {pins.get(wish.name.lower())}" for wish in wanted
            if wish.name.lower() not in pins or not wish.specifier.contains(pins[wish.name.lower()], prereleases=True)]


def missing_files(root, out) -> list:
    "What the source tree has and the built packages lack."
    wheel, = Path(out).glob("*.whl")
    sdist, = Path(out).glob("*.tar.gz")
    package = {str(path.relative_to(root)) for path in Path(root, "finetuning_kit").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as files:
        missing = [f"the wheel lacks {name}" for name in sorted(package - {*files.namelist()})]
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    return missing + [f"the sdist lacks {name}" for name in sorted((package | {"settings.ini", "LICENSE"}) - names)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A clean copy of the tree, and the folder with what was built from it."
    folder = tmp_path_factory.mktemp("a package")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    build(folder / "source", folder / "dist")
    return folder / "source", folder / "dist"


def test_packages_are_whole(built):
    none_of(missing_files(*built))


def test_pins_lie_in_the_ranges():
    none_of(pin_problems(ROOT))


def test_pin_outside_its_range_is_found(tmp_path):
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    (tmp_path / "settings.ini").write_text(settings.replace("torch>=", "torch>=9").replace("pyyaml", "yaml-of-old>=1"))
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    torch, yaml = pin_problems(tmp_path)
    assert "2.13.0" in torch and "None" in yaml


def test_missing_asset_is_found(built, tmp_path):
    source = shutil.copytree(built[0], tmp_path / "source")
    (source / "finetuning_kit" / "assets").mkdir(exist_ok=True)
    (source / "finetuning_kit" / "assets" / "new.json").write_text("{}")
    assert len(missing_files(source, built[1])) == 2


def test_missing_settings_are_found(built, tmp_path):
    source = shutil.copytree(built[0], tmp_path / "source", ignore=NOT_SOURCE)
    manifest = source / "MANIFEST.in"
    manifest.write_text(manifest.read_text().replace("settings.ini", ""))
    with pytest.raises(AssertionError, match="lib_name"):
        build(source, tmp_path / "dist")


def test_wheel_runs_outside_the_tree(built, tmp_path):
    "Install it without its requirements, which a path file borrows from this environment."
    wheel, = built[1].glob("*.whl")
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    site = Path(subprocess.check_output([python, "-c", where], text=True))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--ignore-installed", wheel], check=True, cwd=tmp_path)  # the borrowed one does not count
    where = "import finetuning_kit as kit; print(kit.__file__, kit.__version__)"
    outside = {"cwd": tmp_path, "text": True, "env": {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}}
    file, version = subprocess.check_output([python, "-c", where], **outside).rsplit(maxsplit=1)
    assert file.startswith(str(site)) and f"-{version}-" in wheel.name
    command = python.parent / "finetuning-kit"
    assert "demo" in subprocess.check_output([command, "--help"], **outside)
    outside["env"]["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    assert "merged model verified" in subprocess.check_output([command, "demo"], **outside)
    assert (tmp_path / "runs" / "instruct_pocket" / "final_model" / "model.safetensors").is_file()
