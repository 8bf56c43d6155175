"""The world on disk: COCO's layout, the same bytes every time, whole or not there at all."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from unified_mm.data import coco
from unified_mm.world import build
from unified_mm.world.build import ensure_world
from unified_mm.world.render import render
from unified_mm.world.scenes import WorldSpec, sample_scene

SPEC = WorldSpec(image_size=32, train=9, val=6, test_composition=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return ensure_world(SPEC, tmp_path_factory.mktemp("cache"), processes=1)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_coco_reader_reads_it(world):
    assert set(coco.find_splits(world)) == {"train", "val", "test_composition"}
    for split in ("train", "val", "test_composition"):
        captions = coco.read_captions(world, split)
        assert captions.directional and not captions.problems
        assert len(captions.entries) == SPEC.count(split)
        assert all(len(set(entry.captions)) == 5 for entry in captions.entries)
        assert coco.has_foils(world, split) == (split != "train")
    for split in ("val", "test_composition"):
        said = {e.id: e.captions for e in coco.read_captions(world, split).entries}
        foils = coco.read_foils(world, split)
        assert len(foils) == 2 * SPEC.count(split)
        assert all(foil.caption in said[foil.image_id] for foil in foils)


def test_questions_are_in_vqas_layout(world):
    asked = coco.read_questions(world, "train")
    assert asked and all(set(each.answers) == {each.answer} for each in asked)
    assert all(len(each.answers) == 10 for each in asked)
    known = {entry.id for entry in coco.read_captions(world, "train").entries}
    assert {each.image_id for each in asked} <= known
    kinds = {"is there": "yes/no", "how many": "number"}
    assert all(kinds.get(q.question_type, "other") == q.answer_type for q in asked)


def test_pictures_are_the_rendered_scenes(world):
    for number, entry in enumerate(coco.read_captions(world, "val").entries):
        picture = np.asarray(Image.open(entry.image))
        expected = render(sample_scene(SPEC, "val", number), 32, SPEC.supersample)
        assert picture.shape == (32, 32, 3)
        assert abs(picture.astype(int) - expected).mean() < 4  # JPEG at quality 95


def test_scene_graphs_tell_what_was_drawn(world):
    graphs = json.loads((world / "annotations" / "scenes_val.json").read_text())["scenes"]
    for number, graph in enumerate(graphs):
        scene = sample_scene(SPEC, "val", number)
        assert graph["image_id"] == scene.id
        assert [each["colour"] for each in graph["objects"]] == [o.colour for o in scene.objects]
        sides = [graph["objects"][i]["image"][0] for i in graph["left_to_right"]]
        depths = [graph["objects"][i]["image"][2] for i in graph["near_to_far"]]
        assert sides == sorted(sides) and depths == sorted(depths)


def test_processes_do_not_change_a_byte(world, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CHUNK", 4)
    again = ensure_world(SPEC, tmp_path, processes=2, progress=False)
    assert again.name == world.name
    assert contents(again) == contents(world)


def test_a_world_that_is_there_is_reused_and_another_spec_is_another_world(world, monkeypatch):
    def never(*_):
        raise AssertionError("rendered again")

    monkeypatch.setattr(build, "_write_world", never)
    assert ensure_world(SPEC, world.parent) == world
    with pytest.raises(AssertionError, match="rendered again"):
        ensure_world(replace(SPEC, seed=1), world.parent)


def test_a_world_without_its_annotations_says_which_folder_to_delete(tmp_path):
    folder = ensure_world(replace(SPEC, seed=2, train=4), tmp_path, processes=1, progress=False)
    (folder / "annotations" / "captions_val.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder} has lost .*captions_val.*delete"):
        ensure_world(replace(SPEC, seed=2, train=4), tmp_path)


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ensure_world(SPEC, tmp_path, processes=1)
    assert list(tmp_path.iterdir()) == []


def test_of_two_builders_at_once_one_wins_and_both_have_the_world(world, tmp_path, monkeypatch):
    write, both_done = build._write_world, threading.Barrier(2, timeout=60)

    def write_then_wait(*arguments):
        write(*arguments)
        both_done.wait()  # now both are about to give their folder its name

    monkeypatch.setattr(build, "_write_world", write_then_wait)
    got = []
    builders = [
        threading.Thread(target=lambda: got.append(ensure_world(SPEC, tmp_path, processes=1)))
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert got == [tmp_path / world.name] * 2
    assert list(tmp_path.iterdir()) == got[:1]
    assert contents(got[0]) == contents(world)


def test_what_killed_builds_left_is_cleared_after_a_day(tmp_path):
    old, young = tmp_path / ".world-a.1", tmp_path / ".world-b.2"
    for folder in (old, young):
        (folder / "images").mkdir(parents=True)
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    ensure_world(replace(SPEC, train=1, val=1, test_composition=1), tmp_path, processes=1)
    assert not old.exists() and young.exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_build_counts_for_nothing(tmp_path, processes):
    spec = replace(SPEC, train=300)
    program = (
        "from pathlib import Path\n"
        "from unified_mm.world.build import ensure_world\n"
        "from unified_mm.world.scenes import WorldSpec\n"
        "if __name__ == '__main__':\n"
        f"    ensure_world({spec!r}, Path('cache'), processes={processes})\n"
    )
    (tmp_path / "program.py").write_text(program)
    builder = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 60
    while len(list(tmp_path.rglob("*.jpg"))) < 70:
        assert builder.poll() is None and time.time() < deadline
        time.sleep(0.02)
    builder.send_signal(signal.SIGKILL)  # the builder alone: its workers find out for themselves
    builder.wait()

    cache = tmp_path / "cache"
    assert not list(cache.glob("world-*"))
    assert wait_until(lambda: not group_lives(builder.pid)), "workers outlive their builder"
    whole = ensure_world(spec, cache, processes=1)
    assert len(list((whole / "images" / "train").iterdir())) == 300
    assert len(coco.read_captions(whole, "train").entries) == 300


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=20):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.05)
    return condition()


UNGUARDED = f"""
from pathlib import Path
from unified_mm.world.build import ensure_world
from unified_mm.world.scenes import WorldSpec
ensure_world({replace(SPEC, train=130)!r}, Path("cache"), processes=2)
"""


@pytest.mark.parametrize("piped", [True, False])
def test_a_script_that_no_process_can_import_is_told_so(tmp_path, piped):
    """A pool that started others in place of those that cannot begin would go on for ever."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, *([] if piped else ["script.py"])],
        input=UNGUARDED if piped else "", cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "has ended by itself" in done.stderr
    assert not list(tmp_path.glob("cache/world-*"))
