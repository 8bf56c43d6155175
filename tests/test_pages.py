"""README.md, RESULTS.md and GUIDE.md: what they name is there, and what they quote is quoted."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from textwrap import indent

import pytest

from experiments import draw_fusions
from unified_mm.data.sources import BUILT_IN
from unified_mm.default_config import default_config

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "experiments" / "GUIDE.md"
PAGES = [ROOT / "README.md", ROOT / "experiments" / "RESULTS.md", GUIDE]
QUOTE = re.compile(r"^From `([^`]+)`:\n\n```python\n(.*?)^```$", re.M | re.S)


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_every_quote_is_found_in_the_file_that_it_names():
    text = GUIDE.read_text()
    quotes = QUOTE.findall(text)
    assert len(quotes) == text.count("```python") > 10
    for file, block in quotes:
        text = (ROOT / file).read_text()
        there = any(f"\n{indent(block, margin)}" in text for margin in ("", "    "))  # of a class
        assert there, f"{file}:\n{block}"


def test_links_and_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"`((?:unified_mm|experiments|tests|configs)/[\w/.]+)`", text):
        assert (ROOT / file).exists(), file
    anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-")
               for head in re.findall(r"^#+ (.*)$", text, re.M)}  # fmt: skip
    assert set(re.findall(r"\]\(#([^)]+)", text)) <= anchors


def commands(text):
    """Every command line, as module and arguments."""
    indented = re.findall(r"^    .*?python -m (.*)$", text, re.M)
    quoted = re.findall(r"`python -m ([^`]*)`", text)
    return [shlex.split(line.replace("\n", " ")) for line in (*indented, *quoted)]


def test_commands_have_the_flags_that_are_given(page, capsys):
    fields = default_config()
    for module, *arguments in commands(page.read_text()):
        found = importlib.import_module(module)
        flags = {
            each.lstrip("[").lstrip("-").partition("=")[0] for each in arguments if "--" in each
        }
        for name in (each for each in flags if each.startswith("config.")):
            value = fields
            for part in name.removesuffix("…").removesuffix(".").split(".")[1:]:
                value = value[part]
        if module.startswith("unified_mm."):
            with pytest.raises(SystemExit):
                found.main.options_of(["--help"])
            known = set(re.findall(r"--(\w+)", capsys.readouterr().out))
        else:
            file = Path(found.__file__)  # a package's flags are where it is run
            file = file.with_name("__main__.py") if file.name == "__init__.py" else file
            known = set(re.findall(r"\"--(\w+)\"", file.read_text()))
        wrong = {each for each in flags - known if not each.startswith("config.")}
        assert not wrong, f"{module}: {wrong}"


def test_fields_of_the_config_exist(page):
    for name in re.findall(r"`((?:data|model|train|objectives|mesh)\.[a-z_.]+)`", page.read_text()):
        value = default_config()
        for part in name.split("."):
            value = value[part]


def test_the_readme_lists_the_sources_that_are_read():
    text = (ROOT / "README.md").read_text()
    listed = text[text.index("| `data.source` |") :].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", listed, re.M) == [
        name for name in BUILT_IN if name not in ("auto", "world")
    ]


def test_python_in_the_readme_is_python():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        ast.parse(block)


def test_the_picture_is_as_it_is_drawn():
    """Where this fails: python -m experiments.draw_fusions."""
    drawn = draw_fusions.draw()
    assert (ROOT / "experiments" / "results" / "fusions.svg").read_text() == drawn


def test_the_picture_shows_who_sees_whom():
    seen = {fusion: set(draw_fusions.pairs(fusion)) for fusion in draw_fusions.FUSIONS}
    cells = {fusion: {cell[:2] for cell in found} for fusion, found in seen.items()}
    assert cells["early"] == cells["gated_cross_attention"] > cells["late"]
    assert not any(query < 4 <= key for query, key in cells["early"])  # no patch sees a text
    writing = {(query, key) for query, key in cells["early"] if query >= 8}
    assert writing == {(q, k) for q in range(8, 12) for k in (*range(4), *range(8, q + 1))}
    assert {cell[2] for cell in seen["late"]} == {"image tower", "text model"}
