"""Foils as hard negatives of contrast: the loss written out, what draws them, and what stays."""

import dataclasses
import json
import shutil
from pathlib import Path

import commands
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.data.listing import Foil
from unified_mm.data.manifest import from_json, to_json, with_foils
from unified_mm.data.pipeline import training_batches
from unified_mm.data.records import Manifest, Record, Text
from unified_mm.objectives.contrastive import FOIL, Contrastive, Foiled
from unified_mm.objectives.pair_losses import LOSSES, PairLoss, compare_all
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import rule_items, to_global
from unified_mm.training.notices import foils_line
from unified_mm.training.optimizer import make_optimizer
from unified_mm.training.sizes import measure_sizes
from unified_mm.training.step import gradients

COCO = f"--config={Path(__file__).parents[2] / 'configs' / 'coco.py'}:tiny"


def written_out(logits, of_foils, loss):
    """Either loss of each row; a row's own foil has the logit `of_foils`, NaN for none."""
    losses = []
    for i, foil in enumerate(of_foils):
        own, more = logits[i, i], [] if np.isnan(foil) else [foil]
        if loss == "softmax":
            to_text = np.log(np.exp([*logits[i], *more]).sum()) - own
            losses.append((to_text + np.log(np.exp(logits[:, i]).sum()) - own) / 2)
        else:
            wrong = [*np.delete(logits[i], i), *more]
            losses.append(np.log1p(np.exp(-own)) + np.log1p(np.exp(wrong)).sum())
    return np.array(losses)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_foil_is_one_more_wrong_column_of_its_own_row(loss, chunk):
    rng = np.random.default_rng(0)
    rows, columns, foils = rng.normal(size=(3, 6, 4)).astype(np.float32)
    paired = np.array([True, True, False, True, True, True])
    there = np.array([True, False, True, True, False, True])
    scale, bias = jnp.float32(2.0), jnp.float32(-0.5)

    def compared(rows, columns, foils, there):
        return compare_all(
            rows, columns, scale, bias, jnp.asarray(paired),
            loss=LOSSES[loss], chunk=chunk, foils=(foils, jnp.asarray(there)),
        )  # fmt: skip

    arrays = [jnp.asarray(each) for each in (rows, columns, foils)]
    found, right = compared(*arrays, jnp.asarray(there))
    logits = 2.0 * rows.astype(np.float64) @ columns.T - 0.5
    of_foils = np.where(there, 2.0 * (rows.astype(np.float64) * foils).sum(1) - 0.5, np.nan)
    expected = written_out(logits[np.ix_(paired, paired)], of_foils[paired], loss)
    np.testing.assert_allclose(found[paired], expected, rtol=1e-5)

    plain = compare_all(*arrays[:2], scale, bias, jnp.asarray(paired), loss=LOSSES[loss])
    np.testing.assert_array_equal(right, plain[1])
    none, _ = compared(*arrays, jnp.zeros(6, bool))
    np.testing.assert_allclose(none, plain[0], rtol=1e-6)

    pull = jax.grad(lambda x: jnp.where(paired, compared(*arrays[:2], x, there)[0], 0.0).sum())
    moved = np.abs(pull(arrays[2])).max(1) > 0
    np.testing.assert_array_equal(moved, paired & there)


def with_foils_of(task, size=6, seed=0):
    """A batch of whole examples, of which the second has no foil and the third no caption."""
    batch = tiny.batch(task, size, seed)
    other = tiny.batch(task, size, seed + 1)["text"]
    other["present"] = other["present"].at[1].set(False)
    batch["text"]["prompted"] = batch["text"]["prompted"].at[2].set(True)
    return batch, {name: other[key] for key, name in FOIL.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"model__fusion": "early", "objectives__matching__weight": 1.0},
        {"model__fusion": "gated_cross_attention", "model__cross__start": 0.3},
        {"model__fusion": "late", "objectives__captioning__weight": 0.0},
    ],
    ids=["early", "gated", "late"],
)
def test_the_loss_is_that_of_the_embeddings_and_nothing_else_changes(changes):
    changes = {"objectives__matching__weight": 0.0} | changes
    task = tiny.task(**changes, objectives__contrastive__foils=True)
    params = tiny.params(task)
    batch, foils = with_foils_of(task)
    several = {**batch, "text": batch["text"] | foils}

    @jax.jit
    def run(params):
        key = jax.random.key(0)
        each = [task.metrics(params, b, key, deterministic=False) for b in (several, batch)]
        texts = {"text": batch["text"]}, {"text": {key: foils[n] for key, n in FOIL.items()}}
        return each, [
            task.embed(params, {"image": batch["image"]}, "image"),
            *(task.embed(params, text, "text") for text in texts),
        ]

    (found, plain), vectors = run(params)
    for name in plain:
        if name != "contrastive/loss":
            np.testing.assert_allclose(found[name], plain[name], rtol=1e-6, err_msg=name)
    images, texts, false = (np.asarray(each, np.float64)[[0, 1, 3, 4, 5]] for each in vectors)
    scale = np.exp(float(params["heads_contrastive"]["log_scale"]))
    of_foils = scale * (images * false).sum(1)
    of_foils[1] = np.nan
    expected = written_out(scale * images @ texts.T, of_foils, "softmax")
    np.testing.assert_allclose(found["contrastive/loss"], (expected.sum(), 5), rtol=1e-4)
    nearer = ((images * texts).sum(1) > (images * false).sum(1))[~np.isnan(of_foils)]
    assert [float(x) for x in found["contrastive/foil_accuracy"]] == [nearer.sum(), 4]
    assert [float(x) for x in found["contrastive/with_foil"]] == [4, 5]
    assert set(found) - set(plain) == {"contrastive/foil_accuracy", "contrastive/with_foil"}


