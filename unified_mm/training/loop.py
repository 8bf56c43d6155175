"""The training loop: batches in, checkpoints and metrics out."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from unified_mm.costs.peaks import peak_of
from unified_mm.data.mixture import Mixture
from unified_mm.data.pipeline import Unreadable, training_batches
from unified_mm.evaluation.directions import higher_is_better
from unified_mm.evaluation.evaluate import evaluate
from unified_mm.files import uncollected
from unified_mm.inference.predictor import Predictor
from unified_mm.parallel.mesh import may_stand_still, shares_threads
from unified_mm.parallel.processes import first_decides, own_rows
from unified_mm.parallel.sharding import rule_items, to_global
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.environment import or_warn
from unified_mm.training.ahead import StepAhead, program_text
from unified_mm.training.compilation import may_compile_beside
from unified_mm.training.features import computed
from unified_mm.training.output import Output
from unified_mm.training.phases import Phase, training_flops
from unified_mm.training.progress import Starved
from unified_mm.training.setup import Setup, check_saved
from unified_mm.training.signals import StopRequest, stop_on_signals, stop_request
from unified_mm.training.state import LATER_SLOTS, TrainState, evaluation_params
from unified_mm.training.step import StepMetrics
from unified_mm.training.tracing import Trace

AHEAD = 4  # steps that are dispatched while another is worked on


class Stopped(Exception):
    """The error that a signal stopped the run; its state is saved."""

    def __init__(self, step: int, exit_code: int) -> None:
        super().__init__(step, exit_code)  # both as args, so that it survives pickling
        self.step = step
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"stopped at step {self.step}, which is saved"


class NotFinite(RuntimeError):
    """The error that a loss or gradient became infinite or NaN."""


class TooManyUnreadable(ValueError):
    """The error that too much of the data cannot be read; the state is saved."""


class Unread:
    """The parts that training could not read, each said once, of a set that was checked in part.

    Attributes:
      unreadable: what the readers note them by.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.unreadable = unreadable_of(setup)
        self.said = set(self.unreadable.lines()) if self.unreadable else set()

    def say_new(self, say: Callable[[str], None]) -> None:
        """Says what was met for the first time since the last call."""
        for line in dict.fromkeys(self.unreadable.lines() if self.unreadable else ()):
            if line not in self.said:
                self.said.add(line)
                say(f"cannot be read, so it counts as absent: {line.replace(chr(9), ': ')}")

    def fault(self, rows: int) -> str:
        """Returns what is wrong if too many are bad of what was read, on all processes; else ''.

        Args:
          rows: rows that were read, all epochs together.
        """
        if self.unreadable is None:
            return ""
        bad, allowed = len(self.said), self.setup.config.data.max_bad_share
        read = min(rows, len(self.setup.train.records))
        if not first_decides(bad > allowed * read):
            return ""
        return (
            f"{bad} parts of the {read} examples that were read so far cannot be read "
            f"({bad / read:.1%}, allowed are {allowed:.1%}): {self.unreadable.log} names them. "
            "Mend or remove them, or raise data.max_bad_share"
        )


class InFlight:
    """The steps that were dispatched and may not be done; few, as who stops a run waits for all."""

    def __init__(self) -> None:
        self._results: deque[Any] = deque()

    def add(self, results: Any) -> None:
        """Adds what a step gives, and waits for the oldest where there are too many."""
        self._results.append(results)
        if len(self._results) > AHEAD:
            jax.block_until_ready(self._results.popleft())


@dataclass(frozen=True)
class Interval:
    """The steps between two records of metrics.

    Attributes:
      step: the last one.
      measured: what each gave.
      done: when the last one was done.
      starved: seconds in which the devices waited for data.
    """

    step: int
    measured: list[StepMetrics]
    done: Future[float]
    starved: float


def unreadable_of(setup: Setup) -> Unreadable | None:
    """Returns where a run names what it cannot read; None where all images were decoded before."""
    if not setup.train.unchecked:
        return None
    return Unreadable(str(setup.folder.path / "unreadable.txt"))


