"""The trace of some steps, `--profile=STEPS`: which operations their time went to.

`profile/` in the run's folder has what `jax.profiler` writes, for TensorBoard and Perfetto, and
`operations.json`, which the run's report shows.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from unified_mm.files import write_json

SKIPPED = 3  # steps before the first that is traced: they compile, and fault memory in
SHOWN = 10  # operations
# What jax writes around an operation's place in the model.
AROUND = re.compile(
    r"^jit\(step\)/|(?:jit|jvp|transpose|checkpoint|remat\d?)\(|\)|(?:while|body|closed_call)/"
)


@dataclass
class Trace:
    """The trace of a run's steps `first` to `last`, both counted from 1; all of one phase.

    Attributes:
      folder: where it is written.
      first, last: the steps; none are traced where `last` is below `first`.
      running: whether the profiler runs.
    """

    folder: Path
    first: int
    last: int
    running: bool = False

    @classmethod
    def of(cls, folder: Path, steps: int, left: Sequence[tuple[int, int]]) -> Trace:
        """Returns the trace of so many steps of the first phase that has them.

        Args:
          folder: where it is written.
          steps: number of steps; 0 traces none.
          left: of each phase that is not done, the step it goes on from and its last.

        Raises:
          ValueError: no phase has so many steps left.
        """
        if not steps:
            return cls(folder, 1, 0)
        for start, stop in left:
            if start + SKIPPED + steps <= stop:
                return cls(folder, start + SKIPPED + 1, start + SKIPPED + steps)
        most = max((stop - start - SKIPPED for start, stop in left), default=0)
        spans = ", ".join(f"{start} to {stop}" for start, stop in left)
        raise ValueError(
            f"--profile={steps}: a trace is of one phase, without its first {SKIPPED} steps, and "
            f"they go from step {spans}: ask for at most {max(most, 0)}"
        )

    def before(self, step: int, state: Any) -> Any:
        """Starts the profiler if the step is the first; returns the name for it in the trace."""
        if step == self.first <= self.last:
            jax.block_until_ready(state)  # so that nothing earlier is traced
            shutil.rmtree(self.folder, ignore_errors=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # else most of the trace is Python
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self.running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def ends_with(self, step: int) -> bool:
        """Returns whether the step is the last of the trace."""
        return self.running and step == self.last

    def finish(self, results: Any, program: str) -> None:
        """Stops the profiler when the steps are done, and writes where their time went.

        Args:
          results: of the last step.
          program: the text of the compiled step.
        """
        jax.block_until_ready(results)
        self.close()
        steps = self.last - self.first + 1
        found = operations(self.folder, program, steps)
        write_json(
            self.folder / "operations.json",
            {"first": self.first, "last": self.last, "operations": found},
        )

    def close(self) -> None:
        """Stops the profiler if it runs."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()


def operations(folder: Path, program: str, steps: int) -> list[dict[str, Any]]:
    """Returns the operations of a program that took longest in a trace.

    Instructions of one place in the model (those of all layers, say) are one operation. Each has
    its `name`, the `milliseconds` it took in a step on all devices (on a CPU: threads) together,
    and their `share` of all operations'.

    Args:
      folder: where the profiler wrote.
      program: its text; events that name another are left out.
      steps: number of steps that were traced.
    """
    places, module = places_in(program), module_of(program)
    took: defaultdict[str, float] = defaultdict(float)
    for file in sorted(folder.glob("plugins/profile/*/*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for name, nanoseconds in own_times(operation_events(line, module)):
                    took[places.get(name, name)] += nanoseconds
    whole = sum(took.values())
    longest = sorted(took.items(), key=lambda item: -item[1])[:SHOWN]
    return [
        {
            "name": name,
            "milliseconds": round(nanoseconds / 1e6 / steps, 3),
            "share": round(nanoseconds / whole, 4),
        }
        for name, nanoseconds in longest
    ]


def operation_events(line: Any, module: str) -> list[tuple[str, float, float]]:
    """Returns (name, start, duration) of a trace's line's events that are operations of a program.

    A TPU has those of all programs on a line of their own, named by their whole text; other devices
    name the instruction and its module in fields.
    """
    if line.name == "XLA Ops":
        return [
            (event.name.partition(" = ")[0].lstrip("%"), event.start_ns, event.duration_ns)
            for event in line.events
        ]
    found = []
    with warnings.catch_warnings():  # jaxlib's own type of fields warns when it is first met
        warnings.simplefilter("ignore", DeprecationWarning)
        for event in line.events:
            fields = dict(event.stats)
            if "hlo_op" in fields and fields.get("hlo_module", module) == module:
                found.append((str(fields["hlo_op"]), event.start_ns, event.duration_ns))
    return found


def own_times(events: Iterable[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """Returns (name, duration) without what runs inside: a loop is not its body."""
    order = sorted(events, key=lambda event: (event[1], -event[2]))
    own = [duration for _, _, duration in order]
    around: list[int] = []
    for number, (_, start, duration) in enumerate(order):
        while around and order[around[-1]][1] + order[around[-1]][2] < start + duration:
            around.pop()
        if around:
            own[around[-1]] -= duration
        around.append(number)
    return [(name, max(mine, 0.0)) for (name, _, _), mine in zip(order, own, strict=True)]


def module_of(program: str) -> str:
    """Returns the name of a compiled program's module."""
    return re.match(r"HloModule ([^\s,]*)", program)[1]  # type: ignore[index]


def places_in(program: str) -> dict[str, str]:
    """Returns where in the model each instruction of a compiled program comes from."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', program, re.MULTILINE)
    return {name: place_of(place) for name, place in found}


def place_of(name: str) -> str:
    """Returns the place in the model, and whether it is a backward one, of a name of jax's."""
    return AROUND.sub("", name) + " (backward)" * ("transpose(" in name)
