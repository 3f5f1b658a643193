"""The course you run and the library you keep: every public name of every chapter, loaded when it is first used."""
import ast
import importlib
import logging
from functools import lru_cache
from pathlib import Path

_HERE = Path(__file__).parent

# On a CPU with bf16 instructions bitsandbytes warns, when it is imported, that a kernel could be downloaded. It works
# without, and nothing here is downloaded that nobody asked for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@lru_cache(maxsize=None)
def _public_names() -> dict:  # {public name: the module that defines it}
    "Read, without importing them, what the chapters' modules export."
    names = {}
    for path in sorted(_HERE.glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        start = source.find("\n__all__ = [")
        if start >= 0:
            listed = source[source.index("[", start):source.index("]", start) + 1]
            names.update(dict.fromkeys(ast.literal_eval(listed), path.stem))
    return names


def _version() -> str:
    "The version of the installed package, or in a source tree that is not installed, the one in settings.ini."
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:
        from configparser import ConfigParser

        settings = ConfigParser(delimiters=["="], interpolation=None)
        settings.read(_HERE.parent / "settings.ini", encoding="utf-8")
        return settings.defaults()["version"]


def __getattr__(name: str):
    "Find a public name in the chapter that defines it, or a chapter's module by its own name."
    if name == "__version__":
        return _version()
    if name == "__all__":  # asked for by `from finetuning_kit import *`
        return sorted(_public_names())
    if not name.startswith("_"):
        if name in _public_names():
            value = getattr(importlib.import_module(f"{__name__}.{_public_names()[name]}"), name)
            globals()[name] = value
            return value
        if (_HERE / f"{name}.py").exists():
            return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list:  # what tab completion offers
    "List the public names of all chapters."
    return sorted({*_public_names(), "__version__"})
