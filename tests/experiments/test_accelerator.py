"""The minutes on an accelerator: shares, what is skipped, going on, and a rehearsal on a CPU."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement

from experiments.accelerator import __main__ as command
from experiments.accelerator import carried, checks, world
from experiments.accelerator.scale import FULL, largest_batch
from experiments.accelerator.schedule import SKIPPED, Part, Results, measure_rows, run_parts
from experiments.accelerator.trainer import utilisation
from unified_mm.nn.attention import chunked
from unified_mm.nn.attention.rules import RULES

ROOT = Path(__file__).parents[2]
# A part that is no accelerator's: what it does to its results, to itself and to the time.
FAKE = """
import pathlib, subprocess, sys, time
from experiments.accelerator.schedule import Results
name, file, seconds = sys.argv[1:]
results = Results(pathlib.Path(file))
if name == "quick":
    results.put(name, "row", {"seconds": float(seconds)})
if name == "hangs":
    results.put(name, "first", {"value": 1})
    child = subprocess.Popen(["sleep", "600"])
    results.put(name, "child", {"pid": child.pid})
    time.sleep(600)
if name == "breaks":
    sys.exit(7)
if name == "fails":
    results.put(name, "row", {"failed": "Traceback"})
if name == "stops":
    sys.exit(3)
