"""Ctrl-C, as a terminal sends it, where Python itself would not hear it for long."""

import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from unified_mm.cli.interrupts import SAVING, _holds, _waits_in_vain
from unified_mm.files import without_interrupts

# A lock that is taken twice: no signal ends the wait, as none ends a compilation.
STUCK = """
import ctypes
from unified_mm.cli.messages import end_with

def work():
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    print("stuck", flush=True)
    libc.pthread_mutex_lock(lock)

end_with(work, interrupted="left")
"""
# As in a terminal: a test runner may have its children ignore Ctrl-C.
HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
# Answered at once, and then an end of the interpreter that takes long.
SLOW_END = """
import time
from unified_mm.cli.messages import end_with

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(60)

def work():
    work.late = Late()
    print("works", flush=True)
    time.sleep(60)

end_with(work, interrupted="left")
"""
# What was learned is saved first, which takes long.
SAVES = """
import time
from unified_mm.cli.messages import end_with

class Saves:
    def __call__(self, number, frame):
        pass

    def holds(self):
        return True

def work():
    import signal
    signal.signal(signal.SIGINT, Saves())
    print("saves", flush=True)
    while True:
        time.sleep(60)

end_with(work, interrupted="left")
"""
IMPORTING = """
import sys
sys.argv = ["-m"]  # as `python -m` has it while it looks for the module
import unified_mm
print("imports", flush=True)
import time
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("program", "told"), [(STUCK, "left\n"), (SLOW_END, "left\n"), (IMPORTING, "interrupted\n")]
)
def test_a_command_is_left_within_seconds(program, told):
    with subprocess.Popen(
        [sys.executable, "-c", HEARD + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == told
    assert time.monotonic() - began < 10  # it takes 1.6 s on a machine that is free


def test_what_is_saved_first_is_said_and_a_second_time_ends_it():
    with subprocess.Popen(
        [sys.executable, "-c", HEARD + SAVES],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == f"{SAVING}\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "left\n"


class Holding:
    def __init__(self, holds):
        self.holds = lambda: holds

    def __call__(self, number, frame):
        pass


def handled(number, frame):
    pass


@pytest.mark.parametrize(
    ("handler", "holds"),
    [
        (signal.default_int_handler, False),
        (Holding(False), False),
        (Holding(True), True),
        (handled, True),
    ],
)
def test_what_is_still_to_be_saved_is_waited_for(handler, holds):
    assert _holds(handler) == holds


def test_a_handler_that_has_ended_its_work_leaves_the_end_to_the_command(monkeypatch):
    """As where a stopped run is saved, and a server has answered all."""
    before = signal.signal(signal.SIGINT, handled)
    try:
        ending = threading.Timer(0.1, lambda: replaced.append(True))
        replaced = []
        monkeypatch.setattr(
            signal, "getsignal", lambda _: signal.default_int_handler if replaced else handled
        )
        ending.start()
        reader, writer = socket.socketpair()
        with reader, writer:
            assert not _waits_in_vain(reader)
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_that_are_started_do_not_hear_it():
    before = signal.getsignal(signal.SIGINT)
    with without_interrupts():
        said = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
        run = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True)
    assert run.stdout == "True\n" and signal.getsignal(signal.SIGINT) == before
