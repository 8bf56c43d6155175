"""The loader on the machine's cores, and a run of `base` on the world: trained, scored, asked."""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from experiments.accelerator.scale import Scale, Setting, config_of
from experiments.accelerator.schedule import Row, Rows
from unified_mm.benchmarks.generation import Way, caption_quality, costs, ways
from unified_mm.benchmarks.training import loader_alone
from unified_mm.data.records import Record
from unified_mm.data.sources import open_source
from unified_mm.evaluation.splits import open_split
from unified_mm.files import read_json
from unified_mm.inference.loaded import LoadedModel, load
from unified_mm.runs.environment import cpu_count
from unified_mm.runs.folder import RunFolder
from unified_mm.training.setup import prepare
from unified_mm.world.build import ensure_world
from unified_mm.world.scenes import WorldSpec

LOADED = 20  # batches that the loader reads
# Of `bench --inference`: plain, then each option that is worth it, then all of them.
ASKED = ("baseline", "all", "cache", "+ int8 weights", "bfloat16")
# What all options together must reach beside none, at the larger batch; latency at batch 1.
TARGETS = {"throughput": 3.3, "latency": 0.2, "memory": 0.25, "points_lost": 0.8}


def loader(setting: Setting) -> Rows:
    """Returns pictures a second of `base` by threads, from JPEGs as large as photographs."""

    @functools.cache
    def folder() -> Path:
        scale = setting.scale
        spec = WorldSpec(scale.picture_size, scale.pictures, 4, 2, seed=0)
        return ensure_world(spec, setting.work / "pictures", progress=False)

    def measure(threads: int, workers: int) -> Row:
        data = {"data.source": "coco", "data.dir": str(folder()), "data.threads": threads}
        batch = min(128, setting.scale.pictures)
        changes = {
            **setting.scale.base, **data, "data.workers": workers, "train.batch_size": batch,
            "evaluation.batch_size": 2,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as run:
            setup = prepare(config_of("base", changes), RunFolder(run), lambda line: None)
            rate, _ = loader_alone(setup, LOADED)
        return {"images_per_second": round(rate, 1), "cores": cpu_count()}

    cores = cpu_count()
    kinds = dict.fromkeys([(1, 0), (cores, 0), (2 * cores, 0), (2, max(1, cores // 2))])
    return {
        f"{threads} threads, {workers} workers": partial(measure, threads, workers)
        for threads, workers in kinds
    }


def world(setting: Setting) -> Rows:
    """Returns what the run learned, what each way to write costs, and both against the targets."""
    run = setting.work / "run"

    @functools.cache
    def trained() -> tuple[LoadedModel, list[Record]]:
        model = load(run)
        source = open_source(model.config.data)
        name = model.config.evaluation.split
        split = open_split(model.config, source, name, model.task.modalities)
        records = split.first(setting.scale.scored).manifest.records
        return model, [record for record in records if record.image]

    def measure(name: str) -> Row:
        model, records = trained()
        way = next(way for way in ways(model) if way.name == name)
        return measured(way, records, setting.scale)

    asked = {name: partial(measure, name) for name in ASKED}
    return {
        "training": partial(train, setting, run),
        **asked,
        "all beside baseline": lambda: beside(setting.results.rows("world"), setting.scale.batch),
    }


def train(setting: Setting, run: Path) -> Row:
    """Trains by the command that users have, and returns the run's scores.

    Raises:
      RuntimeError: the command failed.
    """
    fields = {**setting.scale.base, **setting.scale.world, "data.threads": cpu_count()}
    flags = [f"--config.{name}={flag_value(value)}" for name, value in plain(fields).items()]
    module = [sys.executable, "-m", "unified_mm.main", "--config=coco:base"]
    command = [*module, *flags, f"--workdir={run}"]
    if code := subprocess.run(command, check=False).returncode:
        raise RuntimeError(f"exit code {code} of {shlex.join(command)}")
    result = read_json(run / "result.json")
    config = RunFolder(run).saved_config()
    return {
        "steps": config["train"]["steps"],
        "dtype": config["model"]["dtype"],
        "seconds": result.get("seconds"),
        "scores": result["scores"],
    }


def plain(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns fields without groups: those of a group by their own dotted names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= (
            plain(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {prefix + name: value}
        )
    return found


def flag_value(value: Any) -> str:
    """Returns a value as a flag has it."""
    return str(value).replace(" ", "")


def measured(way: Way, records: list[Record], scale: Scale) -> Row:
    """Returns the costs of a way at both batch sizes, and the score of what it writes."""
    return {
        "cider_d": round(caption_quality(way, records), 4),
        **{
            f"batch {batch}": costs(way, batch, scale.tokens, scale.repeats)
            for batch in (1, scale.batch)
        },
    }


def beside(rows: Mapping[str, Row], batch: int) -> Row:
    """Returns what all options gain beside none, and which targets that reaches."""
    none, every = rows["baseline"], rows["all"]
    one, many = ("batch 1", f"batch {batch}")
    exact = {
        "throughput": every[many]["tokens_per_second"] / none[many]["tokens_per_second"],
        "latency": every[one]["p50_ms"] / none[one]["p50_ms"],
        "memory": every[many]["peak_bytes"] / none[many]["peak_bytes"],
        "points_lost": 100 * (none["cider_d"] - every["cider_d"]),
    }
    gained = {name: round(value, 3) for name, value in exact.items()}
    reached = {
        name: value >= TARGETS[name] if name == "throughput" else value <= TARGETS[name]
        for name, value in gained.items()
    }
    return {
        **gained,
        "targets": TARGETS,
        "reached": reached,
        "reached_all": all(reached.values()),
    }
