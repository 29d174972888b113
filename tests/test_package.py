"""What is installed, and what the files beside the package promise."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import finetune as ft
from finetune import shelf

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements: list[str]) -> dict[str, str]:
    """Requirements by their distribution's normalised name."""
    found = {}
    for line in requirements:
        match = re.match(r"[\w.-]+", line)
        if match and not line.startswith("#"):
            found[re.sub(r"[-_.]+", "-", match[0]).lower()] = line
    return found


@pytest.mark.parametrize("name", ft.__all__)
def test_every_name_of_the_package_is_there(name: str) -> None:
    assert getattr(ft, name) is not None


def test_the_table_of_names_is_whole() -> None:
    assert sorted([*ft.HOME, *ft.MODULES]) == sorted(ft.__all__)
    assert {*ft.__all__} <= {*dir(ft)}


def test_a_name_means_the_same_when_its_module_was_imported_before() -> None:
    """A function must not have the name of a module beside it: importing that would put the module in its place."""
    for name, home in ft.HOME.items():
        assert not (ROOT / "finetune" / f"{name}.py").exists()
        assert getattr(importlib.import_module(f"finetune.{home}"), name) is getattr(ft, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lroa'"):
        ft.lroa  # noqa: B018


def test_every_package_is_installed() -> None:
    here = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "finetune").rglob("__init__.py")}
    listed = {*PROJECT["tool"]["setuptools"]["packages"]}
    assert listed - here == {"finetune.recipes", "finetune.shipped_datasets"}
    assert here <= listed


def test_the_folder_of_data_sets_never_shadows_the_library() -> None:
    assert not [*(ROOT / "datasets").rglob("*.py")]


def test_the_wheel_holds_all_that_is_needed(tmp_path: Path) -> None:
    """Built from a copy, as building leaves folders behind."""
    for name in ("finetune", "recipes", "datasets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    held = {*zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist()}
    places = {"finetune": "finetune", "recipes": "finetune/recipes", "datasets": "finetune/shipped_datasets"}
    for folder, place in places.items():
        files = [path.relative_to(tmp_path / folder) for path in (tmp_path / folder).rglob("*") if path.is_file()]
        assert {f"{place}/{file}" for file in files} <= held
    assert {name.partition("/")[0] for name in held} == {"finetune", f"finetune_kit-{ft.__version__}.dist-info"}


def test_the_readme_and_ci_run_the_same_two_commands() -> None:
    """CI takes its lines from the README with these two calls of grep; each must find exactly one."""
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    patterns = re.findall(r"grep -m1 '(.+)' README.md", ci)
    found = [[line for line in readme.splitlines() if re.search(pattern, line)] for pattern in patterns]
    assert len(found) == 2 and all(len(lines) == 1 for lines in found)
    for (line,) in found:
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
    assert found[0][0].endswith(" . && .venv/bin/finetune demo")
    assert found[1][0].endswith(" -e '.[test]' && .venv/bin/python -m pytest")


def test_constraints_pin_every_requirement_exactly() -> None:
    pins = names((ROOT / "constraints.txt").read_text().splitlines())
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins.values())
    wanted = names(PROJECT["project"]["dependencies"])
    wanted |= names([line for group in ("test", "dev") for line in PROJECT["project"]["optional-dependencies"][group]])
    assert {*wanted} - {*pins} <= {"finetune-kit"}
    assert pins["torch"] == "torch==2.13.0"


def test_the_shipped_data_sets_are_found() -> None:
    assert shelf.datasets().is_dir()