"""


@pytest.fixture
def fake(tmp_path):
    """Runs fake parts, and returns whether all are done, how each ended, and what was said."""
    file = tmp_path / "out" / "accelerator.json"

    def run(parts, seconds):
        said = []
        results = Results(file)

        def command(part, share):
            return [sys.executable, "-c", FAKE, part.name, str(file), str(share)]

        done = run_parts(parts, results, seconds, command, said.append)
        return done, {part.name: results.part(part.name) for part in parts}, said

    return run


def test_parts_share_the_time_and_one_that_ends_badly_ends_alone(fake):
    names = ("quick", "breaks", "fails", "stops", "hangs", "after")
    parts = [Part(name, 20 if name == "after" else 1, "") for name in names]
    began = time.monotonic()
    done, found, said = fake(parts, 60)
    assert not done
    assert {name: part["state"] for name, part in found.items()} == {
        "quick": "done",
        "breaks": "failed with exit code 7",
        "fails": "failed",
        "stops": "skipped in part",
        "hangs": "cut",
        "after": "done",
    }
    # A part of 25 gets its share of the minute, and half as much again before it is cut.
    assert found["quick"]["rows"]["row"]["seconds"] == pytest.approx(60 / 25, rel=0.01)
    assert time.monotonic() - began < 30
    assert found["hangs"]["rows"]["first"] == {"value": 1}
    child = found["hangs"]["rows"]["child"]["pid"]
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert "fails: failed: row" in said


def test_what_is_done_is_not_done_again_and_no_time_is_said_aloud(fake):
    parts = [Part("quick", 1, ""), Part("stops", 1, "")]
    assert not fake(parts, 30)[0]
    done, found, said = fake(parts, 1)
    assert not done and found["stops"]["state"] == "skipped"
    assert said[0] == "quick: done before"
    assert said[1] == "stops: skipped, the time is spent; the same command goes on with it"


def test_rows_are_kept_as_they_come_and_a_second_call_measures_the_others(tmp_path):
    results = Results(tmp_path / "found.json")
    measured, said = [], []

    def row(name, wrong=False):
        def measure():
            measured.append(name)
            if wrong:
                raise ArithmeticError("not today")
            # What came before is on disk by then.
            return {"before": sorted(Results(tmp_path / "found.json").rows("part"))}

        return measure

    rows = {"one": row("one"), "two": row("two", wrong=True), "three": row("three")}
    rows["nan"] = lambda: {"speed": float("nan")}
    assert measure_rows("part", rows, results, 60, said.append) == 0
    kept = json.loads((tmp_path / "found.json").read_text())["parts"]["part"]["rows"]
    assert kept["three"]["before"] == ["one"]
    assert "ArithmeticError: not today" in kept["two"]["failed"]
    assert "not JSON compliant" in kept["nan"]["failed"]
    assert list(results.rows("part")) == ["one", "three"]
    rows |= {"two": row("two"), "nan": lambda: {"speed": 1.0}}
    assert measure_rows("part", rows, results, 60, said.append) == 0
    assert measured == ["one", "two", "three", "two"]
    more = {**rows, "four": row("four"), "five": row("five")}
    assert measure_rows("part", more, results, -1, said.append) == SKIPPED
    assert said[-1] == "part: its share is spent; skipped: four, five"
    assert measured == ["one", "two", "three", "two"]


def test_parts_share_memory_and_programs_and_only_what_is_found_is_in_out(tmp_path, monkeypatch):
    given = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    for variables, share in (({}, {"XLA_CLIENT_MEM_FRACTION": "0.92"}), (given, given)):
        environment = dict(variables)
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr(command.signal, "signal", lambda *_: None)
        monkeypatch.setattr(command, "run_parts", lambda *_: True)
        assert command.main([f"--out={tmp_path / 'out'}"]) == 0
        programs = f"{tmp_path / 'out-work' / 'programs'}"
        assert environment == {**share, "JAX_COMPILATION_CACHE_DIR": programs}


def test_the_largest_batch_is_what_memory_leaves_beside_the_state():
    step = {"held_bytes": 1000 + 64 * 10, "state_bytes": 1000, "batch": 64}
    assert largest_batch(step, 1000 + 10 * 150, FULL) == 128
    assert largest_batch(step, 10**9, FULL) == FULL.most_batch
    with pytest.raises(ValueError, match="hold no batch of 32: the state takes 1,000"):
        largest_batch(step, 1300, FULL)


def test_utilisation_says_of_which_peak_and_goes_without_one():
    known = {"dense_specification_flops": 400e12, "measured_flops": 250e12}
    assert utilisation(100e12, known) == {
        "tera_flops_per_second": 100.0,
        "mfu_of_dense_specification": 0.25,
        "mfu_of_measured_peak": 0.4,
    }
    assert utilisation(100e12, {"measured_flops": 250e12})["mfu_of_dense_specification"] is None


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr(checks, "HEADS", checks.HEADS[:1])
    right = checks.parity("prefix", (6, 4))
    assert right["backend"] == "chunked" and 0 < right["further"] < checks.FURTHER
    plain = chunked.attend
    monkeypatch.setattr(chunked, "attend", lambda *given: plain(*given) * jnp.bfloat16(1.1))
    with pytest.raises(ValueError, match="rule prefix: chunked is"):
        checks.parity("prefix", (6, 4))
    monkeypatch.setattr(chunked, "attend", lambda *given: plain(*given) * jnp.nan)
    with pytest.raises(ValueError, match="rule prefix: chunked is nan times as far"):
        checks.parity("prefix", (6, 4))


def test_what_options_gain_is_held_to_the_targets():
    def row(speed, latency, size, score):
        return {
            "cider_d": score,
            "batch 1": {"p50_ms": latency},
            "batch 8": {"tokens_per_second": speed, "peak_bytes": size},
        }

    rows = {"baseline": row(10, 100, 80, 0.5), "all": row(33, 20, 20, 0.492)}
    assert world.beside(rows, 8)["reached_all"]
    rows["all"] = row(32, 20, 20, 0.492)
    found = world.beside(rows, 8)
    assert not found["reached_all"] and not found["reached"]["throughput"]
    assert found["throughput"] == 3.2 and found["points_lost"] == pytest.approx(0.8)


def test_what_nobody_brings_is_named(tmp_path):
    for name, needs in {
        "one": ["Two-Parts>=1", "numpy"],
        "two_parts": ["three; extra == 'x'"],
    }.items():
        lines = [f"Requires-Dist: {need}" for need in needs]
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *lines])
        (folder / "METADATA").write_text(text)
    assert carried.missing(tmp_path) == []
    more = tmp_path / "one-1.0.dist-info" / "METADATA"
    more.write_text(more.read_text() + "\nRequires-Dist: four")
    assert carried.missing(tmp_path) == ["four"]


HIDING = """
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset({hidden!r})


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def absent_there():
    """The modules of all packages here that such a machine lacks, and that are not carried."""
    known, left = set(), [(name, "") for name in (*carried.THERE, *carried.CARRIED)]
    while left:
        name, extra = left.pop()
        if (carried.canonical(name), extra) in known:
            continue
        known.add((carried.canonical(name), extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, lines):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                left += [(need.name, each) for each in ("", *need.extras)]
    have = {name for name, _ in known} | {"unified-mm"}
    modules = metadata.packages_distributions().items()
    return sorted(
        module
        for module, brought in modules
        if not any(carried.canonical(each) in have for each in brought)
    )


@pytest.mark.parity  # its turns are taken with torch
def test_a_rehearsal_without_what_the_machine_lacks(tmp_path):
    hidden = absent_there()
    assert {"tensorflow_datasets", "tensorboardX", "fastapi"} <= set(hidden)
    assert not {"jax", "flax", "torch", "grain", "ml_collections", "numpy"} & set(hidden)
    (tmp_path / "sitecustomize.py").write_text(HIDING.format(hidden=hidden))
    one_device = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XLA_FLAGS": one_device,
    }
    out = tmp_path / "out"
    command = [sys.executable, "-m", "experiments.accelerator", "--shrunk", f"--out={out}"]
    done = subprocess.run(
        [*command, "--minutes=30"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    found = Results(out / "accelerator.json")
    rows = {
        name: found.rows(name)
        for name in ("machine", "large", "turns", "checks", "decoding", "ladder", "loader", "world")
    }
    large = rows["large"]["train"]
    assert large["samples_per_second"] > 0 and large["mfu_of_dense_specification"] is None
    assert rows["turns"]["turns"]["times_torch"] > 0
    ours, torch = (rows["turns"]["turns"]["first_losses"][name][0] for name in ("ours", "torch"))
    assert ours == pytest.approx(torch, rel=0.3)  # both know nothing yet
    assert len(rows["ladder"]) == 6 and len(rows["decoding"]) == 4
    assert rows["checks"].keys() == {*(f"rule {rule}" for rule in RULES), "donation", "offload"}
    assert rows["world"]["training"]["steps"] == 4
    assert "throughput" in rows["world"]["all beside baseline"]
    again = subprocess.run(
        [*command, "--minutes=1"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(rows)
