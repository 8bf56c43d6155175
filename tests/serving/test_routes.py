"""What is asked over HTTP is what the model says by itself."""

import base64
import json
import threading

import live_server
import numpy as np
import pytest

from unified_mm.data.images import decode
from unified_mm.inference.classes import TEMPLATES
from unified_mm.inference.engine import Engine
from unified_mm.serving.limits import Limits

PICTURES = [live_server.png(seed=number) for number in range(3)]


@pytest.fixture(scope="module")
def model():
    return live_server.model()


def attend(model, view, prompt, text):
    """Stands in for the model's attention: what it was asked comes back."""
    if not text.split():
        raise ValueError(f"the text {text!r} has no word to draw attention for")
    maps = np.full((len(text.split()), 2, 2), 0.25, np.float32)
    return [f"{prompt}:{word}" for word in text.split()], maps


@pytest.fixture(scope="module")
def running(model, tmp_path_factory):
    files = {f"{number}.png": content for number, content in enumerate(PICTURES)}
    index = live_server.indexed(model, files, tmp_path_factory.mktemp("index"))
    with (
        Engine(model, slots=2) as engine,
        live_server.Running(model, engine, index=index, attend=attend) as running,
    ):
        yield running


def view(model, content):
    return model.view(decode(content, at_least=16))


def said(model, content, prompt=""):
    """What the model itself says; beside a longer prompt, so that one program does for all."""
    return model.answer([view(model, content)] * 2, [prompt, "size 2 of a green square"])[0]


def as_json(**fields):
    """The same fields with pictures in base64."""

    def plain(value):
        if isinstance(value, list):
            return [plain(each) for each in value]
        return base64.b64encode(value).decode() if isinstance(value, bytes) else value

    return {"json": {name: plain(value) for name, value in fields.items()}}


def test_captions_and_answers_are_the_models(running, model):
    expected = said(model, PICTURES[0])
    for asked in ({"files": {"image": PICTURES[0]}}, as_json(image=PICTURES[0])):
        response = running.client.post("/caption", **asked)
        assert (response.status_code, response.json()) == (200, {"text": expected})
    question = "a red"
    expected = said(model, PICTURES[0], question)
    asked = {"files": {"image": PICTURES[0]}, "data": {"question": question}}
    assert running.client.post("/answer", **asked).json() == {"text": expected}


