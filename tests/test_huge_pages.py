"""A command that starts itself again with huge pages, and whom it leaves alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unified_mm.cli import huge_pages

COMMAND = ["python", "-X", "dev", "-m", "unified_mm.main", "--workdir=runs/first"]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What `execve` was called with, on a machine that has huge pages and no accelerator."""
    calls = []
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "PAGES", pages)
    monkeypatch.setattr(huge_pages, "ACCELERATORS", ())
    monkeypatch.setattr(huge_pages, "DEBUGGERS", ())
    monkeypatch.setattr(sys, "orig_argv", COMMAND)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    monkeypatch.setattr(os, "execve", lambda *given: calls.append(given))
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    return calls


def test_the_same_command_starts_with_the_variable(started, capsys):
    huge_pages.start_again("unified_mm.main")
    ((program, words, variables),) = started
    assert (program, words) == (sys.executable, [sys.executable, *COMMAND[1:]])
    assert variables == os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "huge pages" in line and "UNIFIED_MM_HUGE_PAGES=0" in line


@pytest.mark.parametrize(
    "words",
    [
        ["python", "-m", "pytest", "-m", "slow"],
        ["python", "-m", "pdb", "-m", "unified_mm.main"],
        ["python", "notebook.py"],
        ["python", "-m"],
        [*COMMAND, "--help"],
        [*COMMAND, "--coordinator=here:1", "--processes=2", "--process=0"],
        [*COMMAND, "--distributed"],
    ],
)
def test_other_processes_are_left_alone(started, monkeypatch, words):
    monkeypatch.setattr(sys, "orig_argv", words)
    huge_pages.start_again("unified_mm.main")
    assert not started


@pytest.mark.parametrize(
    "name, value", [("UNIFIED_MM_HUGE_PAGES", "0"), ("GLIBC_TUNABLES", "glibc.malloc.check=1")]
)
def test_who_decided_is_left_alone(started, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    huge_pages.start_again("unified_mm.main")
    assert not started


def test_another_decision_is_refused(started, monkeypatch):
    monkeypatch.setenv("UNIFIED_MM_HUGE_PAGES", "no")
    with pytest.raises(SystemExit, match="UNIFIED_MM_HUGE_PAGES=no: must be 0 or 1"):
        huge_pages.start_again("unified_mm.main")


def test_a_debugger_is_left_alone(started, monkeypatch):
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    huge_pages.start_again("unified_mm.main")
    assert not started


@pytest.mark.parametrize(
    "glibc, pages",
    [("2.34", "[madvise]"), ("2.36", "madvise [never]"), ("2.36", "[always] madvise never")],
)
def test_machines_without_huge_pages_or_with_them_unasked(started, monkeypatch, glibc, pages):
    monkeypatch.setattr(os, "confstr", lambda name: f"glibc {glibc}")
    huge_pages.PAGES.write_text(pages)
    huge_pages.start_again("unified_mm.main")
    assert not started


def test_machines_that_do_not_tell(started, monkeypatch):
    for unreadable in (huge_pages.PAGES.parent, huge_pages.PAGES / "absent"):
        monkeypatch.setattr(huge_pages, "PAGES", unreadable)
        huge_pages.start_again("unified_mm.main")
    assert not started


def test_an_accelerator_needs_none(started, monkeypatch):
    monkeypatch.setattr(huge_pages, "ACCELERATORS", ("/dev/null",))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    huge_pages.start_again("unified_mm.main")
    assert not started
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    huge_pages.start_again("unified_mm.main")
    assert len(started) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_process_and_exit_code_stay(tmp_path):
    (tmp_path / "toy.py").write_text(
        "import os, sys\n"
        "from unified_mm.cli import huge_pages\n"
        "huge_pages.help_here = lambda: True\n"
        "huge_pages.start_again('toy')\n"
        "print(os.getpid(), os.environ['GLIBC_TUNABLES'], 'jax' in sys.modules, *sys.argv[1:])\n"
        "sys.exit(7)\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != huge_pages.VARIABLE}
    path = os.pathsep.join([str(tmp_path), str(Path(huge_pages.__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, "-m", "toy", "a b"], env=kept | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, said = process.communicate(timeout=60)
    assert out == f"{process.pid} glibc.malloc.hugetlb=1 False a b\n", said
    assert process.returncode == 7
    assert len(said.splitlines()) == 1