def train(
    setup: Setup, output: Output, predictor: Predictor, *, traced: int = 0
) -> tuple[TrainState, float]:
    """Trains from the newest whole checkpoint, or from the start, to the last step.

    Everything after a step is a function of the config and of the checkpoint before it, so a run
    that was killed ends in the same bits as one that was not.

    Args:
      setup: of the run.
      output: where it says how far it is.
      predictor: without parameters; what it compiles serves every evaluation.
      traced: number of steps of which `profile/` gets a trace.

    Returns:
      The last state, and the seconds that the run took up to it, over all restarts.

    Raises:
      Stopped: after SIGTERM or Ctrl-C; the state is saved.
      NotFinite: a loss or gradient is not finite; names the step and the last checkpoint.
      ValueError: the data is not what the run began with, or fewer steps are left than `traced`.
    """
    options = setup.options
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(setup.mesh))
        stack.enter_context(nn.logical_axis_rules(rule_items()))
        asked = stop_request(setup.mesh, options.logging.every)
        stop = stack.enter_context(stop_on_signals(asked))
        checkpoints = stack.enter_context(
            Checkpoints(
                setup.folder.checkpoints,
                keep=options.checkpoint.keep,
                asynchronous=options.checkpoint.asynchronous,
            )
        )
        with uncollected():
            ahead = StepAhead(first_phase(setup, checkpoints))
            stack.callback(ahead.wait)
            state, start, earlier = first_state(setup, checkpoints, output.say)
        metrics = stack.enter_context(output.metrics(options.logging.tensorboard, start or None))
        traced = traced if output.writes else 0
        left = [(max(start, each.start), each.stop) for each in setup.phases if start < each.stop]
        trace = Trace.of(setup.folder.profile, traced, left)
        stack.callback(trace.close)
        if setup.source.banner and not start:
            metrics.write_text(0, "data/notice", setup.source.banner)
        began = time.perf_counter() - earlier
        unread = Unread(setup)
        run = Run(
            setup, checkpoints, metrics, stop, output.say, predictor, began, unread, trace, ahead
        )
        run.know_peak(start)
        if warning := may_stand_still(setup.mesh):
            output.say(warning)
        if jax.process_count() == 1:
            stop.unsaved = run.unsaved
        with output.progress(start, options.train.steps) as progress:
            for phase in setup.phases:
                if start < phase.stop:
                    begun = state if start > phase.start else phase.enter(state)
                    state = run.steps(phase, begun, max(start, phase.start), progress)
        checkpoints.wait()
        if stop.at_last():  # it came when all steps were done
            raise Stopped(options.train.steps, stop.exit_code)
        return state, run.seconds()


def first_phase(setup: Setup, checkpoints: Checkpoints) -> Phase | None:
    """Returns the phase to go on with, whose step is compiled ahead; None where that cannot be."""
    start = max(checkpoints.steps(), default=0)
    if not may_compile_beside(setup.mesh) or start >= setup.options.train.steps:
        return None
    return setup.phase_at(start + 1)


def first_state(
    setup: Setup, checkpoints: Checkpoints, say: Callable[[str], None]
) -> tuple[TrainState, int, float]:
    """Returns the state to go on from, its step, and the seconds that the run has taken before."""
    if not checkpoints.steps():
        return setup.make_state(), 0, 0.0
    restored = checkpoints.restore(
        lambda step: setup.phase_at(step).abstract,
        later={slot: partial(first_value, setup, slot) for slot in LATER_SLOTS},
    )
    check_saved(setup, restored.metadata)
    say(f"resuming at step {restored.step} of {setup.options.train.steps}")
    return restored.state, restored.step, restored.metadata.get("seconds", 0.0)


def first_value(setup: Setup, slot: str, step: int) -> Any:
    """Returns the first value of a part of the state, in the phase of a step."""
    return getattr(setup.phase_at(step).enter(setup.make_state()), slot)


