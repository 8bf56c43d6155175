"""Every request that cannot be served is told why, by status and in words, and harms no other."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib

import httpx
import live_server
import pytest
from PIL import Image

from unified_mm.serving.limits import Limits

LIMITS = Limits(
    upload_bytes=200_000,
    pixels=10_000,
    characters=100,
    texts=3,
    pictures=2,
    sentences=4,
    results=12,
    upload_seconds=0.5,
)
GOOD = live_server.png()
JPEG = live_server.png((60, 60), format="JPEG")


@pytest.fixture(scope="module")
def model():
    return live_server.model()


@pytest.fixture(scope="module")
def running(model, tmp_path_factory):
    index = live_server.indexed(model, {"0.png": GOOD}, tmp_path_factory.mktemp("index"))
    engine = live_server.ByHand(room=10_000)
    with live_server.Running(model, engine, index=index, limits=LIMITS) as running:
        yield running


def header_of(width, height):
    """A PNG that says it has so many pixels, and holds hardly any."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b"")


def tiff():
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "TIFF")
    return out.getvalue()


def refused(response, status, error, words=""):
    said = response.json()
    assert (response.status_code, said["error"]) == (status, error), said
    assert said["status"] == status and words in said["message"]
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("content", "status", "error", "words"),
    [
        (b"", 422, "no_picture", "the file is empty"),
        (b"no picture at all", 415, "no_picture", "these 17 bytes are no picture"),
        (tiff(), 415, "no_picture", "JPEG, PNG, WEBP, GIF, BMP"),
        (
            live_server.png((60, 60), format="JPEG")[:700],
            422,
            "broken_picture",
            "cannot be decoded",
        ),
        (GOOD[:40], 415, "no_picture", "image:"),
        (header_of(101, 100), 413, "too_many_pixels", "101 x 100 pixels, over the limit of 10000"),
        (header_of(9_500, 9_500), 413, "too_many_pixels", "the limit of 10000"),
        (header_of(20_000, 10_000), 413, "too_many_pixels", "the limit of 10000"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "no_picture", ""),
    ],
)
@pytest.mark.parametrize("form", [True, False])
def test_bad_pictures(running, content, status, error, words, form):
    if form:
        response = running.client.post("/caption", files={"image": content})
    else:
        fields = {"image": base64.b64encode(content).decode()}
        response = running.client.post("/caption", json=fields)
    refused(response, status, error, words)


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/caption", {}, "image: Field required"),
        ("/caption", {"image": 5}, "image: Input should be a valid bytes"),
        ("/caption", {"image": "/etc/passwd"}, "in JSON its bytes in base64 (never a path"),
        ("/caption", {"image": "file:///etc/passwd"}, "never a path or a URL"),
        ("/caption", {"image": {"path": "/etc/passwd"}}, "image: Input should be"),
        ("/caption", {"image": "", "path": "/etc/passwd"}, "path: Extra inputs are not permitted"),
        ("/caption", {"image": "", "tokens": 0}, "tokens: Input should be greater than"),
        ("/caption", {"image": "", "tokens": "5"}, "tokens: Input should be a valid integer"),
        ("/caption", {"image": "", "temperature": -1}, "temperature"),
        ("/caption", {"image": "", "top_p": 0}, "top_p"),
        ("/caption", {"image": "", "prompt": "x" * 101}, "prompt: 101 characters, at most 100"),
        ("/answer", {"image": ""}, "question: Field required"),
        ("/embed", {}, "give images, texts or both"),
        ("/embed", {"texts": "a"}, "texts: Input should be a valid list"),
        ("/embed", {"texts": ["a", 5]}, "texts.1: Input should be a valid string"),
        ("/embed", {"texts": ["a"] * 4}, "texts: 4 given, at most 3 are taken"),
        ("/embed", {"images": ["", "", ""]}, "images: 3 given, at most 2"),
        ("/classify", {"image": "", "classes": []}, "classes: List should have at least 1"),
        ("/search", {}, "give text, image or both"),
        ("/search", {"text": "a", "count": 13}, "count: 13 asked, at most 12 are given"),
        ("/search", {"text": "a", "kind": "path"}, "kind: Input should be 'image' or 'text'"),
        ("/search", {"text": "a", "kind": "text"}, "this index holds pictures alone"),
        ("/embed", [1, 2], "the body: Input should be"),
    ],
)
def test_wrong_fields(running, path, fields, words):
    response = running.client.post(path, json=fields)
    assert response.status_code == 422 and words in response.json()["message"], response.text


