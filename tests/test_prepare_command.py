"""The command that writes datasets, as a user types it."""

import subprocess
import sys

import pytest
import tiny


def run(*arguments, cwd, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "unified_mm.prepare", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )


@pytest.fixture
def typed(request, tmp_path, monkeypatch):
    root = request.config.rootpath
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))

    def typed(*arguments):
        return run(f"--config={root / 'configs' / 'coco.py'}", *arguments, cwd=tmp_path)

    return typed


@pytest.mark.slow
def test_a_folder_is_written_told_of_and_left_alone(typed, tmp_path):
    folder = tiny.write_coco(tmp_path / "coco", train=6, val=3)
    command = (f"--config.data.dir={folder}", f"--out={tmp_path / 'dataset'}")
    done = typed(*command)
    assert done.returncode == 0, done.stderr
    assert "coco train: 6 images and 12 texts" in done.stdout
    assert f"--config.data.source=tfds --config.data.dir={tmp_path / 'dataset'}" in done.stdout
    again = typed(*command)
    assert again.returncode == 0 and "is prepared already" in again.stdout
    other = typed(*command, "--resize=8", "--quality=80")
    assert other.returncode == 1 and "exists and is not overwritten" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: --out"),
        (("--out=gs://bucket/x",), "write to this machine"),
        (("--out=x", "--quality=80"), "--quality is read with --resize alone"),
        (("--out=x", "--config.train.steps=3"), "train.steps cannot be set here"),
        (("--out=x", "--config.data.dir=nowhere"), "nowhere does not exist: set data.dir"),
        (("--out=x", "--resize=-1"), "resize"),
    ],
)
def test_wrong_commands_are_one_line(typed, tmp_path, arguments, message):
    done = typed(*arguments)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_is_told(typed, tmp_path):
    folder = tiny.write_coco(tmp_path / "coco", train=6, val=3)
    out = tmp_path / "dataset"
    work = tmp_path / ".dataset.preparing"
    work.mkdir()
    (work / ".coco-val.array_record-00000-of-00001.tmp").symlink_to("/dev/full")
    done = typed(f"--config.data.dir={folder}", f"--out={out}")
    assert done.returncode == 1
    assert f"no space left on device for {out}; 1 of 2 shards are whole in {work}" in done.stderr
