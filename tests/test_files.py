"""Files and folders: what is written is whole, what is wrong is named, and one holder at a time."""

import gc
import os
import shutil
import subprocess
import sys

import pytest

from unified_mm import files
from unified_mm.files import FolderHeld, hold, naming, read_json, uncollected, write_json


def names_in(folder):
    return sorted(os.listdir(folder))


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})

    def no_space(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1} and names_in(tmp_path) == ["value.json"]


def test_write_refuses_what_json_cannot_hold(tmp_path):
    for value in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError), match=r"value\.json"):
            write_json(tmp_path / "value.json", value)
    assert names_in(tmp_path) == []


def test_read_errors_name_file_and_place(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(ValueError, match=r"broken\.json: not JSON at line 2, column 7"):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"broken\.json: not UTF-8 at byte 7"):
        read_json(path)


def test_names_that_are_no_utf_8_can_be_written(tmp_path):
    value = {"folder": os.fsdecode(b"d\xff")}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_a_folder_that_cannot_be_held_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out=x: .*file"), naming("--out=x"):
        with hold(tmp_path / "file" / "below"):
            pass


HOLDER = """
import pathlib, sys, time
from unified_mm.files import hold
with hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_holder_is_named_and_a_kill_frees_the_folder(tmp_path):
    folder = tmp_path / "made" / "here"
    arguments = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderHeld, match=f"process {holder.pid} is at work on"), hold(folder):
            pass
        holder.kill()
    with hold(folder):
        assert (folder / ".lock").read_text() == str(os.getpid())


def test_a_held_folder_in_which_nothing_was_made_is_left_as_it_was(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path / "made" / "here"):
        raise KeyError
    assert names_in(tmp_path) == []
    with hold(tmp_path):  # it was there
        assert names_in(tmp_path) == [".lock"]
    assert names_in(tmp_path) == []
    with hold(tmp_path / "made"):
        (tmp_path / "made" / "kept").touch()
    assert names_in(tmp_path / "made") == [".lock", "kept"]


def test_a_lock_that_was_removed_before_it_was_taken_is_opened_anew(tmp_path, monkeypatch):
    taken, take, folder = [], files._take, tmp_path / "made"

    def late(file):
        if not taken:
            shutil.rmtree(folder)  # its holder has just left
        taken.append(file)
        return take(file)

    monkeypatch.setattr(files, "_take", late)
    with hold(folder):
        assert len(taken) == 2 and (folder / ".lock").read_text() == str(os.getpid())


def test_garbage_is_looked_for_again_where_it_was_before():
    assert gc.isenabled()
    with pytest.raises(KeyError), uncollected():
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
