"""Hands the metadata of settings.ini to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(here / "settings.ini", encoding="utf-8")
meta = settings["DEFAULT"]
extras = {key.removesuffix("_requirements"): meta[key].split() for key in meta if key.endswith("_requirements")}
extras["all"] = [requirement for name, names in extras.items() if name != "dev" for requirement in names]
readme = here / "README.md"

setup(
    name=meta["lib_name"], version=meta["version"], description=meta["description"], author=meta["author"],
    keywords=meta["keywords"].split(), license_expression=meta["license"], license_files=["LICENSE"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown", python_requires=f">={meta['min_python']}",
    packages=[meta["lib_name"]], package_data={meta["lib_name"]: ["assets/**/*"]}, include_package_data=False,
    install_requires=meta["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": meta["console_scripts"].split()}, zip_safe=False,
)
