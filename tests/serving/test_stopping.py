"""Who leaves frees what was working for them; a server that stops finishes what is under way."""

import signal
import socket
import threading
from contextlib import closing
from itertools import product

import httpx
import live_server
import pytest

from unified_mm.inference.loaded import BATCHES
from unified_mm.inference.slots import ENTERING
from unified_mm.serving.limits import Limits
from unified_mm.serving.server import bind, url_of
from unified_mm.serving.service import Service
from unified_mm.serving.starting import prompts_of_each_width, warm_up
from unified_mm.serving.worker import Worker

GOOD = live_server.png()


@pytest.fixture(scope="module")
def model():
    return live_server.model()


@pytest.fixture
def engine():
    return live_server.ByHand()


def asking(running, answers, **data):
    """A thread that asks for a caption."""

    def ask():
        response = httpx.post(
            running.url + "/caption", files={"image": GOOD}, data=data, timeout=30
        )
        answers.append((response.status_code, response.text))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.parametrize("stream", ["true", "false"])
def test_who_hangs_up_cancels_the_writing(model, engine, stream):
    with live_server.Running(model, engine) as running:
        body = httpx.Request(
            "POST", running.url + "/caption", files={"image": GOOD}, data={"stream": stream}
        )
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as leaving:
            head = [f"{name}: {value}" for name, value in body.headers.items()]
            leaving.sendall("\r\n".join(["POST /caption HTTP/1.1", *head, "", ""]).encode())
            leaving.sendall(body.read())
            writing = engine.asked.get(timeout=10)
            writing.write("a")
            assert not writing.cancelled.wait(0.1)
        assert writing.cancelled.wait(10)
        live_server.eventually(lambda: running.traffic.under_way == 0)
        answers = []
        thread = asking(running, answers)
        engine.asked.get(timeout=10).write("a red", " cube", None)
        thread.join()
        assert answers == [(200, '{"text": "a red cube"}')]


def test_who_does_not_read_is_not_waited_for(model, engine):
    limits = Limits(seconds=0.5)
    with live_server.Running(model, engine, limits=limits) as running:
        asked = {"files": {"image": GOOD}, "data": {"stream": "true"}}
        with running.client.stream("POST", "/caption", **asked) as response:
            engine.asked.get(timeout=10).write(*["x" * 1_000_000] * 20, None)
            live_server.eventually(lambda: running.traffic.under_way == 0)
            with pytest.raises(httpx.TransportError):
                response.read()


def test_a_signal_drains(model, engine):
    answers = []
    with live_server.Running(model, engine) as running:
        thread = asking(running, answers, stream="true")
        writing = engine.asked.get(timeout=10)
        writing.write("a red")
        running.server.handle_exit(signal.SIGTERM, None)
        health = httpx.get(running.url + "/healthz")
        assert health.status_code == 503 and health.json()["status"] == "draining"
        refused = httpx.post(running.url + "/embed", json={"texts": ["red"]})
        assert refused.status_code == 503 and refused.json()["error"] == "draining"
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(running.url + "/metrics").status_code == 200
        writing.write(" cube", None)
        thread.join()
        running.thread.join(10)
        assert not running.thread.is_alive() and running.server.exit_code == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.url + "/healthz")
    assert answers[0][0] == 200 and '{"text": "a red cube"}' in answers[0][1]


def test_what_outlasts_the_drain_is_told_so(model, engine):
    answers = []
    with live_server.Running(model, engine, drain_seconds=0.3) as running:
        thread = asking(running, answers)
        writing = engine.asked.get(timeout=10)
        running.server.handle_exit(signal.SIGTERM, None)
        thread.join()
        assert writing.cancelled.wait(10)
        running.thread.join(10)
        assert running.server.exit_code == 143
    status, text = answers[0]
    assert status == 503 and "the server stops and could not finish this" in text


def test_a_second_signal_ends_it_at_once(model, engine):
    answers = []
    with live_server.Running(model, engine, drain_seconds=60.0) as running:
        thread = asking(running, answers)
        writing = engine.asked.get(timeout=10)
        for _ in range(2):
            running.server.handle_exit(signal.SIGINT, None)
        running.thread.join(10)
        assert not running.thread.is_alive() and running.server.exit_code == 130
        thread.join()
        assert writing.cancelled.wait(10)


def test_an_address_that_is_taken_is_named():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1:{port}: .* in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ValueError, match="--host=no.such.host.invalid"):
        bind("no.such.host.invalid", 0)


def test_warming_up_asks_for_all_that_is_compiled_and_says_what_fails(model, monkeypatch):
    embedded, begun = [], []

    def embed(_, batch, of, objective):
        embedded.append((len(batch["image"]["present"]), of))

    monkeypatch.setattr(type(model.predictor), "embed", embed)
    monkeypatch.setattr(Service, "begin", lambda _, view, prompt, how: begun.append(prompt) or "a")
    with Worker(1) as worker, closing(Service(model, worker, Limits())) as service:
        service.missing.pop("/caption", None)
        warm_up(service)
        assert sorted(embedded) == sorted(product(BATCHES, ("image", "text")))
        prompts = prompts_of_each_width(model)
        used = [model.predictor.prompts([each])[0]["ids"].shape[1] for each in prompts]
        assert used == [1, model.task.modalities["text"].length]  # the longest is below 16
        assert begun == [each for each in prompts for size in ENTERING for _ in range(size + 1)]
        monkeypatch.setattr(type(model.predictor), "embed", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            warm_up(service)