def test_wrong_values_of_a_form(running):
    for data, words in (
        ({"tokens": "many"}, "tokens: Input should be a valid integer"),
        ({"stream": "perhaps"}, "stream: Input should be a valid boolean"),
        ({"prompt": ["a", "b"]}, "'prompt': given 2 times"),
        ({"top_k": "3"}, "give a temperature above 0"),
        ({"../../etc/passwd": "x"}, "Extra inputs"),
    ):
        response = running.client.post("/caption", files={"image": GOOD}, data=data)
        assert response.status_code == 422 and words in response.json()["message"], response.text
    fields = {"classes": ["a"], "templates": ["no place"]}
    response = running.client.post("/classify", files={"image": GOOD}, data=fields)
    refused(response, 422, "wrong_template", "must have the class's place")
    fields = {"classes": ["a", "b", "c"], "templates": ["{}", "a {}"]}
    response = running.client.post("/classify", files={"image": GOOD}, data=fields)
    refused(response, 422, "too_many", "3 classes in 2 templates: at most 4 in all")


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (b"{", "application/json", 400, "the body is no JSON"),
        (b"\xff\xfe", "application/json", 400, "the body is no JSON: UnicodeDecodeError"),
        (b"null", "application/json", 422, "the body: Input should be"),
        (b"[" * 100_000, "application/json", 400, "the body is no JSON: RecursionError"),
        (b'{"texts": [NaN]}', "application/json", 400, "no JSON"),
        (b'{"count": ' + b"9" * 9000 + b"}", "application/json", 400, "no JSON"),
        (b'{"texts": ["\\ud800"]}', "application/json", 422, "half of a surrogate pair"),
        (b'{"\\ud800": 1}', "application/json", 422, "the body: "),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x", 400, "it breaks off"),
        (b"x", "multipart/form-data", 400, "Missing boundary"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "must be multipart/form-data or"),
        (b"", "", 415, "its content-type says nothing"),
    ],
)
def test_bodies_that_are_not_well_formed(running, content, kind, status, words):
    headers = {"content-type": kind} if kind else {}
    response = running.client.post("/embed", content=content, headers=headers)
    assert response.status_code == status and words in response.json()["message"], response.text


def test_large_bodies_are_refused_by_their_header_and_while_they_are_read(running):
    refused(running.client.post("/caption", content=bytes(200_001)), 413, "upload_too_large")
    sent = 0

    def endless():  # without a Content-Length
        nonlocal sent
        for _ in range(400):
            sent += 1000
            yield bytes(1000)

    kind = {"content-type": "application/json"}
    response = running.client.post("/caption", content=endless(), headers=kind)
    refused(response, 413, "upload_too_large", "over the limit of 200000 bytes")
    refused(running.client.post("/nothing", content=bytes(200_001)), 413, "upload_too_large")


def test_a_body_that_does_not_come_is_not_waited_for(running):
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as waiting:
        head = f"POST /embed HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        waiting.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        answer = b""
        while part := waiting.recv(4096):
            answer += part
    assert b"408 Request Timeout" in answer and b"slow_upload" in answer


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/pictures/1", 404),
        ("/pictures/999999999999", 404),
        ("/pictures/9999999999999", 422),
        ("/pictures/-1", 422),
        ("/pictures/%2e%2e%2fetc%2fpasswd", 404),
        ("/pictures/..%2f..%2fetc%2fpasswd", 404),
        ("/pictures/0.png", 422),
        ("/../../etc/passwd", 404),
        ("//etc/passwd", 404),
        ("/static/app.js", 404),
        ("/app.js/../../limits.py", 404),
        ("/%00", 404),
    ],
)
def test_no_path_of_the_disk_can_be_asked_for(running, path, status):
    host, port = running.url.removeprefix("http://").split(":")
    # httpx would clean the path up.
    with socket.create_connection((host, int(port)), timeout=10) as asking:
        asking.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := asking.recv(4096):
            answer += part
    assert answer.split()[1] == str(status).encode(), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["message"]
    assert b"root:" not in answer


