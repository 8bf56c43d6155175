"""What an ablation came to: statistics against scipy and the tables, Markdown, CSV, pictures."""

import csv
import io
import json
import xml.etree.ElementTree
from dataclasses import replace

import numpy as np
import pytest
import sweeps

from experiments import readme_tables
from experiments.report import write_summary
from experiments.reporting.kept import RESULTS, keep, read_kept
from experiments.reporting.summary import as_csv, brief, cost, markdown, summarise
from experiments.sweeping.ablation import Ablation, load_ablation
from experiments.sweeping.runs import runs_of

SCORES = {"early": [0.50, 0.54, 0.49, 0.53, 0.52], "late": [0.60, 0.66, 0.59, 0.62, 0.64]}


LATE = {"model.fusion": "late"}
ABLATION = Ablation(
    config="configs/coco.py:tiny",
    variants={"early": {}, "late": LATE, "never": {"train.b1": 0.5}},
    seeds=range(5),
    scores=("caption/cider_d", "foil/accuracy"),
)


FIELDS = {"early": [], "late": ["model.fusion=late"]}


def kept_file(folder, variant, seed, score, flops, chance=0.1):
    foils = {"foil/accuracy": 0.5} if variant == "early" else {}
    content = {
        "variant": variant,
        "seed": seed,
        "flops": flops,
        "parameters": 1_000_000,
        "config": "configs/coco.py:tiny",
        "fields": FIELDS.get(variant),
        "data": {"fingerprint": "f"},
        "scores": {"caption/cider_d": score} | foils,
        "chance": {"caption/cider_d": chance},
        "curves": {"captioning/loss": [[10, 2.0], [20, 1.0 + score]]},
    }
    (folder / f"{variant}-{seed}.json").write_text(json.dumps(content))


@pytest.fixture
def kept(tmp_path):
    for variant, flops in (("early", 1e12), ("late", 1.5e12)):
        for seed, score in enumerate(SCORES[variant]):
            kept_file(tmp_path, variant, seed, score, flops)
    return tmp_path


def test_the_table_says_both_costs_and_what_is_noise(kept):
    kept_file(kept, "late", 4, 0.20, 1.5e12)
    text = markdown(summarise(ABLATION, read_kept(kept, ABLATION)))
    rows = [line for line in text.splitlines() if line.startswith("| late")]
    assert "within the noise" in rows[0]
    assert "1 M (equal) | 1.5 T (x 1.50)" in rows[0] and "chance 0.100" in rows[0]
    assert rows[1].startswith("| late | 0 | cannot |")
    assert "never" not in text  # it has no runs yet


def test_the_brief_table_is_bold_beyond_the_noise(kept):
    rows = brief(summarise(ABLATION, read_kept(kept, ABLATION))).splitlines()
    assert rows[0] == "|  | seeds | `caption/cider_d` | `foil/accuracy` | parameters | FLOPs |"
    assert rows[2].startswith(
        "| early | 5 | 0.516 (0.490 to 0.542), chance 0.100 | 0.500 (0.500 to 0.500) |"
    )
    assert rows[3].startswith("| late | 5 | 0.622, **+0.106** (+0.089 to +0.123) | cannot |")
    kept_file(kept, "late", 4, 0.20, 1.5e12)
    assert "0.534, +0.018 (" in brief(summarise(ABLATION, read_kept(kept, ABLATION)))


def test_the_brief_table_says_a_chance_that_is_not_the_base_s(kept):
    for seed, score in enumerate(SCORES["late"]):
        kept_file(kept, "late", seed, score, 1.5e12, chance=0.3)
    rows = brief(summarise(ABLATION, read_kept(kept, ABLATION))).splitlines()
    assert rows[3].startswith("| late | 5 | 0.622, **+0.106** (+0.089 to +0.123), chance 0.300 |")


