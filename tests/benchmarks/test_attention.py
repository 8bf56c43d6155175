"""The sweep over lengths and depths, small: what it measures and what it draws."""

import json
import xml.etree.ElementTree as xml

import pytest

from unified_mm.benchmarks.attention import draw, sweep
from unified_mm.nn.options import TransformerOptions


@pytest.fixture(scope="module")
def swept():
    lines = []
    options = TransformerOptions(16, 1, 2, 16)
    return sweep(options, lines.append, lengths=(128, 512), depths=(1, 2)), lines


def test_a_row_for_each_backend_and_length_or_a_reason(swept):
    result, lines = swept
    measured = {(row["backend"], row["tokens"]) for row in result["attention"]}
    names = ("xla", "chunked", "blocks")
    assert measured == {(name, length) for name in names for length in (128, 512)}
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in result["attention"])
    assert [row["layers"] for row in result["compile"]] == [1, 2]
    assert all(row["scanned"] > 0 and row["unrolled"] > 0 for row in result["compile"])
    assert len(lines) == 6 + len(result["left_out"]) + 2
    assert json.loads(json.dumps(result)) == result
    assert {"device", "versions", "revision", "date"} <= set(result)


def test_the_plot_names_what_was_measured(swept):
    root = xml.fromstring(draw(swept[0]))
    assert root.tag.endswith("svg")
    drawn = draw(swept[0])
    for label in ("xla", "chunked", "scanned", "unrolled"):
        assert f"<!-- {label} -->" in drawn


def test_memory_of_a_layer_grows_with_the_square_of_the_length(swept):
    rows = swept[0]["attention"]
    short, long = (row["bytes"] for row in rows if row["backend"] == "xla")
    assert long > 10 * short
