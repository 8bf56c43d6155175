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
    assert '"fusion"' in page.text and "6,000 train" in page.text
    assert "answer" in page.text and "how many" in page.text


def test_banner_comes_first_and_only_where_there_is_one(html):
    assert html.index('role="alert"') < html.index("<main>")
    plain = render_report(dataclasses.replace(example_data(), banner=None))
    assert 'role="alert"' not in plain


def test_pictures_arrive_unchanged_and_the_right_one_is_framed(html):
    body = html[html.index("<h2>Search") : html.index("<h2>Scores")]
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


def test_pictures_come_first_then_what_was_scored_and_all_else_is_folded(html):
    order = ("<h2>Captions", "<h2>Search", "<h2>Scores", "<h2>Learning curves", "All 4 scores")
    places = [html.index(each) for each in (*order, "The run", "Configuration", "Attention rules")]
    assert places == sorted(places)
    folded = html[html.index("All 4 scores") :]
    assert '<table class="scores">' in folded and '<table class="rule">' in folded
    assert "<details open" not in html


def test_of_many_pictures_and_references_the_first_are_open():
    caption = CaptionExample(BLUE, ("one", "two", "three", "four", "five"), "cube")
    search = RetrievalExample("query", [RED], [True])
    data = dataclasses.replace(example_data(), captions=[caption] * 8, retrieval=[search] * 5)
    html = render_report(data)
    captions, searches = html[html.index("<h2>Captions") :].split("<h2>Search")
    before, after = captions.split("<summary>2 more</summary>")
    assert (before.count("<p>cube"), after.count("<p>cube")) == (6, 2)
    assert before.count("<summary>3 more</summary>") == 6
    before, after = searches.split("<summary>1 more</summary>")
    assert (before.count('<p class="query">'), after.count('<p class="query">')) == (4, 1)


def figures(scores, **result):
    """The name and the text of each key score."""
    html = render_report(ReportData("a", None, {"scores": scores, **result}, {}))
    part = html[html.index("<h2>Scores") : html.index("<table")]
    cards = (each.partition("</h3>") for each in part.split("<h3>")[1:])
    return {name: Page(rest).text for name, _, rest in cards}


def test_six_scores_stand_out_and_say_what_they_are():
    found = figures(
        {
            "text_to_image/recall_at_1": 0.1,
            "text_to_image/recall_at_10": 0.2,
            "single_caption/text_to_image/recall_at_1": 0.11,
            "single_caption/text_to_image/recall_at_10": 0.22,
            "single_caption/image_to_text/recall_at_1": 0.33,
            "caption/bleu_4": 0.01,
            "caption/cider_d": 0.75,
            "caption/nats": 0.5,
            "caption/image_gain": 0.25,
            "caption/image_gain_low": 0.24,
            "foil/accuracy": 0.8,
            "foil/accuracy/side": 0.6,
            "test_composition/foil/accuracy": 0.7,
        },
        chance={"single_caption/text_to_image/recall_at_1": 0.02},
        ceiling={"single_caption/text_to_image/recall_at_1": 0.98},
        data={"source": "world", "counts": {"val": 9, "test_composition": 9}},
    )
    assert list(found) == [
        "text to image › recall at 1",
        "text to image › recall at 10",
        "image to text › recall at 1",
        "caption › CIDEr-D",
        "foil › accuracy",
        "caption › image gain",
    ]
    first = next(iter(found.values()))
    assert "0.110 chance 0.020 ceiling 0.980" in first
    assert "of texts find their own image first" in first


def test_any_modality_and_any_contrast_has_key_scores():
    found = figures(
        {
            "second/single_caption/text_to_tone/recall_at_1": 0.1,
            "image_to_tone/recall_at_1": 0.2,
            "single_caption/tone_to_text/recall_at_1": 0.3,
        }
    )
    assert list(found) == [
        "second › text to tone › recall at 1",
        "tone to text › recall at 1",
        "image to tone › recall at 1",
    ]
    assert "of images find their own tone first" in found["image to tone › recall at 1"]


def test_scores_that_none_is_known_of_are_the_first_ones():
    own = {f"mine/{i}": 0.1 * i for i in range(8)}
    assert list(figures(own)) == [f"mine › {i}" for i in range(6)]
    assert figures({}) == {}


def test_the_heading_says_what_was_trained_on_what_and_what_was_cut(html):
    heading = html[html.index("<h1>") : html.index("<h2>")]
    text = Page(heading).text
    assert "world: 6,000 train" in text and NASTY in text and "1 h 2 min 5 s" in text
    assert "texts cut" not in text  # an older run does not say it
    result = {**example_data().result, "data": {"source": "coco", "cut_share": 0.1234}}
    cut = Page(render_report(dataclasses.replace(example_data(), result=result))).text
    assert "texts cut 12.3%" in cut and "data coco" in cut


def test_pictures_that_are_small_are_not_blurred():
    large = np.zeros((192, 192, 3), np.uint8)
    captions = [CaptionExample(each, (), "") for each in (RED, large)]
    html = render_report(dataclasses.replace(example_data(), captions=captions, retrieval=()))
    assert [dict(each).get("class") for tag, each in Page(html).tags if tag == "img"] == [
        "pixels",
        None,
    ]


def test_a_search_says_where_the_right_one_is_not_found(html):
    said = "the right one is not among these"
    assert said not in html
    missed = [RetrievalExample("query", [RED, BLUE], [False, False])]
    assert said in render_report(dataclasses.replace(example_data(), retrieval=missed))
