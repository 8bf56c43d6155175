"""Docstrings are sentences with a verb first, and letters in shapes have one meaning each."""

import ast
import re
from pathlib import Path

import pytest

import unified_mm

PACKAGE = Path(unified_mm.__file__).parent
ROOMS = [PACKAGE, PACKAGE.parent / "experiments"]
# Words that end like a verb and are none.
NOUNS = {"Its", "This", "Bytes", "Steps", "Seconds", "Parameters", "Names", "Rows", "Tokens", "As"}
LETTERS = set("BNTQKPDFZHGALEVMICS")


def sources():
    return [path for room in ROOMS for path in sorted(room.rglob("*.py"))]


def functions(tree):
    """Functions and methods, properties and fixtures of the language apart."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(each) for each in node.decorator_list}
            if not decorators & {"property", "cached_property", "functools.cached_property"}:
                yield node


def test_a_docstring_of_a_function_begins_with_a_verb():
    wrong = []
    for path in sources():
        for node in functions(ast.parse(path.read_text())):
            said = ast.get_docstring(node)
            if said is None:
                continue
            first = re.match(r"[\w']*", said)[0]
            if not re.fullmatch(r"[A-Z][a-z-]+s", first) or first in NOUNS:
                wrong.append(f"{path.name}:{node.lineno} {node.name}: {said.splitlines()[0]}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:40])


def test_sections_are_googles():
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            said = ast.get_docstring(node) or ""
            if "``" in said or re.search(r"^Letters:", said, re.M):
                wrong.append(f"{path.name}:{node.lineno} {node.name}")
    assert not wrong, "\n".join(wrong)


def test_an_argument_that_is_described_is_there():
    wrong = []
    for path in sources():
        for node in functions(ast.parse(path.read_text())):
            found = re.search(r"^Args:\n((?:  .*\n?|\n)+)", ast.get_docstring(node) or "", re.M)
            if found is None:
                continue
            arguments = node.args
            every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
            there = {each.arg for each in [*every, arguments.vararg, arguments.kwarg] if each}
            for line in re.findall(r"^  (\*{0,2}\w[\w, *]*):", found[1], re.M):
                for name in re.split(r", *", line):
                    if name.lstrip("*") not in there:
                        wrong.append(f"{path.name}:{node.lineno} {node.name}: {name}")
    assert not wrong, "\n".join(wrong)


def test_capitals_in_shapes_are_those_of_the_legend():
    legend = unified_mm.__doc__.partition("In the shapes of arrays")[2]
    assert set(re.findall(r"(?<!\w)([A-Z])  ", legend)) == LETTERS
    wrong = []
    for path in sources():
        for shape in re.findall(
            r"(?:Float|Int|Bool|UInt8|UInt32)\[[\w.]+, \"([^\"]*)\"\]", path.read_text()
        ):
            used = set(re.findall(r"(?<![\w'])\*?([A-Z])\d?(?!\w)", shape))
            if used - LETTERS:
                wrong.append(f"{path.name}: {shape!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("word", ["Sight", "Visibility", "Doorkeeper", "Shelf", "leave_weights"])
def test_words_of_our_own_are_gone(word):
    found = [path.name for path in sources() if re.search(rf"\b{word}\b", path.read_text())]
    assert not found