def test_micro_batches_and_devices_have_the_gradient_of_the_whole_batch():
    task = tiny.task(
        model__fusion="late",
        objectives__matching__weight=0.0,
        objectives__captioning__weight=0.0,
        objectives__contrastive__foils=True,
    )
    params = tiny.params(task)
    batch, foils = with_foils_of(task, 8)
    batch = {**batch, "text": batch["text"] | foils}
    optimizer = make_optimizer(Config(tiny.config_dict().to_dict()).train, 4, params)

    def run(batch, parts):
        one = lambda p, b: gradients(task, optimizer, p, b, jax.random.key(0), parts)  # noqa: E731
        return jax.jit(one)(params, batch)

    mesh = make_mesh({"data": 4}, jax.devices()[:4])
    whole = run(batch, 1)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        spread = run(to_global(jax.tree.map(np.asarray, batch), mesh), 1)
    total, gradient, _ = whole
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for loss, found, _ in (spread, run(batch, 2)):
        np.testing.assert_allclose(loss, total, rtol=1e-5)
        for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * size)


CAPTIONS = ("a red square of size 1", "red, size 1")
FALSE = ("a blue square of size 1", "a green square of size 1")


def record(number, foils=(), texts=CAPTIONS):
    texts = tuple(Text("", each) for each in texts)
    return Record(number, {}, texts, True, foils=tuple((CAPTIONS[0], each) for each in foils))


def test_texts_stay_as_they_are_drawn_and_their_foils_are_of_them():
    task = tiny.task(objectives__contrastive__foils=True)
    text = task.modalities["text"]
    preparer = task.preparers()["text"]
    assert preparer == Foiled(text) and tiny.task().preparers()["text"] == text
    rows = [record(0, FALSE), record(1), dataclasses.replace(record(2, FALSE), texts=())]

    def batches(preparer, **changes):
        found = training_batches(rows, {"text": preparer}, seed=3, batch_size=48, **changes)
        with_each = [next(found)["text"] for _ in range(2)]
        found.close()
        return with_each

    told, plain = batches(preparer), batches(text)
    for one, other in zip(told, plain, strict=True):
        assert set(one) == {*other, *FOIL.values()}
        for key in other:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    (later, _), again = batches(preparer, start_step=1), batches(preparer, threads=1)
    for key in told[0]:
        np.testing.assert_array_equal(told[1][key], later[key])
        np.testing.assert_array_equal(told[0][key], again[0][key])

    false = [text.encode("", each)["ids"].tolist() for each in FALSE]
    caption = text.encode("", CAPTIONS[0])["ids"]
    (first, _), seen = told, set()
    for row in range(48):
        drawn = (first["ids"][row] == caption).all() and first["present"][row]
        if first[FOIL["present"]][row]:
            assert drawn
            seen.add(false.index(first[FOIL["ids"]][row].tolist()))
        else:
            assert not first[FOIL["ids"]][row].any() and not first[FOIL["valid"]][row].any()
    assert seen == {0, 1}
    assert preparer.prepare(rows[0], None)[FOIL["ids"]].tolist() == false[0]


