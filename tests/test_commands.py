"""What the commands share: errors of a full disk, and where results may be written."""

import errno
import logging
import os
import subprocess
import sys

import pytest

from unified_mm import import_weights, main, quantize
from unified_mm.cli.messages import disk_full, disk_is_full, is_news, new_file
from unified_mm.runs.folder import RunFolder
from unified_mm.runs.seal import write_seal


def behind(error, reason):
    try:
        try:
            raise reason
        except type(reason):
            raise error  # noqa: B904
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    "reason", [OSError(errno.ENOSPC, "full"), ValueError("array: No space left on device [28]")]
)
def test_a_full_disk_is_seen_behind_other_errors(reason):
    error = behind(RuntimeError("cannot save"), reason)
    assert disk_is_full(reason) and disk_is_full(error)
    assert not disk_is_full(behind(RuntimeError("cannot save"), OSError(errno.EACCES, "no")))
    told = logging.LogRecord("x", logging.ERROR, "", 0, "", (), (type(error), error, None))
    assert not is_news(told)
    assert is_news(logging.LogRecord("x", logging.ERROR, "", 0, "", (), None))


def test_the_last_whole_checkpoint_is_named(tmp_path):
    run = RunFolder(tmp_path)
    assert "no checkpoint is whole" in disk_full(run)
    for name in ("2", "10", "12", "14.orbax-checkpoint-tmp"):
        (run.checkpoints / name).mkdir(parents=True)
        if name != "12":
            write_seal(run.checkpoints / name)
    assert "the last whole checkpoint is step 10." in disk_full(run)


def test_a_new_file_needs_a_folder_and_a_free_name(tmp_path, monkeypatch):
    assert new_file("") is None
    assert new_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, message in (
        ("dangling", "is not overwritten"),
        ("none/new.json", "there is no folder"),
        ("x" * 300 + "/new.json", "there is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            new_file(str(tmp_path / name))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        new_file(str(tmp_path / "new.json"))


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (main, ("--config=configs/coco.py:tiny", "--workdir")),
        (import_weights, ("--from=nowhere", "--out")),
        (quantize, ("--run=nowhere", "--out")),
    ],
)
def test_a_name_that_loses_weights_is_refused_first(tmp_path, capsys, command, flags):
    out = tmp_path / "runs [new]"
    *others, last = flags
    with pytest.raises(SystemExit) as stopped:
        command.main([*others, f"{last}={out}"])
    assert stopped.value.code == 1 and not out.exists()
    said = capsys.readouterr()
    assert "its path has '['" in said.err and not said.out


def test_a_reader_that_has_read_enough_ends_a_command_quietly():
    """As in `python -m unified_mm.COMMAND | head -1`."""
    lines = "from unified_mm.cli.messages import say\nfor i in range(100_000): say(f'line {i}')"
    command = [sys.executable, "-c", lines]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"line 0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
