"""How a process is told where the others are; with one process all agreement is immediate."""

import threading

import pytest

from unified_mm.cli.flags import CLUSTER, cluster_of, parse
from unified_mm.parallel import processes
from unified_mm.parallel.processes import Cluster


def parsed(*arguments):
    return cluster_of(parse("main", "", arguments, takes=CLUSTER))


def test_without_flags_a_process_is_alone():
    assert parsed() is None


def test_flags_name_the_place():
    assert parsed("--coordinator=10.0.0.1:8476", "--processes=4", "--process=0") == Cluster(
        "10.0.0.1:8476", 4, 0, "", 300, 100
    )
    assert parsed("--distributed=auto", "--heartbeat_timeout=20") == Cluster(
        method="auto", heartbeat_timeout=20
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--processes=2",), "several processes need --coordinator, --process too"),
        (("--start_timeout=9",), "need --coordinator, --processes, --process too"),
        (("--distributed=auto", "--process=1"), "--distributed=auto finds out by itself what"),
        (("--coordinator=a:1", "--processes=2", "--process=2"), "--process=2: with --processes=2"),
        (("--coordinator=a:1", "--processes=0", "--process=0"), "--processes=0: must be at least"),
        (("--coordinator=a", "--processes=2", "--process=0"), "'a' is no host:port"),
        (("--coordinator=a:x", "--processes=2", "--process=0"), "'a:x' is no host:port"),
        (("--distributed=auto", "--start_timeout=0"), "--start_timeout=0: must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parsed(*arguments)


def test_one_process_waits_for_nobody():
    with processes.first_before_others("data"):
        processes.wait_for_all("here")
    processes.refuse_unequal("the config", "text")
    assert processes.is_first()
    assert processes.first_decides(True) and not processes.first_decides(False)


def test_one_process_ends_as_its_work_does():
    assert processes.together(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        processes.together(lambda: 1 // 0)


def test_a_call_that_hangs_is_given_up_with_a_message(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(processes.os, "_exit", lambda code: ended.set())
    with processes._giving_up_after(0.01, "error: nobody came"):
        assert ended.wait(10)
    assert capfd.readouterr().err == "error: nobody came\n"