def test_a_picture_that_has_changed_is_not_shown(running):
    where = running.service.index.pictures / "0.png"
    content = where.read_bytes()
    try:
        where.write_bytes(b"short")
        refused(running.client.get("/pictures/0"), 404, "no_picture", "as it was indexed")
        where.write_bytes(bytes(len(content)))
        refused(running.client.get("/pictures/0"), 404, "no_picture", "as it was indexed")
    finally:
        where.write_bytes(content)


def test_wrong_methods_and_paths(running):
    response = running.client.get("/caption")
    refused(response, 405, "wrong_method", "/caption takes no GET")
    assert response.headers["allow"] == "POST"
    refused(running.client.post("/nothing"), 404, "no_such_path", "see /docs")


def test_a_prompt_that_the_engine_refuses(running):
    asked = {"files": {"image": GOOD}, "data": {"prompt": "refuse this", "stream": "true"}}
    refused(running.client.post("/caption", **asked), 422, "wrong_prompt", "the prompt is refused")


def test_an_error_of_ours_says_nothing_of_the_inside_and_harms_no_other(running, caplog):
    engine = running.service.engine
    answers = []
    asked = {"files": {"image": GOOD}, "data": {"prompt": "broken"}}
    asking = threading.Thread(
        target=lambda: answers.append(running.client.post("/caption", **asked))
    )
    asking.start()
    engine.asked.get(timeout=10).write("a", RuntimeError("secret: /root/model"))
    asking.join()
    refused(answers[0], 500, "failed")
    assert "secret" not in answers[0].text
    live_server.eventually(lambda: "secret: /root/model" in caplog.text)
    assert running.client.post("/embed", json={"texts": ["red"]}).status_code == 200


def test_bad_requests_beside_good_ones(running):
    good = running.client.post("/embed", json={"texts": ["red"]}).json()
    wrong = []

    def bad(number):
        files = {"image": [b"x", GOOD[:50], header_of(20_000, 10_000)][number % 3]}
        if running.client.post("/caption", files=files).status_code not in (413, 415, 422):
            wrong.append(number)

    threads = [threading.Thread(target=bad, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert running.client.post("/embed", json={"texts": ["red"]}).json() == good
    for thread in threads:
        thread.join()
    assert wrong == [] and running.traffic.under_way <= 1


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/embed", {"json": {"texts": ["red"]}}),
        ("/caption", {"files": {"image": GOOD}}),
    ],
)
def test_full_queues_say_when_to_come_back(model, path, asked):
    limits = Limits(requests=1)
    engine = live_server.ByHand(room=1)
    with live_server.Running(model, engine, limits=limits) as running:
        first = threading.Thread(
            target=lambda: httpx.post(running.url + "/caption", files={"image": GOOD})
        )
        first.start()
        writing = engine.asked.get(timeout=10)
        response = running.client.post(path, **asked)
        refused(response, 429, "busy", "1 requests are under way; try again in 1 s")
        assert response.headers["retry-after"] == "1"
        writing.write("a", None)
        first.join()


def test_a_full_engine_says_when_to_come_back(model):
    engine = live_server.ByHand(room=0)
    with live_server.Running(model, engine) as running:
        response = running.client.post("/caption", files={"image": GOOD})
        refused(response, 429, "busy", "too many texts wait to be written")


def test_what_takes_too_long_is_given_up(model):
    engine = live_server.ByHand()
    limits = Limits(seconds=0.8)
    with live_server.Running(model, engine, limits=limits) as running:
        refused(running.client.post("/caption", files={"image": GOOD}), 504, "timeout", "0.8 s")
        assert engine.asked.get(timeout=10).cancelled.wait(10)
        asked = {"files": {"image": GOOD}, "data": {"stream": "true"}}
        began = time.monotonic()
        response = running.client.post("/caption", **asked)
        assert time.monotonic() - began < 10
        assert response.status_code == 200 and "event: failed" in response.text
        assert '"status": 504' in response.text
        assert engine.asked.get(timeout=10).cancelled.wait(10)


def test_a_broken_engine_is_said_and_the_rest_goes_on(model):
    engine = live_server.ByHand()
    engine.submit = lambda *_: (_ for _ in ()).throw(RuntimeError("the engine failed"))
    with live_server.Running(model, engine) as running:
        refused(running.client.post("/caption", files={"image": GOOD}), 503, "engine_failed")
        health = running.client.get("/healthz")
        assert health.status_code == 503 and health.json()["status"] == "failed"
        assert running.client.post("/embed", json={"texts": ["red"]}).status_code == 200
