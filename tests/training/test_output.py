"""One process writes; the calls of the others leave nothing behind."""

import numpy as np
import pytest
import tiny

from unified_mm.runs.folder import RunFolder, RunFolderError
from unified_mm.runs.metrics import read_metrics
from unified_mm.training import output
from unified_mm.training.output import Output, output_of


def other(folder):
    """The output of a process that is not the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "is_first", lambda: False)
        return output_of(RunFolder(folder / "run"), print)


def use(out):
    with out.lock(), out.metrics(False, None) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.write_new(1, {"score": 2.0})
        metrics.write_new(1, {"score": 3.0})
        metrics.write_text(1, "notice", "text")
        with out.progress(0, 4) as progress:
            with progress.paused():
                pass
            progress.update(2, {"loss": 1.0}, 8, 0.0, 1.0)
    out.write((out.folder.path / "written").touch)
    out.say("a line")


def test_the_first_process_writes(tmp_path, capsys):
    said = []
    out = output_of(RunFolder(tmp_path / "run"), said.append)
    out.begin({"seed": 0}, tiny.tokenizer())
    use(out)
    names = {path.name for path in out.folder.path.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "metrics.jsonl", "written"}
    assert said == ["a line"] and "step 2/4" in capsys.readouterr().out
    np.testing.assert_array_equal(read_metrics(out.folder.metrics)["score"], ([1], [2.0]))


def test_the_others_write_nothing_and_say_nothing(tmp_path, capsys):
    use(other(tmp_path))
    assert not list(tmp_path.iterdir()) and not any(capsys.readouterr())


def test_a_folder_that_the_others_do_not_see_is_refused(tmp_path):
    out = other(tmp_path)
    with pytest.raises(RunFolderError, match="must be on a disk that all processes share"):
        out.begin({"seed": 0}, tiny.tokenizer())


def test_a_run_that_the_first_process_cannot_lock_is_held_by_none(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "first_decides", lambda value: False)
    with pytest.raises(RunFolderError, match="process 0 cannot use the run"):
        with other(tmp_path).lock():
            pass
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="is a file, not a folder"):
        with Output(RunFolder(tmp_path / "file"), print).lock():
            pass
