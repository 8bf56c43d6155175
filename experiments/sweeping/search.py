"""A search of hyper-parameters: Optuna's trials (the extra 'sweep') as runs of the base variant.

The study is stored in the sweep's folder, in a journal that a kill cannot damage. A search that is
started again resumes the trials that were running.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.sweeping.ablation import Ablation, Search, Span
from experiments.sweeping.jobs import End, Job
from experiments.sweeping.local import Local
from experiments.sweeping.loop import watch
from experiments.sweeping.progress import newest_records
from experiments.sweeping.runs import Run, check_run, finished, make_run, recipe_of
from unified_mm.cli.messages import say

STARTUP = 4  # trials that run to their end before any is pruned
ASKED = "asked"  # the study's attribute that says what is searched
WARMUP = 0.25  # share of its steps before which none is pruned


@dataclass
class Trial:
    """A trial that is running."""

    asked: Any
    run: Run
    job: Job
    reported: set[int] = field(default_factory=set)
    pruned: bool = False


def search(
    ablation: Ablation,
    folder: Path,
    trials: int,
    jobs: int,
    more: Sequence[str] = (),
    interval: float = 2.0,
) -> int:
    """Runs trials until the study has `trials` of them, and prints the best.

    Returns:
      The exit code: 0 if any trial was finished.

    Raises:
      ValueError: if the ablation has no search, Optuna is not installed, or the folder holds
        another search.
    """
    if ablation.search is None:
        raise ValueError("this ablation has no search section: see experiments.sweeping.ablation")
    launcher = Local(jobs, folder / "logs")
    fields = ablation.all_variants()[ablation.base]
    base = make_run("base", ablation.seeds[0], fields, ablation.config, folder, more)
    for name, choice in ablation.search.space.items():
        first = choice.low if isinstance(choice, Span) else choice[0]
        check_run(make_run("search", 0, {**fields, name: first}, ablation.config, folder, more))
    steps = recipe_of(base).config.train.steps
    study = open_study(ablation.search, folder, int(WARMUP * steps))
    check_question(study, {"run": base.config_arguments(), "search": repr(ablation.search)}, folder)
    watch(carry_out(study, trials, launcher, ablation, folder, more), launcher, interval)
    return summary(study)


def carry_out(
    study: Any,
    trials: int,
    launcher: Local,
    ablation: Ablation,
    folder: Path,
    more: Sequence[str],
) -> Iterator[None]:
    """Runs trials, interrupted ones first, until the study has `trials` of them.

    Yields:
      None, each time that there is nothing to do but wait.
    """
    assert ablation.search is not None
    work: list[Trial] = []
    while True:
        while launcher.room(len(work)) and (asked := next_trial(study, work, trials)):
            run = run_of(asked, ablation, folder, more)
            job = launcher.found(run) or launcher.start([run])[0]
            say(f"trial {asked.number}: {values_of(asked)}")
            told = study.get_trials(deepcopy=False)[asked.number].intermediate_values
            work.append(Trial(asked, run, job, set(told)))
        if not work:
            return
        for trial in list(work):
            report(study, trial, ablation.search)
            if end := trial.job.ended():
                work.remove(trial)
                tell(study, trial, end, ablation.search.score)
        yield


def open_study(search: Search, folder: Path, warmup: int) -> Any:
    """Creates or resumes the study in its journal; no trial is pruned before step `warmup`.

    Raises:
      ValueError: if Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ValueError("--trials needs optuna: pip install -e '.[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    study = optuna.create_study(
        study_name=folder.name,
        storage=storage,
        direction="maximize" if search.higher else "minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=warmup),
        load_if_exists=True,
    )
    # A search that goes on must not draw the same numbers again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    return study