def test_a_power_law_is_said_and_drawn_where_it_is_asked_for(tmp_path):
    """Four sizes of two seeds, on a law of exponent 0.5 and floor 0.2."""
    widths = {f"w{width}": {"model.width": width} for width in (32, 64, 96, 128)}
    asked = Ablation("configs/coco.py:tiny", ("caption/nats",), range(2), widths)
    law = replace(asked, power_law="caption/nats")
    for place, variant in enumerate(widths):
        for seed in (0, 1):
            cost = 1e12 * 2**place
            kept_file(tmp_path, variant, seed, 0.0, cost)
            path = tmp_path / f"{variant}-{seed}.json"
            content = json.loads(path.read_text())
            loss = 0.2 + (cost / 1e12) ** -0.5 + 0.001 * (seed - 0.5)
            content["fields"] = [f"model.width={widths[variant]['model.width']}"]
            path.write_text(json.dumps(content | {"scores": {"caption/nats": loss}}))
    write_summary(asked, tmp_path)
    assert "profile likelihood" not in (tmp_path / "table.md").read_text()
    write_summary(law, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "`caption/nats` = 0.595 x (FLOPs / 2.83 T) ^ -0.5" in text
    assert "Lack of fit: p = 1." in text or "Lack of fit: p = 0.9" in text


def test_verdicts(kept):
    lines = {each.variant: each for each in summarise(ABLATION, read_kept(kept, ABLATION))[:2]}
    assert (lines["early"].verdict, lines["late"].verdict) == ("", "higher")
    assert lines["late"].difference.mean == pytest.approx(0.106)
    assert cost(1.005e9, 1.005) == "1 G (equal)" and cost(None, None) == "not said"


def test_csv_has_the_numbers_unrounded(kept):
    rows = list(csv.DictReader(io.StringIO(as_csv(summarise(ABLATION, read_kept(kept, ABLATION))))))
    assert rows[1]["variant"] == "late"
    assert float(rows[1]["mean"]) == np.mean(SCORES["late"])
    assert float(rows[1]["flops_ratio"]) == 1.5


def test_pictures_are_drawn(kept):
    write_summary(ABLATION, kept)
    for name in ("curves", "bars", "flops"):
        root = xml.etree.ElementTree.parse(kept / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
    first = {path.name: path.read_bytes() for path in kept.glob("*.*")}
    write_summary(ABLATION, kept)
    assert first == {path.name: path.read_bytes() for path in kept.glob("*.*")}
    assert (kept / "table.md").read_text().count("| early |") == 2


def test_what_is_kept_of_a_run(tmp_path):
    _, ablation = load_ablation(str(sweeps.write_ablation(tmp_path)))
    run = runs_of(ablation, tmp_path, more=["--config.data.dir=/home/me"])[0]
    run.folder.path.mkdir()
    lines = [json.dumps({"step": 10 * i, "loss": 1.0 / i}) for i in range(1, 101)]
    run.folder.metrics.write_text("\n".join(lines) + "\n")
    result = {
        "scores": {"caption/nats": 1.0, "test_composition/caption/nats": 2.0},
        "chance": {"caption/nats": 3.0, "foil/accuracy": 0.5},
        "data": {"source": "world", "folder": "/home/me", "notice": "...", "fingerprint": "f"},
        **{"device": "cpu", "versions": {}, "revision": "r", "steps": 1000, "seconds": 1.0},
        **{"flops": 5, "parameters": 7, "ceiling": {}},
    }
    run.folder.result.write_text(json.dumps(result))
    path = keep(run, ("caption/nats",), tmp_path / "kept")
    assert path.name == "low-0.json"
    (found,) = read_kept(path.parent, ablation)
    assert found.scores == {"caption/nats": 1.0} and found.chance == {"caption/nats": 3.0}
    assert (found.parameters, found.flops) == (7, 5)
    curve = found.curves["loss"]
    assert len(curve) == 34 and curve[0] == [30, round((1 + 1 / 2 + 1 / 3) / 3, 5)]
    assert curve[-1][0] == 1000
    assert "home" not in path.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fields": ["model.fusion=early"]},
            "late-1.json was trained otherwise .model.fusion=early",
        ),
        ({"config": "configs/coco.py:base"}, "is of configs/coco.py:base, not of"),
        ({"variant": "later"}, "late-1.json holds later-1"),
        ({"seed": 3}, "late-1.json holds late-3"),
        ({"scores": []}, "late-1.json is no kept result"),
        ({"flops": "many"}, "late-1.json is no kept result: could not convert"),
        ({"data": {"fingerprint": "g"}}, "late-1.json is of other data than .*early-0.json"),
        ({"data": {}}, "no kept result: it has no 'fingerprint'"),
    ],
)
def test_what_answers_another_question_is_refused(kept, changes, message):
    path = kept / "late-1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        read_kept(kept, ABLATION)


