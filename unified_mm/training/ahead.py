"""The training step compiled before it runs, also for devices that are not there; its costs."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from unified_mm.config import Config
from unified_mm.costs.collectives import Collective, collectives_in
from unified_mm.costs.hlo import Program
from unified_mm.costs.traffic import memory_traffic
from unified_mm.data.records import Manifest, Record, Text
from unified_mm.parallel.mesh import make_mesh
from unified_mm.task import build_task
from unified_mm.training.compilation import Compilation
from unified_mm.training.phases import Phase
from unified_mm.training.setup import plan
from unified_mm.training.sizes import stand_in_for


@dataclass(frozen=True)
class Footprint:
    """What a compiled step needs of one device; sizes are bytes.

    Attributes:
      temporary: activations, gradients and all else that lives within a step only.
      peak: everything that is there at once: the state, a batch, the temporaries and the metrics.
      traffic: bytes from and to the device's memory in a step.
      collectives: the collectives of a step.
    """

    temporary: int
    peak: int
    traffic: int
    collectives: tuple[Collective, ...]


class DoesNotFit(Exception):
    """The error that a step needs more memory than the devices have.

    Attributes:
      needed: bytes that the step needs; 0 where the compiler does not tell.
      there: bytes that the device has; 0 where the compiler does not tell.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        numbers = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", message)
        sizes = [float(number) * 1024 ** " KMGT".index(unit) for number, unit in numbers]
        self.needed, self.there = (int(size) for size in (*sizes[:2], 0, 0)[:2])


def abstract_phases(config: Config, devices: Sequence[Any]) -> tuple[Phase, ...]:
    """Returns the phases as training has them, without data and without allocating anything.

    The tokenizer is taken to be as large as `data.vocabulary_size` says.

    Raises:
      ValueError: a config that cannot be trained, or a mesh that does not divide it.
    """
    task = build_task(config, stand_in_for(config))
    mesh = make_mesh(config.mesh, devices)
    return plan(config, task, mesh, stand_in_data(config))[1]


def stand_in_data(config: Config) -> Manifest:
    """Returns placeholder examples, enough for a few-shot document."""
    texts = (Text("", "a caption"), Text("a question", "an answer"))
    count = config.data.documents.shots + 1
    records = tuple(
        Record(number, {"image": "absent.jpg"}, texts, False) for number in range(count)
    )
    return Manifest("train", records, "none", "", "none")


class StepAhead:
    """The step of a phase, compiled while a state is made and data is read.

    Args:
      phase: the phase that training begins with; None compiles nothing ahead.
    """

    def __init__(self, phase: Phase | None) -> None:
        self._phase = phase
        self._compilation = None if phase is None else Compilation(phase.lowered())

    def wait(self) -> None:
        """Waits until nothing is compiled."""
        if self._compilation is not None:
            self._compilation.wait()

    def step_of(self, phase: Phase) -> Any:
        """Returns the step of a phase, which is compiled by now, or when it is called.

        Raises:
          Exception: what the compiler raised.
        """
        if phase is self._phase and self._compilation is not None:
            self._compilation.finish()
        return phase.step


def program_text(phase: Phase) -> str:
    """Returns the text of a phase's compiled step, without compiling again what has run."""
    return str(phase.lowered().compile().as_text())


def compile_step(phase: Phase) -> tuple[Any, float]:
    """Compiles the step that training runs, and measures the seconds that took.

    Raises:
      DoesNotFit: the devices have too little memory.
    """
    began = time.perf_counter()
    try:
        compiled = phase.lowered().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit(str(error).splitlines()[0]) from error
        raise
    return compiled, time.perf_counter() - began


def footprint(compiled: Any) -> Footprint:
    """Reads the footprint of a compiled step."""
    memory = compiled.memory_analysis()
    program = Program.parse(compiled.as_text())
    return Footprint(
        temporary=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        traffic=memory_traffic(program),
        collectives=tuple(collectives_in(program)),
    )