@dataclass
class Run:
    """One run in training: its setup, and what its steps write to."""

    setup: Setup
    checkpoints: Checkpoints
    metrics: Any  # see `Output.metrics`
    stop: StopRequest
    say: Callable[[str], None]
    predictor: Predictor
    began: float  # on this process's clock, moved back by what earlier processes took
    unread: Unread
    trace: Trace
    ahead: StepAhead
    peak: float = 0.0  # FLOP/s of all devices; 0: not known
    flops: int = 0  # of a step, where the peak is known; 0: not known
    starved: Starved = field(default_factory=Starved)
    fresh: bool = False  # whether a step was done since the last save
    stopping: bool = False  # after a signal, with its last save
    computing: bool = False  # what comes before the steps

    def unsaved(self) -> bool:
        """Returns whether something learned is not on disk, or the run ends by itself."""
        return self.fresh or self.stopping or self.computing or self.checkpoints.saving

    def leave(self) -> None:
        """Ends a run that was asked to stop before a phase's first step: all before is saved."""
        if self.stop.signal is not None:
            raise SystemExit(self.stop.exit_code)

    def know_peak(self, start: int) -> None:
        """Says which peak MFU is of, or that it is left out for want of one."""
        devices = self.setup.mesh.devices.ravel().tolist()
        if (found := peak_of(devices, self.setup.options.logging.peak_flops)) is None:
            kind = devices[0].device_kind
            self.say(
                f"metrics leave out MFU: the peak of this device ({kind}) is not known; "
                "logging.peak_flops gives it, and `python -m unified_mm.bench` measures one"
            )
            return
        self.peak, said = found
        self.say(f"MFU in the metrics is of {said}")
        self.metrics.write_text(start, "time/mfu_of", said)

    def seconds(self) -> float:
        """Returns the seconds that the run has taken, over all restarts."""
        return time.perf_counter() - self.began

    def steps(self, phase: Phase, state: TrainState, start: int, progress: Any) -> TrainState:
        """Trains from step `start` to the phase's last, and returns the state."""
        options = self.setup.options
        data, tolerant = self.setup.config.data, bool(self.setup.train.unchecked)
        self.computing = True
        given = (phase, state.params, self.predictor, data, tolerant, self.say)
        planned, phase = phase, computed(*given, leave=self.leave)
        self.computing = False
        since: list[StepMetrics] = []
        waiting: Interval | None = None
        bad = ""  # what is wrong with the data
        counted = or_warn("MFU", lambda: training_flops(phase)) if self.peak else None
        self.flops = counted or 0
        one_by_one = shares_threads(self.setup.mesh)
        in_flight = InFlight()
        with closing(phase_batches(self.setup, phase, start)) as batches:  # type: ignore[type-var]
            step_function = self.ahead.step_of(planned)
            for step in range(start + 1, phase.stop + 1):
                with self.starved.waiting():
                    rows = self.next_rows(batches, step - 1, state)
                with self.trace.before(step, state):
                    state, measured = step_function(state, to_global(rows, self.setup.mesh))
                if one_by_one:
                    jax.block_until_ready(state)
                self.fresh = True
                done = self.starved.until(measured)
                if self.trace.ends_with(step):
                    self.trace.finish(measured, program_text(planned))
                since.append(measured)
                in_flight.add(measured)
                last = step == phase.stop
                logged = step % options.logging.every == 0 or last
                if waiting is not None and (logged or step >= waiting.step + AHEAD):
                    # It was waited for just now: nothing that devices work on is waited for.
                    self.record(waiting, phase, progress)
                    waiting = None
                if logged:
                    waiting, since = Interval(step, since, done, self.starved.take()), []
                    self.unread.say_new(self.say)
                    rows_read = sum(each.rows_read(step) for each in self.setup.phases)
                    bad = self.unread.fault(rows_read)
                stopped = self.stopping = self.stop.after(step)
                save = last or step % options.checkpoint.every == 0 or stopped or bad
                end = step == options.train.steps  # of the run: it is scored when all is done
                score = (
                    options.evaluation.every and step % options.evaluation.every == 0 and not end
                )
                if save or score:
                    self.record(waiting, phase, progress)
                    waiting = None
                    jax.block_until_ready(measured)
                    with progress.paused():
                        self.save(step, state)
                        if bad:
                            raise TooManyUnreadable(f"{bad}; step {step} is saved")
                        if stopped:
                            raise Stopped(step, self.stop.exit_code)
                        if score:
                            self.score(step, state)
        return state

    def next_rows(self, batches: Iterator[Any], step: int, state: TrainState) -> Any:
        """Returns the next batch; where it cannot be read, saves what was learned so far first.

        Several processes save together or not at all, and the others have read theirs.
        """
        try:
            return next(batches)
        except Exception:
            if step and jax.process_count() == 1 and step not in self.checkpoints.steps():
                self.save(step, state)
            raise

    def record(self, waiting: Interval | None, phase: Phase, progress: Any) -> None:
        """Writes the mean metrics of an interval.

        Raises:
          NotFinite: a step of it was not finite.
          CheckpointError: what was saved is not what was read back.
        """
        self.checkpoints.check()
        if waiting is None:
            return
        step, host = waiting.step, jax.device_get(waiting.measured)
        bad = int(host[-1].bad_step)
        if bad >= 0:
            self.not_finite(bad)
        values = mean_metrics([measured.metrics for measured in host])
        values["learning_rate"] = float(host[-1].learning_rate)
        values |= epochs_of(self.setup.phases, step)
        size, done = phase.batch_size, waiting.done.result()
        rates = progress.update(step, values, size, waiting.starved, done)
        if self.flops and rates:
            rates["time/mfu"] = rates["time/steps_per_second"] * self.flops / self.peak
        self.metrics.write(step, values | rates)

    def save(self, step: int, state: TrainState) -> None:
        """Saves a checkpoint.

        Raises:
          NotFinite: a step so far was not finite.
        """
        bad = int(state.bad_step)
        if bad >= 0:
            self.not_finite(bad)
        self.checkpoints.save(step, state, self.metadata(step))
        self.fresh = False

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the metadata of a checkpoint; the position in the data is the step."""
        setup = self.setup
        return {
            "step": step,
            "seed": setup.options.seed,
            "data_source": setup.source.name,
            "data_fingerprint": setup.fingerprint,
            "tokenizer": setup.folder.tokenizer_digest(),
            "notice": setup.source.banner,
            "seconds": self.seconds(),
        }

    def not_finite(self, step: int) -> None:
        """Raises NotFinite: no parameter has changed since the step before."""
        good = self.checkpoints.steps()
        where = f"step {good[-1]}" if good else "none yet"
        raise NotFinite(
            f"the loss or its gradient is not finite at step {step + 1}; the last good checkpoint "
            f"is {where}. Lower train.learning_rate, or lengthen train.warmup_steps, in a new "
            "--workdir."
        )

    def score(self, step: int, state: TrainState) -> None:
        """Scores the state of a step, and saves it in `best/` if it is the best so far.

        Raises:
          ValueError: `evaluation.best_by` is no score of this run.
        """
        setup, options = self.setup, self.setup.options
        predictor = self.predictor.at(evaluation_params(state))
        split = setup.splits[options.evaluation.split]
        scores = evaluate(predictor, split, batch_size=options.evaluation.batch_size).scores
        self.metrics.write(
            step, {f"{options.evaluation.split}/{name}": v for name, v in scores.items()}
        )
        if not setup.best_by:
            return
        value = scores.get(setup.best_by)
        if value is None:
            raise ValueError(
                f"evaluation.best_by={setup.best_by!r} is no score of this run; there are "
                f"{', '.join(scores)}"
            )
        self.say(f"step {step}: {options.evaluation.split} {setup.best_by} {value:.3f}")
        keep_best(setup, state, step, value, self.metadata(step))


def epochs_of(phases: Sequence[Phase], step: int) -> dict[str, float]:
    """Returns how often each source of a mixture was gone through up to a step, in all phases."""
    found: dict[str, float] = {}
    for phase in phases:
        if isinstance(mixture := phase.rows.examples, Mixture):
            for name, count in mixture.epochs(phase.rows_read(step)).items():
                found[f"epochs/{name}"] = found.get(f"epochs/{name}", 0.0) + count
    return found


def phase_batches(setup: Setup, phase: Phase, start: int) -> Iterator[Any]:
    """Returns this process's rows of a phase's batches, from after step `start` on."""
    return training_batches(
        phase.rows.examples,
        phase.rows.preparers,
        seed=setup.options.seed,
        batch_size=phase.batch_size,
        start_step=start,
        rows=own_rows(setup.mesh, phase.batch_size),
        threads=setup.options.data.threads,
        workers=setup.options.data.workers,
        unreadable=unreadable_of(setup),
        numbered=phase.rows.numbered,
    )


def keep_best(
    setup: Setup, state: TrainState, step: int, value: float, metadata: Mapping[str, Any]
) -> None:
    """Saves the state in `best/` if no earlier one scored as well."""
    name = setup.best_by
    record = {**metadata, "score": name, "value": value}
    with Checkpoints(setup.folder.best, keep=1) as best:
        if first_decides(is_better(best, step, value, higher_is_better(name))):
            best.save(step, state, record)


def is_better(best: Checkpoints, step: int, value: float, higher: bool) -> bool:
    """Returns whether a later step's score is better than that of the saved one, if any.

    NaN is never better.

    Args:
      best: holds the state saved so far.
      step: the later step.
      value: its score.
      higher: whether more of the score is better.
    """
    if math.isnan(value) or not best.steps():
        return not math.isnan(value)
    known = best.metadata()
    gain = value - known["value"]
    return known["step"] < step and (gain > 0 if higher else gain < 0)


def mean_metrics(steps: list[Mapping[str, tuple[Any, Any]]]) -> dict[str, float]:
    """Returns each metric's mean over several steps, weighted by its counts."""
    means = {}
    for name in steps[0]:
        total = np.sum([np.float64(metrics[name][0]) for metrics in steps])
        count = np.sum([np.float64(metrics[name][1]) for metrics in steps])
        means[name] = float(total / count) if count else float("nan")
    return means
