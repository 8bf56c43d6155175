"""Tokens, names and origins."""

import live_server
import pytest

from unified_mm.serving.limits import Refusal
from unified_mm.serving.security import Authenticator, check_binding, is_loopback, read_token

TOKEN = "a-token-of-some-length"


def refusal(keeper, headers, public=False):
    with pytest.raises(Refusal) as refused:
        keeper.check(headers, public=public)
    return refused.value.status, refused.value.error


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.4", False),
        ("example.com", False),
        ("", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected
    if expected:
        check_binding(host, None, False)
    else:
        with pytest.raises(ValueError, match="no token is set: give --token_file"):
            check_binding(host, None, False)
        check_binding(host, TOKEN, False)
        check_binding(host, None, True)


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(str(file), {}) == TOKEN
    assert read_token("", {"UNIFIED_MM_TOKEN": TOKEN}) == TOKEN
    assert read_token("", {}) is None
    with pytest.raises(ValueError, match="both give a token"):
        read_token(str(file), {"UNIFIED_MM_TOKEN": TOKEN})
    with pytest.raises(ValueError, match="there is no such file"):
        read_token(str(tmp_path / "none"), {})


@pytest.mark.parametrize("wrong", ["", "short", "two words of some length", "töken-of-some-length"])
def test_weak_tokens_are_refused_and_not_repeated(tmp_path, wrong):
    file = tmp_path / "token"
    file.write_text(wrong)
    for arguments in ((str(file), {}), ("", {"UNIFIED_MM_TOKEN": wrong})):
        with pytest.raises(ValueError, match="at least 16 ASCII characters") as refused:
            read_token(*arguments)
        assert not wrong or wrong not in str(refused.value)


@pytest.mark.parametrize(
    ("authorization", "error"),
    [
        ("", "no_token"),
        ("Bearer", "no_token"),
        (f"Basic {TOKEN}", "no_token"),
        (TOKEN, "no_token"),
        (f"Bearer {TOKEN}x", "wrong_token"),
        (f"Bearer {TOKEN[:-1]}", "wrong_token"),
        ("Bearer \xff\xfe", "wrong_token"),
    ],
)
def test_only_the_token_opens(authorization, error):
    keeper = Authenticator(TOKEN, "0.0.0.0")
    assert refusal(keeper, {"authorization": authorization}) == (401, error)
    keeper.check({"authorization": authorization}, public=True)
    for scheme in ("Bearer", "bearer"):
        keeper.check({"authorization": f"{scheme} {TOKEN}"}, public=False)


def test_names_that_were_made_to_point_here_are_refused():
    keeper = Authenticator(None, "127.0.0.1")
    for name in ("127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000"):
        keeper.check({"host": name}, public=False)
    for name in ("evil.example", "127.0.0.1.evil.example", "", "[", "localhost.evil:80"):
        assert refusal(keeper, {"host": name}) == (403, "wrong_host")
        assert refusal(keeper, {"host": name}, public=True) == (403, "wrong_host")
    Authenticator(None, "0.0.0.0").check({"host": "machine.example"}, public=False)
    behind_proxy = {"host": "machine.example", "authorization": f"Bearer {TOKEN}"}
    Authenticator(TOKEN, "127.0.0.1").check(behind_proxy, public=False)


def test_pages_of_other_sites_are_refused():
    for host in ("127.0.0.1", "0.0.0.0"):
        keeper = Authenticator(None, host)
        keeper.check({"host": "localhost:1", "origin": "http://localhost:1"}, public=False)
        for origin in ("http://evil.example", "null", "http://localhost:2", "http://["):
            headers = {"host": "localhost:1", "origin": origin}
            assert refusal(keeper, headers) == (403, "other_site")


def test_a_server_with_a_token_shows_its_page_alone():
    with live_server.Running(live_server.model(), live_server.ByHand(), token=TOKEN) as running:
        client = running.client
        for path in ("/", "/app.js", "/docs", "/openapi.json", "/healthz"):
            assert client.get(path).status_code == 200
        for method, path in (("GET", "/metrics"), ("POST", "/embed"), ("GET", "/pictures/0")):
            response = client.request(method, path)
            assert response.status_code == 401 and response.json()["error"] == "no_token"
            assert response.headers["www-authenticate"] == "Bearer"
        bearing = {"Authorization": f"Bearer {TOKEN}"}
        asked = {"json": {"texts": ["red"]}, "headers": bearing}
        assert client.post("/embed", **asked).status_code == 200
        document = client.get("/openapi.json").json()
        assert document["security"] == [{"token": []}]
        assert TOKEN not in str(document)
