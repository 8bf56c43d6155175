"""Imports run down the map of rooms in the package's docstring, never up and never in a circle."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import unified_mm

# What is imported from outside, as the docstring says.
PUBLIC = (
    "config",
    "data",
    "default_config",
    "modalities",
    "nn",
    "objectives",
    "registry",
    "task",
)
PACKAGE = Path(unified_mm.__file__).parent


def rooms():
    """The level of each room, counted from above, and the neighbours that a room may import."""
    levels, allowed, level = {}, set(), -1
    for line in unified_mm.__doc__.partition("In the shapes of arrays")[0].splitlines():
        found = re.fullmatch(r"    (& )?(\w+) +(.+)", line)
        if found is None:
            continue
        beside, name, sentence = found.groups()
        level += not beside
        levels[name] = level
        allowed |= {(name, other) for other in re.findall(r"it imports `(\w+)`", sentence)}
    return levels, allowed


def modules():
    """Every module of the package with its file, by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(source, known):
    """The modules that a file imports, in functions too, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield (full if full in known else node.module), node.lineno


def room_of(module, levels):
    """The room that a module lies in; a file beside the package's own is a command."""
    name = module.split(".")[1] if "." in module else "commands"
    return name if name in levels else "commands"


def wrong_imports(sources, levels, allowed):
    """Those that go up or to a neighbour, as `file:line: room imports room`."""
    found = []
    for module, source in sources.items():
        for other, line in imports(source, sources):
            here, there = room_of(module, levels), room_of(other, levels)
            if here != there and (here, there) not in allowed and levels[there] <= levels[here]:
                found.append(f"{module}:{line}: {here} imports {there}")
    return found


def circles(sources):
    """One circle of modules that import each other, or none."""
    graph = {
        module: {other for other, _ in imports(source, sources)} - {module}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def sources():
    return {module: path.read_text() for module, path in modules().items()}


def test_the_map_names_every_room():
    levels, _ = rooms()
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert folders <= levels.keys()
    assert levels.keys() - folders - files == {"commands"}


def test_imports_run_down_the_map(sources):
    assert wrong_imports(sources, *rooms()) == []
    assert circles(sources) == []


def test_what_is_wrong_would_be_seen():
    levels, allowed = rooms()
    sources = {
        "unified_mm": "",
        "unified_mm.nn": "",
        "unified_mm.nn.layers": "def f():\n    from unified_mm.models.early import Early\n",
        "unified_mm.models": "",
        "unified_mm.models.early": "from unified_mm.nn import layers\n",
        "unified_mm.runs.folder": "import unified_mm.data.coco\n",
        "unified_mm.data.coco": "from unified_mm.world import scenes\n",
        "unified_mm.world": "",
        "unified_mm.world.scenes": "from unified_mm.data.coco import Coco\n",
        "unified_mm.config": "import unified_mm\nfrom unified_mm import index\n",
        "unified_mm.index": "",
    }
    assert wrong_imports(sources, levels, allowed) == [
        "unified_mm.nn.layers:2: nn imports models",
        "unified_mm.runs.folder:1: runs imports data",
        "unified_mm.world.scenes:1: world imports data",
        "unified_mm.config:1: config imports commands",
        "unified_mm.config:2: config imports commands",
    ]
    assert set(circles(sources)) & {"unified_mm.data.coco", "unified_mm.nn.layers"}


@pytest.mark.parametrize("name", ["toy_tone.py", "toy_rules.py", "toy_parts.py", "toy_recipe.py"])
def test_outsiders_import_what_is_for_them(name):
    public = {"unified_mm", *(f"unified_mm.{each}" for each in PUBLIC)}
    source = (Path(__file__).parent / name).read_text()
    known = modules()
    assert {module for module, _ in imports(source, known)} <= public
