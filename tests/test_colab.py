"""Installing the package on Colab replaces nothing there; `benchmarks/colab.py` tries it for real."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def on_colab() -> dict[str, str]:
    lines = (ROOT / "tests" / "data" / "colab_packages.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("requirement", [Requirement(r) for r in PROJECT["dependencies"]], ids=str)
def test_colab_has_what_the_package_needs(requirement):
    there = {canonicalize_name(name): version for name, version in on_colab().items()}
    assert there[canonicalize_name(requirement.name)] in requirement.specifier


def test_colabs_python_is_supported():
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains("3.13")
