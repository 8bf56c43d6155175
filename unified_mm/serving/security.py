"""Access control: tokens, hosts, and the headers that restrict what a browser does with answers."""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from unified_mm.serving.limits import Refusal

VARIABLE = "UNIFIED_MM_TOKEN"
SHORTEST = 16  # characters of a token

# No script, style or picture from elsewhere, nothing inline, in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach what listens at an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: str, environment: Mapping[str, str]) -> str | None:
    """Returns the token of a file or of the variable `UNIFIED_MM_TOKEN`; None without either.

    Args:
      path: the file; '' for none.

    Raises:
      ValueError: the file is missing, or the token is too short, not plain ASCII, or given twice.
    """
    given = environment.get(VARIABLE)
    if path and given is not None:
        raise ValueError(f"--token_file and {VARIABLE} both give a token: use one of them")
    where = f"--token_file={path}" if path else VARIABLE
    if path:
        if not os.path.isfile(path):
            raise ValueError(f"{where}: there is no such file")
        with open(path, encoding="utf-8", errors="replace") as file:
            given = file.read()
    if given is None:
        return None
    token = given.strip()
    if len(token) < SHORTEST or not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(
            f"{where}: a token is one word of at least {SHORTEST} ASCII characters; make one with "
            "`python -c 'import secrets; print(secrets.token_urlsafe())'`"
        )
    return token


def check_binding(host: str, token: str | None, anyone: bool) -> None:
    """Raises ValueError where others could reach a server that asks for no token."""
    if not (token or anyone or is_loopback(host)):
        raise ValueError(
            f"--host={host} can be reached by others and no token is set: give --token_file (or "
            f"{VARIABLE}), or --allow_anyone if that is meant"
        )


class Authenticator:
    """The check of a request's headers before its body is read.

    Args:
      token: the bearer token that requests must carry; None for none.
      host: the address that the server listens at. Without a token, a request on loopback must name
        it in its Host header: a page of another site whose name was made to point here (DNS
        rebinding) does not.
    """

    def __init__(self, token: str | None, host: str) -> None:
        self._token = None if token is None else token.encode()
        self._names = {"localhost", "127.0.0.1", "::1", host.strip("[]")}
        self._loopback = is_loopback(host)

    def check(self, headers: Mapping[str, str], *, public: bool) -> None:
        """Checks the headers of a request.

        Args:
          headers: the request's, with names in lower case.
          public: whether the path is open to those without a token.

        Raises:
          Refusal: 401 no token or a wrong one, 403 a page of another site asks.
        """
        if self._token is not None:
            if not public:
                self._check_token(headers.get("authorization", ""))
            return
        host = headers.get("host", "")
        if self._loopback and _name(host) not in self._names:
            message = f"this server is called 127.0.0.1 or localhost, not {host!r:.100}"
            raise Refusal(403, "wrong_host", message)
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            raise Refusal(403, "other_site", "pages of other sites may not ask this server")

    def _check_token(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        asked = {"WWW-Authenticate": "Bearer"}
        if scheme.lower() != "bearer" or not given:
            message = "this server asks for a token: send 'Authorization: Bearer TOKEN'"
            raise Refusal(401, "no_token", message, asked)
        assert self._token is not None
        if not hmac.compare_digest(given.strip().encode("latin-1"), self._token):
            raise Refusal(401, "wrong_token", "the token is not this server's", asked)


def _name(host: str) -> str:
    """Returns the name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _place(origin: str) -> str:
    """Returns the host and port of an Origin header."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
