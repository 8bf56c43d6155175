"""How a run is divided over its mesh, and the summary that is printed before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import Jaxpr
from jax.sharding import Mesh

from unified_mm.config import Config, build_options
from unified_mm.costs.flops import equations, matmul_flops
from unified_mm.default_config import MeshOptions
from unified_mm.nn.attention.backends import SCOPE
from unified_mm.nn.attention.rules import View, plan_passes, share_readings
from unified_mm.nn.pipeline import Pipeline
from unified_mm.parallel.sharding import axis_names, rule_items, shard_bytes
from unified_mm.runs.environment import device_name
from unified_mm.task import Task, check_bias, parameter_counts
from unified_mm.training.phases import Phase, batch_shapes


def in_training(config: Config, task: Task, mesh: Mesh) -> Task:
    """Returns the task as training computes it: by pipeline stages where the mesh has several.

    Raises:
      ValueError: `mesh.stage_micro_batches` is negative, or experts are to be divided where there
        are none, or where they drop nothing.
    """
    check_bias(task.model, task.objectives)
    if mesh.shape["expert"] > 1 and not has_experts(task):
        raise ValueError(
            f"mesh.expert={mesh.shape['expert']}: no layer has experts; set mesh.expert=1, or "
            "model.feed_forward_type='experts'"
        )
    divided = task.model.stacks.values() if mesh.shape["expert"] > 1 else ()
    for each, (name, keeps) in product(divided, (("dropless", True), ("drop_text", False))):
        if each.own(name, not keeps) == keeps:
            raise ValueError(
                f"mesh.expert={mesh.shape['expert']}: experts that drop nothing "
                f"(model.feed_forward_options.{name}={keeps}) are computed whole on every device; "
                "set mesh.expert=1, or give it the other value, and a capacity"
            )
    stages = mesh.shape["stage"]
    asked = build_options(MeshOptions, config.mesh, "mesh").stage_micro_batches
    if stages == 1:
        return task
    return replace(task, model=task.model.pipelined(Pipeline(stages, asked or 4 * stages)))


def has_experts(task: Task) -> bool:
    """Returns whether any of the model's parameters is divided among experts."""
    names = axis_names(task.abstract_params()).values()
    return any("experts" in each for each in names)


def run_summary(mesh: Mesh, phases: Sequence[Phase]) -> str:
    """Summarises devices, mesh, parameters, bytes on a device, phases and attention.

    Raises:
      ValueError: activations that the mesh does not divide, or a backend of attention that was
        asked for by name and cannot do what a phase needs: known once the losses are traced.
    """
    state = phases[0].abstract
    params = state.params
    counts = parameter_counts(params)
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1"
    pipeline = phases[0].task.model.options.pipeline
    if pipeline:
        axes += f" | pipeline: {pipeline.micro_batches} micro-batches, bubble {pipeline.bubble:.0%}"
    processes = jax.process_count()
    return (
        f"devices: {device_name()}, of {processes} process{'es' * (processes > 1)} | mesh: {axes}\n"
        f"parameters: {sum(counts.values()):,} ({parts})\n"
        f"on a device: parameters {megabytes(params)}, optimizer {megabytes(state.optimizer)}\n"
        + "\n".join(
            [
                *(
                    f"{phase_line(phase)}; {passes_of(phase.task)}{offered(phase, mesh)}"
                    for phase in phases
                ),
                attention_line(phases),
            ]
        )
    )


def megabytes(tree: Any) -> str:
    """Formats the megabytes of one device's share of abstract arrays."""
    return f"{shard_bytes(tree) / 1e6:,.1f} MB"


def phase_line(phase: Phase) -> str:
    """Says what a phase trains, and on what."""
    trained = parameter_counts(phase.optimizer.part(phase.abstract.params))
    objectives = ", ".join(objective.name for objective in phase.task.objectives)
    return (
        f"phase {phase.name}: steps {phase.start + 1} to {phase.stop} of {phase.batch_size} "
        f"examples in {phase.micro_batches} part(s), {len(phase.rows.examples):,} in all; learns "
        f"{objectives}, trains {sum(trained.values()):,} parameters ({', '.join(trained)})"
    )


def passes_of(task: Task) -> str:
    """Says which texts share a pass over the context, and which are read as one."""
    contexts = task.model.context_names
    read_as = share_readings(
        [view for objective in task.objectives for view in objective.views()], contexts
    )
    alike: dict[View, list[str]] = {}
    for name, view in read_as.items():
        alike.setdefault(view, []).append(name)
    passes = [
        ", ".join(" = ".join(alike[view]) for view in sharing)
        for sharing in plan_passes(list(alike), contexts)
    ]
    return f"reads [{'] ['.join(passes)}]" if passes else "reads no text"


def offered(phase: Phase, mesh: Mesh) -> str:
    """Says what the losses cost by either rule for captions, where several contexts are read.

    With `prefix` the contexts see each other, with `prefix_separate` they do not, and share their
    pass with `separate`.
    """
    rules = ("prefix", "prefix_separate")
    objectives = phase.task.objectives
    if len(phase.task.model.context_names) < 2 or not any(
        getattr(each, "rule", "") in rules for each in objectives
    ):
        return ""
    params, batch, key = examples(phase)
    rows = phase.batch_size // phase.micro_batches
    costs = []
    for rule in rules:
        by_rule = [
            replace(each, rule=rule) if getattr(each, "rule", "") in rules else each
            for each in objectives
        ]
        task = replace(phase.task, objectives=tuple(by_rule))
        with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
            flops = matmul_flops(partial(task.metrics, deterministic=False), params, batch, key)
        costs.append(f"{rule} {flops / rows / 1e6:,.1f}")
    return f"; MFLOPs of an example's losses by rule: {', '.join(costs)}"


def attention_line(phases: Sequence[Phase]) -> str:
    """Says which backend computes attention, and for how many queries and keys a call."""
    found = (chosen(phase.traced().jaxpr.jaxpr) for phase in phases)
    return f"attention: {' | '.join(dict.fromkeys(found))}"


def examples(phase: Phase) -> tuple[Any, Any, Any]:
    """Returns the shapes that a phase's losses take: parameters, a micro-batch, a random key."""
    batch = batch_shapes(phase.rows, phase.batch_size // phase.micro_batches)
    return phase.abstract.params, batch, jax.eval_shape(lambda: jax.random.key(0))


def chosen(program: Jaxpr) -> str:
    """Lists the attention backends in a traced program, with the queries x keys of their calls."""
    found: dict[str, set[tuple[int, int]]] = {}
    for equation in equations(program):
        for name, rows, columns in SCOPE.findall(str(equation.source_info.name_stack)):
            found.setdefault(name, set()).add((int(rows), int(columns)))
    return "; ".join(
        f"{name} for {', '.join(f'{rows} x {columns}' for rows, columns in sorted(calls))}"
        for name, calls in sorted(found.items())
    )