def check_question(study: Any, asked: dict[str, Any], folder: Path) -> None:
    """Stores what a new study searches, and checks that a resumed one searches the same.

    Raises:
      ValueError: if the study searches something else.
    """
    before = study.user_attrs.get(ASKED)
    if before is None:
        study.set_user_attr(ASKED, asked)
    elif before != asked:
        changed = [
            f"{key}: {before[key]} there, {asked[key]} here"
            for key in asked
            if before[key] != asked[key]
        ]
        raise ValueError(
            f"{folder} holds the search for something else ({'; '.join(changed)}): give this one a "
            "--name of its own"
        )


def values_of(trial: Any) -> str:
    """Returns the values that a trial chose, as text."""
    return " ".join(f"{name}={value}" for name, value in trial.params.items())


def next_trial(study: Any, work: Sequence[Trial], trials: int) -> Any:
    """Returns a trial that an earlier search left unfinished, else a new one while some are due."""
    import optuna

    at_work = {trial.asked.number for trial in work}
    for left in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if left.number not in at_work:
            return optuna.trial.Trial(study, left._trial_id)
    return study.ask() if len(study.trials) < trials else None


def run_of(asked: Any, ablation: Ablation, folder: Path, more: Sequence[str]) -> Run:
    """Returns the base variant with the trial's values, which are the same if it is resumed."""
    assert ablation.search is not None
    fields = ablation.all_variants()[ablation.base]
    for name, choice in ablation.search.space.items():
        fields[name] = suggest(asked, name, choice)
    run = make_run(
        f"trial_{asked.number}", ablation.seeds[0], fields, ablation.config, folder, more
    )
    check_run(run)
    return run


def suggest(asked: Any, name: str, choice: Span | Sequence[Any]) -> Any:
    """Returns the trial's value for a field."""
    if not isinstance(choice, Span):
        return asked.suggest_categorical(name, list(choice))
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return asked.suggest_int(name, choice.low, choice.high, log=choice.log)
    return asked.suggest_float(name, choice.low, choice.high, log=choice.log)


def report(study: Any, trial: Trial, search: Search) -> None:
    """Reports the trial's metric to the study, and stops the trial if it should be pruned."""
    if not search.prune_by or trial.pruned:
        return
    for record in newest_records(trial.run.folder.metrics):
        step, value = record["step"], record.get(search.prune_by)
        if value is None or step in trial.reported:
            continue
        trial.reported.add(step)
        # The study knows one direction, that of the score; here lower is better.
        trial.asked.report(-value if search.higher else value, step)
        if trial.asked.should_prune():
            trial.pruned = True
            trial.job.stop()
            return


def tell(study: Any, trial: Trial, end: End, score: str) -> None:
    """Tells the study how a trial ended: with its score, pruned or failed.

    Raises:
      ValueError: if the run does not have the score.
    """
    from optuna.trial import TrialState

    number = trial.asked.number
    if finished(trial.run):
        scores = trial.run.folder.read_result()["scores"]
        if score not in scores:
            study.tell(number, state=TrialState.FAIL)
            raise ValueError(f"the search's score {score!r}: a run has {', '.join(scores)}")
        study.tell(number, scores[score])
        say(f"trial {number}: {score} {scores[score]:.4f}")
    elif trial.pruned:
        study.tell(number, state=TrialState.PRUNED)
        say(f"trial {number}: pruned at step {max(trial.reported)}")
    elif not end.again:
        study.tell(number, state=TrialState.FAIL)
        say("\n".join([f"trial {number} failed: {end}", *(f"  | {x}" for x in end.last_lines)]))


def summary(study: Any) -> int:
    """Prints the finished trials by their score, and returns the exit code."""
    from optuna.trial import TrialState

    scored = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    scored.sort(key=lambda trial: trial.value, reverse=study.direction.name == "MAXIMIZE")
    for trial in scored:
        say(f"{trial.value:.4f}  trial {trial.number}: {values_of(trial)}")
    say(f"{len(study.trials)} trials, {len(scored)} to their end")
    return 0 if scored else 1
