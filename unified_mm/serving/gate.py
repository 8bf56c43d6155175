"""The gate around the routes: tokens, limits, deadlines, counts and headers of every request."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unified_mm.serving.limits import Limits, Refusal, answer, busy
from unified_mm.serving.metrics import Metrics
from unified_mm.serving.security import HEADERS, Authenticator

log = logging.getLogger(__name__)

# What can be looked at without a token, and what while the server drains too.
PUBLIC = frozenset("/ /app.js /style.css /icon.svg /docs /docs.js /openapi.json /healthz".split())
LIGHT = PUBLIC | {"/metrics"}
REST = 64 * 1024 * 1024  # bytes of a refused body that are read and thrown away
REST_SECONDS = 2.0  # that this may take
GRACE = 2.0  # seconds for the end of an answer


@dataclass
class Traffic:
    """The requests under way, and whether the server is stopping.

    Attributes:
      under_way: requests that are being answered, without those for the paths in `LIGHT`.
      draining: whether new requests are refused.
    """

    under_way: int = 0
    draining: bool = False


@dataclass(frozen=True)
class Gate:
    """An ASGI application around the routes that admits, limits and counts requests."""

    app: ASGIApp
    doorkeeper: Authenticator
    limits: Limits
    traffic: Traffic
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's own start and end
            return await self.app(scope, receive, send)
        path = scope["path"]
        exchange = Exchange(receive, send, self.limits, private=path not in PUBLIC)
        began = time.perf_counter()
        self.traffic.under_way += path not in LIGHT
        try:
            try:
                self._admit(scope, path)
                await exchange.run(self.app, scope)
            except Refusal as refusal:
                await exchange.refuse(refusal, scope)
            except Exception:  # the routes have answered 500 by now
                log.exception("a request failed: %s %s", scope["method"], path)
            except asyncio.CancelledError:
                if self.traffic.draining:
                    exchange.hurries = True
                    message = "the server stops and could not finish this"
                    await exchange.refuse(Refusal(503, "stopping", message), scope)
                raise
        finally:
            self.traffic.under_way -= path not in LIGHT
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - began
            self.metrics.answered(route, exchange.status, seconds)

    def _admit(self, scope: Scope, path: str) -> None:
        """Raises Refusal where path, headers or load forbid a request, before its body is read."""
        headers = Headers(scope=scope)
        self.doorkeeper.check(headers, public=path in PUBLIC)
        if path in LIGHT:
            return
        if self.traffic.draining:
            message = "the server is stopping and takes no new requests"
            raise Refusal(503, "draining", message, {"Retry-After": "5"})
        if self.traffic.under_way > self.limits.requests:
            raise busy(f"{self.limits.requests} requests are under way")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.upload_bytes:
            raise _too_large(self.limits)


class Exchange:
    """One request and its answer: the body is counted and timed, the answer gets our headers.

    Args:
      private: whether no cache may keep the answer.

    Attributes:
      status: the answer's HTTP status; 0 where the client disconnected before it.
      hurries: whether an error is sent without reading the rest of the body first.
    """

    def __init__(self, receive: Receive, send: Send, limits: Limits, *, private: bool) -> None:
        self.status = 0
        self.hurries = False
        self._receive, self._send = receive, send
        self._limits = limits
        self._private = private
        self._read = 0
        self._upload_ends = time.monotonic() + limits.upload_seconds
        self._whole = asyncio.Event()  # set once the whole body is here
        self._gone = asyncio.Event()  # set once the client has disconnected
        self._deadline: asyncio.Timeout | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Runs `app`; cancels it when it takes too long or the client disconnects.

        Raises:
          Refusal: 504 no answer in time.
        """
        task = asyncio.ensure_future(app(scope, self.receive, self.send))
        watch = asyncio.create_task(self._watch(task))
        try:
            async with asyncio.timeout(None) as self._deadline:
                await task
        except TimeoutError as error:
            seconds = self._limits.seconds
            message = f"no answer within {seconds:g} s; ask for less, or later"
            raise Refusal(504, "timeout", message) from error
        except asyncio.CancelledError:
            if not self._gone.is_set():
                raise
        finally:
            self._deadline = None
            watch.cancel()
            task.cancel()
            # The routes' own ends (cancelling a generation) come before ours.
            await asyncio.gather(task, watch, return_exceptions=True)

    async def receive(self) -> Message:
        """Returns the next part of the body.

        Raises:
          Refusal: 413 too large, 408 too slow.
        """
        if self._whole.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout(self._upload_ends - time.monotonic()):
                message = await self._receive()
        except TimeoutError as error:
            seconds = self._limits.upload_seconds
            why = f"the body was not here after {seconds:g} s"
            raise Refusal(408, "slow_upload", why, {"Connection": "close"}) from error
        if message["type"] == "http.disconnect":
            self._gone.set()
            return message
        self._read += len(message.get("body", b""))
        if self._read > self._limits.upload_bytes:
            raise _too_large(self._limits)
        if not message.get("more_body", False):
            self._whole.set()
            if not self.status:
                self._end_in(self._limits.seconds)
        return message

    async def send(self, message: Message) -> None:
        """Sends a part of the answer; adds our headers to its first.

        A stream keeps its own deadline (`Service.pieces`); this one is `GRACE` longer, and ends a
        stream that nobody reads.
        """
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if not (self._whole.is_set() or self.hurries or self.status in (200, 408)):
                await self._throw_away()
            self._end_in(self._limits.seconds + GRACE)
            kept = "no-store" if self._private else "no-cache"
            MutableHeaders(scope=message).update({**HEADERS, "cache-control": kept})
        await self._send(message)

    async def refuse(self, refusal: Refusal, scope: Scope) -> None:
        """Answers with the refusal, unless an answer has begun or the client has gone."""
        if self.status or self._gone.is_set():
            return
        await answer(refusal)(scope, self.receive, self.send)

    def _end_in(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + seconds)

    async def _throw_away(self) -> None:
        """Reads some of what is still sent: a client that is cut off sees no answer."""
        left = REST
        try:
            async with asyncio.timeout(REST_SECONDS):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    async def _watch(self, task: asyncio.Future) -> None:
        """Cancels the work when the client disconnects."""
        await self._whole.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        task.cancel()


def _too_large(limits: Limits) -> Refusal:
    message = f"the body is over the limit of {limits.upload_bytes} bytes; send less at a time"
    return Refusal(413, "upload_too_large", message, {"Connection": "close"})
