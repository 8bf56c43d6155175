"""Optuna's search: trials are runs, hopeless ones are pruned, a search goes on."""

import pytest
import sweeps

from experiments import sweep as command
from experiments.sweeping import local

optuna = pytest.importorskip("optuna")

SECTION = """        scores=("caption/nats",),
        search=Search(
            space={"train.learning_rate": Span(1e-4, 1e-2, log=True), "train.b1": (0.8, 0.9)},
            score="caption/nats",
            higher=False,
        ),
"""
SEARCH = sweeps.FILE.replace('        scores=("caption/nats",),\n', SECTION)
SEARCH = SEARCH.replace("import Ablation\n", "import Ablation, Search, Span\n")


@pytest.fixture
def search(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "python_command", sweeps.stand_in_command)

    def carry_out(trials, text=SEARCH, more=()):
        path = sweeps.write_ablation(tmp_path, text)
        arguments = [str(path), f"--runs={tmp_path / 'runs'}", "--interval=0.02"]
        return command.sweep(command.parse([*arguments, f"--trials={trials}", "--jobs=2", *more]))

    return carry_out


def scores(said):
    return [float(line.split()[0]) for line in said.splitlines() if "  trial " in line]


def test_trials_go_on_where_they_were(search, tmp_path, capfd):
    assert search(2) == 0
    first = scores(capfd.readouterr().out)
    assert search(4) == 0
    said = capfd.readouterr().out
    second = scores(said)
    assert len(first) == 2 and len(second) == 4 and set(first) <= set(second)
    assert second == sorted(second)  # the best first, and lower is better here
    begun = [line for line in said.splitlines() if line.startswith("trial ")]
    assert any(line.startswith("trial 2: train") for line in begun)
    assert not any(line.startswith("trial 0:") for line in begun)
    assert len(set(second)) == 4  # no draw is repeated
    folder = tmp_path / "runs" / "rates"
    assert all(sweeps.starts(folder / f"trial_{n}-0") == [0] for n in range(4))


def test_a_search_for_something_else_has_a_folder_of_its_own(search, capfd):
    assert search(1) == 0
    other = ["--config.train.b2=0.9"]
    with pytest.raises(ValueError, match="holds the search for something else .run: .*b2=0.9"):
        search(1, more=other)
    with pytest.raises(ValueError, match="search: .*high=0.1"):
        search(1, text=SEARCH.replace("1e-2", "1e-1"))
    capfd.readouterr()
    assert search(1, more=[*other, "--name=other"]) == 0
    assert "trial 0: train.learning_rate=" in capfd.readouterr().out


def test_a_score_that_no_run_has_is_said(search, capfd):
    with pytest.raises(ValueError, match="score 'caption/natz': a run has caption/nats"):
        search(1, text=SEARCH.replace('score="caption/nats"', 'score="caption/natz"'))


def test_a_field_that_there_is_not_is_said_before_any_trial(search, tmp_path):
    with pytest.raises(ValueError, match="train.b7"):
        search(1, text=SEARCH.replace("train.b1", "train.b7"))
    assert not (tmp_path / "runs" / "rates" / "study.journal").exists()


def test_a_trial_that_was_cut_off_is_taken_up(search, tmp_path, capfd):
    from experiments.sweeping.ablation import load_ablation
    from experiments.sweeping.search import open_study, run_of

    folder = tmp_path / "runs" / "rates"
    folder.mkdir(parents=True)
    ablation = load_ablation(str(sweeps.write_ablation(tmp_path, SEARCH)))[1]
    asked = open_study(ablation.search, folder, 2).ask()
    run_of(asked, ablation, folder, ())  # and the search is killed
    assert search(1) == 0
    said = capfd.readouterr().out
    assert f"train.learning_rate={asked.params['train.learning_rate']}" in said
    assert "1 trials, 1 to their end" in said


def test_hopeless_trials_are_pruned(search, tmp_path, capfd):
    folder = tmp_path / "runs" / "rates"
    folder.mkdir(parents=True)
    for number in range(4, 8):  # those of before run to their end, whatever comes
        (folder / f"trial_{number}-0.slow").touch()
    assert search(8) == 0
    said = capfd.readouterr().out
    pruned = said.count(": pruned at step")
    assert pruned and f"8 trials, {8 - pruned} to their end" in said
    results = [folder / f"trial_{number}-0" / "result.json" for number in range(8)]
    assert sum(path.exists() for path in results) == 8 - pruned


def test_what_has_no_search_says_so(search):
    with pytest.raises(ValueError, match="no search section"):
        search(1, sweeps.FILE)


def test_searches_are_local(tmp_path):
    path = sweeps.write_ablation(tmp_path, SEARCH)
    args = command.parse([str(path), f"--runs={tmp_path}", "--launcher=slurm", "--trials=2"])
    with pytest.raises(ValueError, match="--launcher=local"):
        command.sweep(args)
