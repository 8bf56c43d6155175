"""Ctrl-C is answered in two seconds, also where Python waits for what cannot be interrupted."""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 128 + signal.SIGINT
SAVING = "interrupted: it is saved or cleared away first; Ctrl-C again ends it without"
_PATIENCE = 1.0  # seconds for the main thread to end by itself
_POLL = 0.05
_CLEANUP = 0.3  # seconds for worker processes to end


class Interrupts:
    """What is said, once, where Ctrl-C ends a command.

    Args:
      text: the line.

    Attributes:
      heard: whether Ctrl-C came, whoever answered it.
    """

    def __init__(self, text: str) -> None:
        self.heard = False
        self._text = text
        self._lock = threading.Lock()

    @property
    def said(self) -> bool:
        """Whether the line was printed."""
        return not self._text

    def say(self) -> None:
        """Prints the line, if it was not."""
        with self._lock:
            if self._text:
                print(self._text, file=sys.stderr, flush=True)
            self._text = ""


@contextmanager
def leaving_on_interrupt(text: str) -> Iterator[Interrupts]:
    """Ends the process after Ctrl-C in its body, where the main thread does not do so itself.

    Python raises KeyboardInterrupt once it is back from compiled code: a compiler may keep it for
    minutes. Nothing is lost by leaving then. Where a handler of its own has taken SIGINT's place,
    that handler decides: one with a method `holds` by what this returns (whether there is still
    something to save; that this is waited for is said, and a second Ctrl-C ends it), any other by
    itself. Where that handler goes before this leaves, its owner is done, and the command ends in
    its own way.

    Args:
      text: what is said.
    """
    ours = threading.current_thread() is threading.main_thread()
    interrupts = Interrupts(text)
    if not ours or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield interrupts
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    waking = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(interrupts, reader), daemon=True).start()
    try:
        yield interrupts
    finally:
        signal.set_wakeup_fd(waking)
        if not interrupts.said:  # else the interpreter may still wait for threads at its end
            signal.signal(signal.SIGINT, before)
            writer.close()  # which ends the thread


def _watch(interrupts: Interrupts, reader: socket.socket) -> None:
    with reader:
        while _hears(reader, None):
            interrupts.heard = True
            if _waits_in_vain(reader):
                interrupts.say()
                leave(EXIT_CODE)


def _hears(reader: socket.socket, seconds: float | None) -> bool:
    """Waits for Ctrl-C, and returns whether it came; None waits until the command ends."""
    while select.select([reader], [], [], seconds)[0]:
        if not (got := reader.recv(1)):  # the command has ended
            time.sleep(seconds or 0)
            return False
        if got[0] == signal.SIGINT:
            return True
    return False


def _waits_in_vain(reader: socket.socket) -> bool:
    """Waits after Ctrl-C; returns whether the main thread has not answered, and nothing is lost.

    A second Ctrl-C takes what is lost for nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    until = time.monotonic() + _PATIENCE
    told = False
    while (patient := time.monotonic() < until) or _holds(handler):
        again = _hears(reader, _POLL)
        if signal.getsignal(signal.SIGINT) is not handler:
            return False
        if _saves(handler) and not patient and not told:
            print(SAVING, file=sys.stderr, flush=True)
            told = True
        if again and _saves(handler):
            return True
    return True


def _holds(handler: Any) -> bool:
    """Returns whether a handler of SIGINT keeps the process from being left."""
    if handler is signal.default_int_handler:
        return False
    return not _saves(handler) or bool(handler.holds())


def _saves(handler: Any) -> bool:
    """Returns whether a handler of SIGINT says what is still to be saved."""
    return hasattr(handler, "holds")


def leave_at_end(code: int) -> None:
    """Ends the process at once when the interpreter begins to end.

    Taking an interpreter down takes seconds where much was compiled, and a thread that is still
    compiling may crash in it. In a session in which someone types, it is not the end.
    """
    if hasattr(sys, "ps1"):
        return
    # What is registered last is called first; then no thread can be started any more.
    atexit.register(leave, code, _cleaner())


def leave(code: int, clean: Callable[[], None] | None = None) -> None:
    """Ends the process at once, with its worker processes and what they share.

    Args:
      code: its exit code.
      clean: of `_cleaner`, where the interpreter may have begun to end.
    """
    (clean or _cleaner())()
    sys.stdout.flush()
    os._exit(code)


def _cleaner() -> Callable[[], None]:
    """Starts a thread that ends worker processes when what this returns is called.

    That call waits for it, but not for long.
    """
    asked = threading.Event()

    def work() -> None:
        asked.wait()
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def clean() -> None:
        asked.set()
        thread.join(_CLEANUP)

    return clean
