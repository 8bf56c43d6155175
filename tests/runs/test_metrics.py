"""Metrics files: each step once, whatever happened; and TensorBoard sees the same."""

import errno
import json
import math

import numpy as np
import pytest

from unified_mm.runs.metrics import MetricsWriter, read_metrics


def write_steps(path, steps, *, resume_step=None, offset=0.0):
    with MetricsWriter(path, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": step + offset, "time/steps_per_second": 3.0})


def test_lines_and_columns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(10, {"train/loss": np.float32(0.1)})
        writer.write(20, {"train/loss": math.nan, "score": 1})
        writer.write_text(20, "banner", "no data directory: a world was rendered")
    lines = path.read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 10, "train/loss": float(np.float32(0.1))},
        {"step": 20, "train/loss": None, "score": 1.0},
        {"step": 20, "banner": "no data directory: a world was rendered"},
    ]
    columns = read_metrics(path)
    assert set(columns) == {"train/loss", "score"}
    steps, values = columns["train/loss"]
    np.testing.assert_array_equal(steps, [10, 20])
    np.testing.assert_array_equal(values, [np.float32(0.1), np.nan])


def test_each_line_is_on_disk_when_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"loss": 2.0})
        assert json.loads(path.read_text()) == {"step": 1, "loss": 2.0}


def test_resume_drops_what_will_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    write_steps(path, range(5, 10), resume_step=4)
    never_killed = tmp_path / "other.jsonl"
    write_steps(never_killed, range(1, 10))
    assert path.read_bytes() == never_killed.read_bytes()


def test_a_run_that_starts_drops_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(0, 8))
    write_steps(path, [0, 1])
    assert read_metrics(path)["train/loss"][0].tolist() == [0, 1]


@pytest.mark.parametrize("kept_bytes", [1, 10, 30])
def test_a_torn_last_line_is_dropped(tmp_path, kept_bytes):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    last = path.read_text().splitlines(keepends=True)[-1]
    path.write_text(path.read_text() + last.replace('"step": 2', '"step": 3')[:kept_bytes])
    assert read_metrics(path)["train/loss"][0].tolist() == [1, 2]
    write_steps(path, [3], resume_step=2)
    assert read_metrics(path)["train/loss"][0].tolist() == [1, 2, 3]


def test_another_broken_line_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 3}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        MetricsWriter(path, resume_step=2)
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "line", ["[1]", "3", '{"step": "a"}', '{"step": true}', '{"step": 3, "x": [1]}']
)
def test_a_line_of_another_shape_is_an_error_that_names_it(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": null, "notice": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a line of metrics"):
        read_metrics(path)


def test_a_metric_named_step_is_refused(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="'step'"):
        writer.write(1, {"step": 2.0})


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    path, folder = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    killed = MetricsWriter(path, folder)  # never closed, as after a kill
    for step in (1, 2, 3, 4):
        killed.write(step, {"loss": float(step)})
    killed.write_text(1, "banner", "a world was rendered")
    with MetricsWriter(path, folder, resume_step=2) as writer:
        for step in (3, 4, 5):
            writer.write(step, {"loss": 10.0 * step})
    killed.close()

    assert scalars_of(folder, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_without_tensorboard_a_run_goes_on(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="goes on without TensorBoard's files .*FileExists"):
        writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    with writer:
        writer.write(1, {"loss": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl")["loss"][1].tolist() == [1.0]


def test_a_disk_that_is_full_for_tensorboard_alone_is_said_once(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, tmp_path / "tensorboard") as writer:
        writer.write(1, {"loss": 1.0})
        monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
        with pytest.warns(UserWarning, match="No space left") as told:
            for step in (2, 3):
                writer.write(step, {"loss": 1.0})
    assert len(told) == 1
    assert read_metrics(path)["loss"][0].tolist() == [1, 2, 3]
    assert scalars_of(tmp_path / "tensorboard", "loss") == [(1, 1.0)]


def scalars_of(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]