def test_variants_that_name_data_of_their_own_are_of_other_data(kept):
    for path in kept.glob("late-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": {"fingerprint": "g"}}))
    variants = dict(ABLATION.variants)
    other = replace(ABLATION, variants=variants | {"late": {**LATE, "data.dir": "runs/other"}})
    assert len(read_kept(kept, other)) == 10
    with pytest.raises(ValueError, match="late-1.json is of other data than .*late-0.json"):
        path = kept / "late-1.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": {"fingerprint": "h"}}))
        read_kept(kept, other)


def test_results_of_a_variant_that_there_was_are_refused(kept):
    (kept / "late-1.json").rename(kept / "later-1.json")
    content = json.loads((kept / "later-1.json").read_text()) | {"variant": "later"}
    (kept / "later-1.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no variant 'later' .early, late, never."):
        read_kept(kept, ABLATION)


def test_fields_of_a_whole_sweep_may_be_added(kept):
    for path in kept.glob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"fields": [*content["fields"], "train.b2=0.9"]}))
    assert len(read_kept(kept, ABLATION)) == 10


def test_a_score_that_was_switched_off_is_left_out(kept, capsys):
    asked = replace(
        ABLATION,
        variants={"early": {}, "late": LATE},
        scores=("caption/cider_d", "single_caption/text_to_image/recall_at_1"),
    )
    write_summary(asked, kept)
    assert "left out: no run has single_caption/text_to_image" in capsys.readouterr().out
    assert "recall_at_1" not in (kept / "table.md").read_text()
    with pytest.raises(ValueError, match="no run has any of the scores nothing"):
        write_summary(replace(asked, scores=("nothing",)), kept)


def test_a_score_that_no_run_has_is_an_error(kept):
    wrong = replace(ABLATION, variants={"early": {}, "late": LATE}, scores=("caption/ciderd",))
    with pytest.raises(ValueError, match="did you mean caption/cider_d"):
        summarise(wrong, read_kept(kept, ABLATION))


def test_tables_are_as_the_results():
    """Where this fails: python -m experiments.readme_tables."""
    assert readme_tables.update(readme_tables.PAGE, check=True) == 0


def test_every_ablation_that_is_kept_is_on_the_page():
    kept = {path.parent.name for path in RESULTS.glob("*/*-*.json")}
    markers = readme_tables.BLOCK.findall(readme_tables.PAGE.read_text())
    shown = {said.partition(" ")[2] or said.removesuffix(".py") for _, said, _, _ in markers}
    assert kept == shown


OURS = sorted(readme_tables.ABLATIONS.glob("[!_]*.py"))


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_every_ablation_has_been_carried_out(path):
    """Each variant of each question, with two seeds at least and those of its base among them."""
    name, ablation = load_ablation(str(path))
    seeds = {variant: set() for variant in ablation.all_variants()}
    for result in read_kept(RESULTS / name, ablation):
        seeds[result.variant].add(result.seed)
    for variant, found in seeds.items():
        assert len(found) >= 2 and found <= seeds[ablation.base], variant


def test_a_stale_table_is_said_and_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readme_tables, "table_of", lambda said, results: f"new {said}\n")
    page = tmp_path / "RESULTS.md"
    page.write_text("a\n<!-- table: f.py x -->\nold\n<!-- end of table -->\nb\n")
    assert readme_tables.update(page, check=True) == 1
    assert "stale: f.py x" in capsys.readouterr().out
    assert readme_tables.update(page, check=False) == 0
    assert page.read_text() == "a\n<!-- table: f.py x -->\nnew f.py x\n<!-- end of table -->\nb\n"
    assert readme_tables.update(page, check=True) == 0
    twice = "<!-- table: f.py -->\n{}\n<!-- end of table -->\n"
    page.write_text(twice.format("old") + twice.format("new f.py"))
    assert readme_tables.update(page, check=True) == 1
    for text in ("<!-- table: f.py -->\n", "<!--table: f.py -->\nx\n<!-- end of table -->\n"):
        page.write_text(text)
        with pytest.raises(ValueError, match="ends with <!-- end of table -->: there is one"):
            readme_tables.update(page, check=True)
