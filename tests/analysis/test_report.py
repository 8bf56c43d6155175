"""The report: self-contained, escaped, complete, and refused where its parts do not fit."""

import base64
import dataclasses
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from unified_mm.analysis.report import (
    CaptionExample,
    ReportData,
    RetrievalExample,
    RuleTable,
    render_report,
)

NASTY = "<script>alert('x')</script> & \"quotes\" $x^2$"
RED = np.full((8, 8, 3), [200, 10, 10], np.uint8)
BLUE = np.full((8, 6, 3), [10, 10, 200], np.uint8)


def example_data() -> ReportData:
    steps = list(range(0, 100, 10))
    return ReportData(
        title="first " + NASTY,
        banner="NOT YOUR DATA " + NASTY,
        result={
            "scores": {
                "text_to_image/recall_at_1": 0.215,
                "text_to_image/median_rank": 9.0,
                "caption/cider_d": 1.75,
                "answer/accuracy/how many": 0.5,
            },
            "chance": {"text_to_image/recall_at_1": 0.001},
            "ceiling": {"text_to_image/recall_at_1": 0.925},
            "data": {"source": "world", "counts": {"train": 6000}},
            "device": NASTY,
            "seconds": 3725.4,
            "flops": 1.25e15,
            "seed": 0,
        },
        config={"model": {"fusion": NASTY}},
        curves={
            "loss": (steps, [3.0 / (1 + s) for s in steps]),
            "captioning/loss": (steps, [None, float("nan")] + [1.0] * 8),
            "learning_rate": (steps, [1e-3] * 10),
            NASTY: (steps, [0.5] * 10),
        },
        retrieval=[RetrievalExample("query " + NASTY, [RED, BLUE], [False, True])],
        captions=[CaptionExample(BLUE, ("reference " + NASTY, "two"), "generated " + NASTY)],
        rules={"prefix": RuleTable(["img", NASTY], np.array([[True, False], [True, True]]))},
    )


class Page(HTMLParser):
    """Tags with attributes, and all text outside of style sheets."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(example_data())


def test_nothing_is_fetched(html):
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, value)
    assert "url(http" not in html and "@import" not in html


def test_everything_is_shown_and_escaped(html):
    page = Page(html)
    assert "alert('x')</script>" not in html
    for start in ("first", "NOT YOUR DATA", "query", "reference", "generated"):
        assert f"{start} {NASTY}" in page.text
    for expected in ("0.215", "0.001", "0.925", "1.750", "1 h 2 min 5 s", "1.25e+15", "CIDEr-D"):
        assert expected in page.text
    assert '"fusion"' in page.text and "train 6000" in page.text
    assert "answer" in page.text and "how many" in page.text


def test_banner_comes_first_and_only_where_there_is_one(html):
    assert html.index('role="alert"') < html.index("<main>")
    plain = render_report(dataclasses.replace(example_data(), banner=None))
    assert 'role="alert"' not in plain


def test_pictures_arrive_unchanged_and_the_right_one_is_framed(html):
    body = html[html.index("<h2>Search") : html.index("<h2>Captions")]
    items = body.split("<li")[1:]
    assert ['class="right"' in item for item in items] == [False, True]
    for item, image in zip(items, (RED, BLUE), strict=True):
        encoded = item.split("base64,")[1].split('"')[0]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
        np.testing.assert_array_equal(shown, image)


def test_curves_of_one_quantity_share_a_chart_that_takes_the_page_colour(html):
    page = Page(html)
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # losses, learning rate, the nasty one
    assert "currentColor" in html and "#010203" not in html
    assert html.index("<h3>loss</h3>") < html.index("<h3>learning rate</h3>")


def test_mask_cells(html):
    body = html[html.index('<table class="rule">') :]
    rows = body.split("<tbody>")[1].split("<tr>")[1:]
    cells = [['class="seen"' in cell for cell in row.split("<td")[1:]] for row in rows]
    assert cells == [[True, False], [True, True]]


def test_same_data_same_page(html):
    assert render_report(example_data()) == html


def test_sections_without_content_are_left_out():
    page = render_report(ReportData("bare", None, {"scores": {"loss": 1.0}}, {}))
    assert "<h2>Scores" in page
    for section in ("Learning curves", "Search", "Captions", "Attention rules"):
        assert f"<h2>{section}" not in page


def test_parts_that_do_not_fit_are_refused():
    data = example_data()
    with pytest.raises(ValueError, match="1 images and 2 marks"):
        lopsided = RetrievalExample("q", [RED], [True, False])
        render_report(dataclasses.replace(data, retrieval=[lopsided]))
    with pytest.raises(ValueError, match="rule 'joint' has 1 labels"):
        rule = RuleTable(["a"], np.ones((2, 2), bool))
        render_report(dataclasses.replace(data, rules={"joint": rule}))
    with pytest.raises(KeyError, match="scores"):
        render_report(dataclasses.replace(data, result={}))
