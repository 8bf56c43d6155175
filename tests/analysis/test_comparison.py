"""Runs of different kinds side by side."""

import json
from html.parser import HTMLParser

import pytest

from unified_mm.analysis.comparison import compare, short_names, summarise
from unified_mm.analysis.comparison_page import as_html, as_text
from unified_mm.files import write_json
from unified_mm.runs.folder import RunFolder

NASTY = "<script>alert('x')</script>"
SIZES = {"parameters": 1000, "FLOPs of a generated token": None}


def write_run(path, config, result=None, losses=()):
    folder = RunFolder(path)
    write_json(folder.config, config)
    lines = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses, start=1)]
    if lines:
        folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result is not None:
        write_json(folder.result, result)
    return folder


def config(fusion, **more):
    options = {"split": "val", "max_images": 100}
    train = {"steps": 40}
    groups = {"model": {"fusion": fusion}, "train": train, "evaluation": options}
    return {**groups, "data": {}, "objectives": {}, **more}


@pytest.fixture
def runs(tmp_path):
    """A finished run, a late one on other data, an unfinished, an imported and an int8 one."""
    data = {"source": "world", "fingerprint": "a", "notice": "NOT YOUR DATA"}
    first = {
        "scores": {"text_to_image/recall_at_1": 0.5, "caption/cider_d": 1.5},
        "data": data,
        "steps": 40,
        "flops": 2e12,
        "seconds": 60.0,
    }
    second = {
        "scores": {"text_to_image/recall_at_1": 0.625, "zero_shot/accuracy_at_1": 0.25},
        "data": {**data, "fingerprint": "b"},
        "steps": 40,
        "flops": 3e12,
    }
    folders = [
        write_run(tmp_path / "early", config("early"), first, [3.0, 2.0, 1.0]),
        write_run(tmp_path / "late", config("late", size=NASTY), second, [4.0, 3.0]),
        write_run(tmp_path / "going", config("gated_cross_attention"), None, [5.0, 4.0]),
        write_run(tmp_path / "clip", config("late", imported={"family": "clip", "part": "both"})),
        write_run(
            tmp_path / "small",
            config("early", quantized={"weights": "int8", "activations": "int8"}),
            {"scores": {"caption/cider_d": 1.25}, "steps": 40},
        ),
    ]
    sizes = [SIZES, {**SIZES, "parameters": 1500}, SIZES, dict.fromkeys(SIZES), SIZES]
    return [
        summarise(folder, name, each)
        for folder, name, each in zip(folders, short_names(folders), sizes, strict=True)
    ]


def rows(part):
    return {row.name: row.cells for row in part}


def test_each_kind_has_its_column(runs):
    found = compare(runs)
    facts = rows(found.facts)
    assert facts["kind"] == (
        "early",
        "late",
        "gated_cross_attention",
        "late, imported clip",
        "early, int8 weights and activations",
    )
    assert facts["state"] == (
        "finished, 40 steps",
        "finished, 40 steps",
        "unfinished, step 20 of 40",
        "imported, not scored",
        "finished, 40 steps",
    )


def test_differences_are_from_the_first_run_and_what_is_missing_is_a_dash(runs):
    found = compare(runs)
    scores = rows(found.scores)
    assert scores["text_to_image/recall_at_1"] == ("0.500", "0.625 (+0.125)", "–", "–", "–")
    assert scores["caption/cider_d"] == ("1.500", "–", "–", "–", "1.250 (-0.250)")
    assert scores["zero_shot/accuracy_at_1"] == ("–", "0.250", "–", "–", "–")
    cost = rows(found.cost)
    assert cost["parameters"] == (
        "1,000",
        "1,500 (x 1.50)",
        "1,000 (x 1.00)",
        "–",
        "1,000 (x 1.00)",
    )
    assert cost["FLOPs of a generated token"] == ("–",) * 5
    assert cost["FLOPs of training"][:3] == ("2e+12", "3e+12 (x 1.50)", "–")


def test_config_fields_that_differ_and_no_others(runs):
    config = rows(compare(runs).config)
    assert set(config) == {
        "model.fusion",
        "size",
        "imported.family",
        "imported.part",
        "quantized.weights",
        "quantized.activations",
    }
    assert config["model.fusion"] == (
        '"early"',
        '"late"',
        '"gated_cross_attention"',
        '"late"',
        '"early"',
    )
    assert config["imported.family"] == ("nothing", "nothing", "nothing", '"clip"', "nothing")


def test_what_cannot_be_compared_is_said(runs):
    assert compare(runs).notes == (
        "NOT YOUR DATA",
        "without scores: going, clip",
        "trained on different data: their fingerprints differ",
    )
    other = {**runs[1].config, "evaluation": {"split": "test", "max_images": 100}}
    changed = [runs[0], type(runs[1])(**{**vars(runs[1]), "config": other})]
    assert "scored otherwise: evaluation.split is test, val" in compare(changed).notes


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_fetches_nothing_and_escapes_everything(runs):
    html = as_html(compare(runs))
    page = Page(html)
    text = " ".join(" ".join(page.words).split())
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    assert all(
        not {"src", "href", "xlink:href"} & set(attributes)
        or all(value.startswith("#") for name, value in attributes.items() if "href" in name)
        for _, attributes in page.tags
    )
    assert "url(http" not in html and "@import" not in html
    assert NASTY not in html and json.dumps(NASTY) in text
    for shown in (
        "NOT YOUR DATA",
        "0.625 (+0.125)",
        "CIDEr-D",
        "x 1.50",
        "unfinished, step 20 of 40",
    ):
        assert shown in text
    assert html.count("<svg") == 1
    # The one chart has the three runs that were trained here.
    legend = html[html.index('class="legend"') : html.index("</ul>", html.index('class="legend"'))]
    assert [name in legend for name in ("early", "late", "going", "clip")] == [True] * 3 + [False]


def test_the_terminal_shows_the_same(runs):
    text = as_text(compare(runs))
    lines = text.splitlines()
    assert any(line.startswith("caption/cider_d") and "1.250 (-0.250)" in line for line in lines)
    assert "note: without scores: going, clip" in lines
    assert any(line.startswith("model.fusion") for line in lines)


def test_names_that_are_alike_are_told_apart(tmp_path):
    folders = [RunFolder(tmp_path / "a" / "run"), RunFolder(tmp_path / "b" / "run")]
    assert short_names(folders) == tuple(str(folder.path) for folder in folders)


def test_too_few_runs_and_what_is_none_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="two runs or more"):
        compare(runs[:1])
    with pytest.raises(ValueError, match="a run is given twice: early, early"):
        compare([runs[0], runs[0]])
    with pytest.raises(FileNotFoundError, match="is no run"):
        summarise(RunFolder(tmp_path / "nothing"), "nothing", SIZES)
