"""Recipes by their names, in a checkout and where the package is installed elsewhere."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from unified_mm.cli.recipes import own_recipes, read_recipe, recipe_file

ROOT = Path(__file__).parents[1]


def test_a_name_is_the_recipe_of_this_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    coco = ["coco", "coco_documents", "coco_experts", "coco_flamingo"]
    assert list(own_recipes()) == ["audio", *coco, "photographs", "points", "video"]
    named = read_recipe("coco:base", ["--config.seed=3"])
    by_path = read_recipe(f"{ROOT / 'configs' / 'coco.py'}:base", ["--config.seed=3"])
    assert named == by_path and named.config.size == "base" and named.config.seed == 3
    (tmp_path / "coco").write_text("a file of the same name comes first")
    assert recipe_file("coco:base") == "coco:base" and recipe_file("mine.py") == "mine.py"


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(FileNotFoundError, match="'cocoa' does not exist.*coco, coco_documents"):
        read_recipe("cocoa", [])


def test_a_recipe_may_hold_a_dataclass_and_its_name_stands_for_no_module(tmp_path):
    (tmp_path / "fractions.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from unified_mm.default_config import default_config\n"
        "@dataclass\n"
        "class Steps:\n"
        "    count: int = 7\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.train.steps = Steps().count\n"
        "    return config\n"
    )
    assert read_recipe(str(tmp_path / "fractions.py"), []).config.train.steps == 7
    import fractions

    assert fractions.Fraction(1, 2) == 0.5


@pytest.mark.slow
def test_an_installed_package_has_its_recipes_without_the_checkout(tmp_path):
    target = tmp_path / "site"
    # What pip would put there, without a wheel: an environment need not have what makes one.
    build = (sys.executable, "setup.py", "--quiet", "build", "--build-lib", target)
    copy = tmp_path / "checkout"
    files = subprocess.run(
        ["git", "ls-files", "unified_mm", "configs", "setup.py", "pyproject.toml"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for file in files:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        (copy / file).write_bytes((ROOT / file).read_bytes())
    subprocess.run(build, check=True, cwd=copy)
    found = os.pathsep.join([str(target), sysconfig.get_paths()["purelib"]])
    command = [sys.executable, "-P", "-m", "unified_mm.sizes", "--config=coco:tiny"]
    environment = {**os.environ, "PYTHONPATH": found}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (target / "unified_mm" / "configs" / "coco.py").is_file()


def test_messages_name_extras_by_the_package_which_is_found_without_a_checkout():
    sources = [file.read_text() for file in sorted((ROOT / "unified_mm").rglob("*.py"))]
    named = {name for text in sources for name in re.findall(r"unified_mm\[(\w+)\]", text)}
    setup = (ROOT / "setup.py").read_text()
    assert {"search", "serve", "cuda12"} <= named
    assert all(f'"{name}":' in setup for name in named)
    assert not any("install -e" in text for text in sources)