def test_a_stream_ends_with_the_whole_text(running, model):
    asked = {"files": {"image": PICTURES[1]}, "data": {"stream": "true", "prompt": "a red"}}
    with running.client.stream("POST", "/caption", **asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(response.iter_text()).strip().split("\n\n")
    events = [[line.partition(": ")[2] for line in block.split("\n")] for block in blocks]
    pieces = [json.loads(data)["text"] for name, data in events if name == "message"]
    expected = said(model, PICTURES[1], "a red")
    assert events[-1][0] == "done" and json.loads(events[-1][1])["text"] == expected
    assert "".join(pieces) == expected


def test_embeddings_are_the_models(running, model):
    texts = ["a red square", "blue, size 2"]
    both = {"data": {"texts": texts}, "files": [("images", each) for each in PICTURES]}
    for asked in (both, as_json(texts=texts, images=PICTURES)):
        found = running.client.post("/embed", **asked).json()
        images = model.embed_images([view(model, each) for each in PICTURES])
        np.testing.assert_allclose(found["images"], images, atol=1e-5)
        np.testing.assert_allclose(found["texts"], model.embed_texts(texts), atol=1e-5)
    only = running.client.post("/embed", json={"texts": texts}).json()
    assert only["images"] == [] and len(only["texts"]) == 2


@pytest.mark.parametrize("templates", [None, ["a {}", "{}!"]])
def test_classes_come_best_first(running, model, templates):
    classes = ["red", "green", "blue"]
    fields = {"classes": classes} | ({} if templates is None else {"templates": templates})
    found = running.client.post("/classify", files={"image": PICTURES[0]}, data=fields).json()
    scores = model.classify([view(model, PICTURES[0])], classes, templates or TEMPLATES)[0]
    order = np.argsort(-scores)
    assert [each["name"] for each in found["classes"]] == [classes[i] for i in order]
    similarities = [each["similarity"] for each in found["classes"]]
    np.testing.assert_allclose(similarities, scores[order], atol=1e-5)


def test_a_picture_finds_itself_and_can_be_seen(running):
    found = running.client.post("/search", files={"image": PICTURES[2]}, data={"count": 2}).json()
    assert found["kind"] == "image" and len(found["results"]) == 2
    best = found["results"][0]
    assert best["picture"] == 2 and best["score"] == pytest.approx(1, abs=1e-5)
    assert best["name"] == running.service.index.rows.names[2] and "/" not in best["name"]
    seen = running.client.get(f"/pictures/{best['picture']}")
    assert seen.headers["content-type"] == "image/jpeg"
    assert decode(seen.content).shape == (20, 24, 3)


def test_text_and_picture_are_searched_together(running, model):
    vectors = [model.embed_texts(["red"])[0], model.embed_images([view(model, PICTURES[0])])[0]]
    mean = np.mean(vectors, axis=0)
    expected = running.service.index.search(mean, 3)
    asked = {"files": {"image": PICTURES[0]}, "data": {"text": "red"}}
    found = running.client.post("/search", **asked).json()["results"]
    assert [each["picture"] for each in found] == [each.picture for each in expected]
    scores = [each.score for each in expected]
    np.testing.assert_allclose([each["score"] for each in found], scores, atol=1e-5)


def test_attention_comes_word_by_word(running):
    fields = {"text": "a red cube", "prompt": "what?"}
    found = running.client.post("/attention", files={"image": PICTURES[0]}, data=fields).json()
    assert found["words"] == ["what?:a", "what?:red", "what?:cube"] and found["fit"] == "crop"
    assert np.shape(found["maps"]) == (3, 2, 2)


def test_many_at_a_time_each_get_their_own(running, model):
    expected = [said(model, each) for each in PICTURES]
    vectors = model.embed_images([view(model, each) for each in PICTURES])
    wrong = []

    def ask(number):
        files = {"image": PICTURES[number]}
        text = running.client.post("/caption", files=files).json()["text"]
        asked = {"files": [("images", PICTURES[number])]}
        vector = running.client.post("/embed", **asked).json()["images"][0]
        if text != expected[number] or np.abs(vector - vectors[number]).max() > 1e-5:
            wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number % 3,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_health_says_what_can_be_asked(running):
    health = running.client.get("/healthz").json()
    assert health["status"] == "ok" and health["missing"] == {}
    assert health["fusion"] == "early" and health["step"] == 7 and health["pictures"] == 3
    paths = running.client.get("/openapi.json").json()["paths"]
    assert set(health["routes"]) <= set(paths) and len(health["routes"]) == 7


def test_metrics_count_by_route_and_status(running):
    running.client.get("/pictures/77")
    running.client.get("/nothing/here")

    def both_counted():  # an answer may be read a moment before it is
        text = running.client.get("/metrics").text
        counted = 'unified_mm_requests_total{route="%s",status="404"}'
        return all(counted % route in text for route in ("/pictures/{number}", "other"))

    live_server.eventually(both_counted)
    text = running.client.get("/metrics").text
    for name in ("unified_mm_request_seconds_bucket", "unified_mm_array_bytes", "unified_mm_under"):
        assert f"\n{name}" in text
    assert "process_resident_memory_bytes" in text


@pytest.mark.parametrize("path", ["/", "/docs", "/app.js", "/style.css", "/icon.svg", "/docs.js"])
def test_the_page_loads_nothing_from_elsewhere(running, path):
    response = running.client.get(path)
    assert response.status_code == 200
    content = response.text.replace("http://www.w3.org/2000/svg", "")
    assert "://" not in content and "innerHTML" not in content and "style=" not in content
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert response.headers["x-content-type-options"] == "nosniff"


def test_what_a_run_cannot_do_is_said_and_not_offered():
    changes = {"objectives__captioning__weight": 0.0, "objectives__matching__weight": 0.0}
    with live_server.Running(live_server.model(**changes)) as running:
        for path, why in (
            ("/caption", "this run cannot write: it was trained on contrastive"),
            ("/search", "the server was started without --index"),
        ):
            response = running.client.post(path)
            assert response.status_code == 404 and response.json()["message"] == why
            assert path not in running.client.get("/openapi.json").json()["paths"]
        assert running.client.post("/embed", json={"texts": ["red"]}).status_code == 200


def test_tiny_limits_are_refused():
    with pytest.raises(ValueError, match="the limit pixels=0 must be above 0"):
        Limits(pixels=0)