def test_a_question_has_no_foil_and_nor_has_a_caption_cut_before_it_becomes_false():
    task = tiny.task()
    preparer = Foiled(task.modalities["text"])
    asked = dataclasses.replace(record(0, FALSE), texts=(Text("what?", CAPTIONS[0]),))
    assert not preparer.prepare(asked, None)[FOIL["present"]]
    long = " ".join(["a red square of size 1"] * 4)
    cut = Record(0, {}, (Text("", f"{long} left"),), True, foils=((f"{long} left", f"{long} up"),))
    assert not preparer.prepare(cut, None)[FOIL["present"]]


def test_what_is_no_foil_is_named_and_the_fingerprint_tells():
    train = Manifest("train", (record(0), record(1)), "tests", "folder", "f" * 64)
    foils = [
        Foil(0, f" {CAPTIONS[0]}", FALSE[0], "colour"),
        Foil(0, "a red cube", FALSE[0], "colour"),
        Foil(1, CAPTIONS[0], CAPTIONS[1], "colour"),
        Foil(1, CAPTIONS[0], " ", "colour"),
        Foil(7, CAPTIONS[0], FALSE[0], "left out with its image"),
    ]
    found = with_foils(train, foils)
    assert [each.foils for each in found.records] == [((CAPTIONS[0], FALSE[0]),), ()]
    assert [(each.file, each.what) for each in found.problems] == [
        ("foil 1", "foil of a caption that its example has not"),
        ("foil 2", "foil that is a caption of its example"),
        ("foil 3", "empty foil"),
    ]
    assert len({each.fingerprint for each in (train, found, with_foils(train, foils[1:]))}) == 3
    line = foils_line(tiny.task(objectives__contrastive__foils=True), found)
    assert line.startswith("75.0% of 4 training captions have no foil for objectives.contrastive")
    assert foils_line(tiny.task(), train) == ""
    # Caches of manifests are written before there are foils, and stay as they were.
    assert "foils" not in to_json(train) and from_json(to_json(train), {}) == train


def test_what_cannot_have_foils_is_refused(monkeypatch):
    for between in ("image,audio", "text"):
        with pytest.raises(ValueError, match="foils=True, but .* holds nothing against a text"):
            Contrastive("c", between=between, foils=True)
    lone = PairLoss(0.0, LOSSES["sigmoid"].part, LOSSES["sigmoid"].finish, 1.0)
    monkeypatch.setitem(LOSSES, "lone", lone)
    with pytest.raises(ValueError, match="foils=True, but its loss 'lone' has no `foil`"):
        Contrastive("c", loss="lone", foils=True).head()
    assert Contrastive("c", loss="lone").head() is not None


def test_the_foil_is_counted_as_one_more_text():
    def flops(**changes):
        off = {"objectives__matching__weight": 0.0, "objectives__captioning__weight": 0.0}
        fields = tiny.config_dict(model__fusion="late", **off, **changes).to_dict()
        return measure_sizes(Config(fields)).training_flops

    # The tower of texts is run once more, that of images is not.
    plain = flops()
    assert plain < flops(objectives__contrastive__foils=True) < 2 * plain


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_coco(tmp_path_factory.mktemp("data") / "coco")


def arguments(data, workdir, *more):
    return (
        COCO,
        *commands.SMALL,
        "--config.model.fusion=late",
        "--config.objectives.matching.weight=0.0",
        "--config.objectives.captioning.weight=0.0",
        "--config.objectives.contrastive.foils=True",
        f"--config.data.dir={data}",
        f"--workdir={workdir}",
        *more,
    )


def test_a_run_says_what_has_no_foil_and_goes_on_in_the_same_bits(data, tmp_path, capsys):
    assert commands.run(*arguments(data, tmp_path / "none")) == 1
    said = "".join(capsys.readouterr())
    assert "foils=True, but no caption of 'train' in" in said and "foils_train.json" in said

    listed = json.loads((data / "annotations" / "captions_train.json").read_text())["annotations"]
    foils = [
        {**each, "foil": each["caption"].replace("size", "height"), "kind": "word"}
        for each in listed
        if each["id"] % 4
    ]
    path = data / "annotations" / "foils_train.json"
    path.write_text(json.dumps(foils))
    commands.train(*arguments(data, tmp_path / "run"))
    assert "25.0% of 48 training captions have no foil" in "".join(capsys.readouterr())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(lines[-1])["contrastive/with_foil"] <= 1

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    commands.train(*arguments(data, tmp_path / "again"))
    assert "resuming at step 2 of 4" in "".join(capsys.readouterr())
    again = (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
    for one, other in zip(map(json.loads, lines), map(json.loads, again), strict=True):
        for name in ("step", "loss", "gradient_norm", "contrastive/foil_accuracy"):
            assert one[name] == other[name], name
    path.unlink()
