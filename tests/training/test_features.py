"""Frozen towers are computed once: the same numbers, kept, found again, and mended."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.data.pipeline import training_batches
from unified_mm.data.sources import open_source
from unified_mm.inference.loaded import one_device_mesh
from unified_mm.inference.predictor import Predictor
from unified_mm.objectives.classification import LABELS, Classification
from unified_mm.parallel.mesh import make_mesh
from unified_mm.training.features import (
    READ,
    STEM,
    TOWER,
    VALUES,
    Kept,
    computed,
    kept_in,
    kept_preparers,
    with_kept,
    write_features,
)
from unified_mm.training.optimizer import adaptive_clip
from unified_mm.training.phases import Rows, refuse_nothing_kept

SMALL_STEM = {
    "model__modalities__image__stem": "nfnet",
    "model__modalities__image__stem_options": {"channels": (4,), "blocks": (1,)},
    "model__modalities__image__patch": 4,
}
CHANGES = {
    "data__views": 2,
    "model__fusion": "late",
    "objectives__matching__weight": 0.0,
    "objectives__captioning__weight": 0.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_coco(tmp_path_factory.mktemp("data") / "coco", train=6)


@dataclass(frozen=True)
class Stretch:
    """Of a phase, what the computation of features reads."""

    task: object
    rows: Rows


def begun(data, cache, frozen, mesh=None, **changes):
    """A stretch of training with features that are not computed yet, and what else that takes."""
    changes |= {**CHANGES, "data__dir": str(data), "data__cache_dir": str(cache)}
    config = Config(tiny.config_dict(**changes).to_dict())
    task = tiny.task(**changes)
    params = tiny.params(task)
    trained = jax.tree_util.tree_map_with_path(
        lambda path, _: not any(part in jax.tree_util.keystr(path) for part in frozen), params
    )
    manifest = open_source(config.data).manifest("train")
    kept = kept_preparers(task, manifest.records, params, trained)
    rows = Rows(manifest.records, {**task.modalities, **kept}, manifest.fingerprint)
    predictor = Predictor(task, None, mesh or one_device_mesh())

    def compute(params=params, say=lambda line: None):
        return computed(Stretch(task, rows), params, predictor, config.data, False, say).rows

    return task, params, rows, compute


def first(rows, preparers):
    batches = training_batches(rows.examples, preparers, seed=3, batch_size=16)
    batch = next(batches)
    batches.close()
    (name,) = preparers
    return jax.tree.map(jnp.asarray, batch[name])


@pytest.mark.parametrize(
    ("frozen", "key", "more"),
    (
        (("['stem']",), STEM, SMALL_STEM),
        (("embedders_image", "towers_image"), TOWER, {}),
    ),
)
def test_features_are_what_the_frozen_part_makes_of_the_same_views(
    frozen, key, more, data, tmp_path
):
    task, params, rows, compute = begun(data, tmp_path, frozen, **more)
    assert rows.preparers["image"].key == key
    kept = first(rows, {"image": compute().preparers["image"]})
    seen = first(rows, {"image": task.modalities["image"]})
    assert key in kept and "pixels" in seen
    embed = jax.jit(lambda arrays: task.embed(params, {"image": arrays}, "image"))
    np.testing.assert_allclose(embed(kept), embed(seen), atol=1e-5)
    # Six examples have twelve views, each of them met again.
    assert 6 < len(np.unique(np.asarray(kept[key]).reshape(16, -1), axis=0)) <= 12


def test_texts_are_read_once_where_their_tower_is_frozen(data, tmp_path):
    task, params, rows, compute = begun(data, tmp_path, ("embedders_text", "['transformer']"))
    assert rows.preparers["text"].key == READ
    kept = first(rows, {"text": compute().preparers["text"]})
    seen = first(rows, {"text": task.modalities["text"]})
    image = first(rows, {"image": task.modalities["image"]})
    (contrast,) = task.objectives

    def encode(arrays, ids):
        batch = {"image": image, "text": arrays | {"ids": ids}}
        method = lambda model: model.encode(batch, contrast.views())  # noqa: E731
        return task.model.apply({"params": params}, method=method)[contrast.name].text

    read = encode(seen, seen["ids"])
    # The words are there for whoever compares them, and are not read again.
    np.testing.assert_allclose(encode(kept, seen["ids"] * 0), read, atol=1e-5)
    assert not np.allclose(encode(seen, seen["ids"] * 0), read, atol=1e-2)
    for key in ("ids", "valid", "scored", "present"):
        np.testing.assert_array_equal(kept[key], seen[key])


def test_texts_with_foils_are_read_in_every_step(data, tmp_path):
    more = {"objectives__contrastive__foils": True}
    task, _, rows, _ = begun(data, tmp_path, ("embedders_text", "['transformer']"), **more)
    assert rows.preparers["text"] is task.modalities["text"]


def test_labels_are_added_to_features_too(data, tmp_path):
    task, _, rows, compute = begun(data, tmp_path, ("['stem']",), **SMALL_STEM)
    classes = Classification(name="classification", classes=("cat", "dog"), of="image")
    modality, kept = task.modalities["image"], rows.preparers["image"]
    labelled = with_kept(classes.preparer(modality, rows.examples), modality, kept)
    assert kept_in(labelled) is kept and kept_in(modality) is None
    rows.preparers["image"] = labelled
    found = compute().preparers["image"]
    record = replace(rows.examples[0], labels=("dog",))
    arrays = found.prepare(record, np.random.default_rng(0))
    assert STEM in arrays and arrays[LABELS].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="prepares image in a way of its own"):
        with_kept(object(), modality, kept)


def test_a_run_that_is_to_end_while_features_are_computed_leaves_nothing(data, tmp_path):
    task, params, rows, _ = begun(data, tmp_path, ("['stem']",), **SMALL_STEM)
    batches = []

    def leave():
        batches.append(1)
        raise SystemExit(143)

    kept, predictor = rows.preparers["image"], Predictor(task, params, one_device_mesh())
    with pytest.raises(SystemExit):
        write_features(kept, rows.examples, task, predictor, False, leave)(tmp_path / "made")
    assert len(batches) == 1 and not list(tmp_path.glob("*made*"))


def test_features_are_found_again_and_a_damaged_file_is_made_again(data, tmp_path):
    _, params, _, compute = begun(data, tmp_path, ("['stem']",), **SMALL_STEM)
    said = []
    folder = Path(compute(say=said.append).preparers["image"].folder)
    assert len(said) == 1 and said[0].startswith(
        "features of 12 views of image: computed once (0 MB"
    )
    whole = (folder / VALUES).read_bytes()
    assert compute(say=said.append).preparers["image"].folder == str(folder) and len(said) == 1
    (folder / VALUES).write_bytes(whole[:-1] + b"!")
    compute(say=said.append)
    assert f"{VALUES}): it is made again" in said[1] and (folder / VALUES).read_bytes() == whole
    others = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    assert compute(others).preparers["image"].folder != str(folder)


def test_features_are_found_again_however_the_folder_is_given(data, tmp_path, monkeypatch):
    folders = []
    monkeypatch.chdir(data.parent)
    for given in (data, data.name):
        *_, compute = begun(Path(given), tmp_path, ("['stem']",), **SMALL_STEM)
        folders.append(compute().preparers["image"].folder)
    assert folders[0] == folders[1]


def test_a_picture_has_the_same_features_under_another_caption(data, tmp_path):
    """But not where the caption decides whether it may be mirrored."""
    other = tmp_path / "other"
    (other / "annotations").mkdir(parents=True)
    (other / "images").symlink_to(data / "images")
    captions = Path("annotations") / "captions_train.json"
    folders = []
    for word in ("square", "box", "thing on the left"):
        (other / captions).write_text((data / captions).read_text().replace("square", word))
        (other / "annotations" / "captions_val.json").write_text("{}")
        *_, compute = begun(other, tmp_path / "cache", ("['stem']",), **SMALL_STEM)
        folders.append(compute().preparers["image"].folder)
    assert folders[0] == folders[1] != folders[2]


def test_places_make_other_features(data, tmp_path):
    found = [
        begun(data, tmp_path, ("embedders_image", "towers_image"), model__places=places)[3]()
        for places in ("", "sines")
    ]
    folders = [each.preparers["image"].folder for each in found]
    assert all(folders) and folders[0] != folders[1]


def test_any_number_of_devices_computes_them(data, tmp_path):
    found = []
    for name, mesh in (("one", None), ("three", make_mesh({"data": 3}, jax.devices()[:3]))):
        *_, compute = begun(data, tmp_path / name, ("['stem']",), mesh, **SMALL_STEM)
        found.append(np.fromfile(Path(compute().preparers["image"].folder) / VALUES, np.float32))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_what_is_trained_or_has_ever_new_views_is_not_kept(data, tmp_path):
    kinds = {
        "trained": begun(data, tmp_path, (), **SMALL_STEM),
        "in part": begun(data, tmp_path, ("towers_image",)),
        "beside places that are": begun(
            data, tmp_path, ("embedders_image", "towers_image"), model__places="fourier"
        ),
        "with experts": begun(
            data, tmp_path, ("text", "'transformer'"), model__feed_forward_type="experts"
        ),
    }
    for _, _, rows, _ in kinds.values():
        assert not any(isinstance(each, Kept) for each in rows.preparers.values())
    config = Config(tiny.config_dict(data__keep_features=True).to_dict())
    with pytest.raises(ValueError, match="nothing to keep: it needs a phase of pairs"):
        refuse_nothing_kept(config, [])


def test_views_are_known_by_example_and_number(data):
    config = tiny.config_dict(**CHANGES, data__dir=str(data))
    modality = tiny.task(**CHANGES).modalities["image"]
    record = open_source(config.data).manifest("train").records[0]
    views = [modality.prepare_view(record, number)["pixels"] for number in range(2)]
    assert not np.array_equal(*views)
    drawn = [modality.prepare(record, np.random.default_rng(i))["pixels"] for i in range(9)]
    assert all(any(np.array_equal(view, known) for known in views) for view in drawn)
    other = replace(modality, view_seed=1).prepare_view(record, 0)["pixels"]
    assert not np.array_equal(other, views[0])


def test_adaptive_clipping_is_of_stems_alone():
    leaf = {"kernel": jnp.ones((3, 2))}
    params = {"embedders_image": {"stem": leaf, "patches": leaf}}
    (clip,) = adaptive_clip(0.01)
    found, _ = clip.update(params, clip.init(params), params)
    np.testing.assert_allclose(found["embedders_image"]["stem"]["kernel"], 0.01, rtol=1e-5)
    np.testing.assert_array_equal(found["embedders_image"]["patches"]["kernel"], 1)
    assert adaptive_clip(0.0) == []


@pytest.mark.slow
def test_a_run_with_kept_features_has_the_scores_of_one_without(data, tmp_path):
    scores = []
    for kept in (True, False):
        arguments = (
            f"--config={Path(__file__).parents[1] / 'stem_recipe.py'}",
            *commands.SHRUNK,
            f"--config.data.dir={data}",
            f"--config.data.cache_dir={tmp_path / 'cache'}",
            f"--config.data.keep_features={kept}",
            f"--workdir={tmp_path / str(kept)}",
        )
        assert commands.run(*arguments) == 0
        scores.append(json.loads((tmp_path / str(kept) / "result.json").read_text())["scores"])
    assert list(scores[0]) == list(scores[1])
    np.testing.assert_allclose(*(list(each.values()) for each in scores), atol=1e-5)
