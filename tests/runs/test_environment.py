"""What a result says of where it was taken: no run ends for it."""

import shutil
import time
from importlib import metadata

import pytest

from unified_mm.runs import environment


def fake_git(folder, script, monkeypatch):
    git = folder / "git"
    git.write_text(script)
    git.chmod(0o755)
    # Alone, for a shell's search goes on after a file that is no program.
    (folder / "sleep").symlink_to(shutil.which("sleep"))
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("script", "reason"), [("#!/bin/sh\nsleep 60\n", "timed out"), ("no program", "OSError")]
)
def test_a_git_that_does_not_answer_is_warned_of(tmp_path, monkeypatch, script, reason):
    fake_git(tmp_path, script, monkeypatch)
    monkeypatch.setattr(environment, "_GIT_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.warns(UserWarning, match=f"goes on without the git revision .*{reason}"):
        assert environment.revision() == ""
    assert time.monotonic() - began < 10


def test_without_git_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.revision() == ""


def test_a_package_without_metadata_is_warned_of(monkeypatch):
    def version(name):
        if name == "pillow":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.warns(UserWarning, match="goes on without the version of pillow"):
        found = environment.versions()
    assert found["pillow"] == "" and found["jax"] == "1"
