"""`python -m unified_mm.serve` as a user types it."""

import json
import os
import signal
import sys

import httpx
import live_server
import processes
import pytest
import tiny

from unified_mm import serve

TOKEN = "a-token-of-some-length"
PICTURE = live_server.png((300, 200))


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        serve.main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "first"
    return tiny.write_run(path, tiny.config_dict(), tiny.params(tiny.task()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host=0.0.0.0 can be reached by others and no token is set"),
        (["--token_file", "nowhere"], "--token_file=nowhere: there is no such file"),
        (["--host", "no.such.host.invalid"], "no token is set"),
        (["--megapixels", "0"], "--megapixels=0.0: must be above 0"),
        (["--queue", "0"], "--queue: 0 must be at least 1"),
        (["--index", "nowhere"], "nowhere is no search index"),
        (["--run", "nowhere"], "nowhere is no run"),
    ],
)
def test_what_cannot_be_served_is_one_line(trained, capsys, arguments, message):
    assert run("--run", trained, "--port", "0", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def environment(**more):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", **more}


def serving(trained, *arguments, **variables):
    """The command as a process of its own."""
    command = (sys.executable, "-m", "unified_mm.serve", "--run", str(trained), "--port", "0")
    return processes.started(environment(**variables), *command, *arguments)


def url_of(process):
    """Where it says that it serves."""
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("serving at "):
            return line.split()[2].rstrip(",")
    raise AssertionError("it did not serve: " + "".join(said))


def under_way(url):
    """Whether one request is."""
    return "\nunified_mm_under_way 1.0" in httpx.get(url + "/metrics").text


@pytest.mark.slow
def test_it_serves_until_it_is_told_to_stop(trained):
    with serving(trained) as process:
        url = url_of(process)
        assert httpx.get(url + "/healthz").json()["step"] == 7
        assert httpx.post(url + "/caption", files={"image": PICTURE}).status_code == 200
        found = httpx.post(url + "/embed", json={"texts": ["red"]}).json()
        assert len(found["texts"][0]) == 8
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "stopped; all were finished" in process.stdout.read()


@pytest.mark.slow
def test_sigterm_finishes_what_is_under_way(trained):
    with serving(trained) as process:
        url = url_of(process)
        body = json.dumps({"texts": ["a red square"] * 64}).encode()

        def slowly():  # the body ends after the signal
            yield body[:100]
            live_server.eventually(lambda: under_way(url))
            process.send_signal(signal.SIGTERM)
            live_server.eventually(lambda: httpx.get(url + "/healthz").status_code == 503)
            yield body[100:]

        kind = {"content-type": "application/json"}
        answer = httpx.post(url + "/embed", content=slowly(), headers=kind, timeout=60)
        assert answer.status_code == 200 and len(answer.json()["texts"]) == 64
        assert process.wait(60) == 0


@pytest.mark.slow
def test_a_stream_that_outlasts_the_drain_gives_its_own_exit_code(trained):
    with serving(trained, "--drain_seconds", "0.5") as process:
        url = url_of(process)

        def never_ending():
            yield b"{"
            live_server.eventually(lambda: under_way(url))
            process.send_signal(signal.SIGTERM)
            live_server.eventually(lambda: process.poll() is not None, 60)
            yield b"}"

        kind = {"content-type": "application/json"}
        answer = httpx.post(url + "/embed", content=never_ending(), headers=kind, timeout=60)
        assert answer.status_code == 503 and answer.json()["error"] == "stopping"
        assert process.wait(60) == 143
        assert "stopped; some were cut off" in process.stdout.read()


@pytest.mark.slow
def test_a_token_opens_a_server_for_others(trained, tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with serving(trained, "--host", "0.0.0.0", "--token_file", str(token)) as process:
        url = url_of(process).replace("0.0.0.0", "127.0.0.1")
        asked = {"json": {"texts": ["red"]}}
        assert httpx.post(url + "/embed", **asked).status_code == 401
        bearing = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.post(url + "/embed", **asked, headers=bearing).status_code == 200
