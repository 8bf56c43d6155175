"""Points as tokens: groups, what is padding, the order that is none, in every fusion."""

import functools
import io
import json
import shutil
from dataclasses import replace

import commands
import flax.linen as nn
import jax
import jax.numpy as jnp
import live_server
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from unified_mm.config import Config
from unified_mm.data import shapes
from unified_mm.data.pipeline import training_batches
from unified_mm.data.records import Record
from unified_mm.inference.loaded import LoadedModel, one_device_mesh
from unified_mm.modalities.points import centres_and_nearest, in_order
from unified_mm.objectives.classification import LABELS
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import rule_items, to_global
from unified_mm.search.index_writer import write_index
from unified_mm.search.items import read_items
from unified_mm.search.search_index import SearchIndex
from unified_mm.task import build_task
from unified_mm.world.solids import CLASSES, solid

TINY = {"type": "points", "points": 24, "groups": 6, "group": 4, "hidden": 8, "colours": True}


def config_of(fusion="early", **options):
    config = tiny.config_dict(
        model__fusion=fusion,
        objectives__matching__weight=0.0,
        objectives__captioning__weight=float(fusion != "late"),
        objectives__classification__weight=1.0,
        objectives__classification__of="points",
        objectives__classification__classes=("big", "small"),
        objectives__contrastive__between="image,points,text",
    )
    if fusion == "gated_cross_attention":
        config.model.cross.start = 0.3  # open gates, or nothing behind them would be seen
    config.model.modalities.points = {**TINY, "unit": 2.0, **options}
    return config


@functools.cache
def task_of(fusion="early"):
    return build_task(Config(config_of(fusion).to_dict()), tiny.tokenizer())


def points_of(**changes):
    return replace(task_of().modalities["points"], **changes)


def batch_of(size=4, seed=0):
    """The second cloud has ten points, the third three, the fourth is not there."""
    rng = np.random.default_rng(seed)
    length = np.resize(np.array([24, 10, 3, 0], np.int32), size)
    values = rng.normal(size=(size, 24, 6)).astype(np.float32) * rng.uniform(0.5, 9, (size, 1, 1))
    values[:, :, 3:] = rng.uniform(size=(size, 24, 3))
    batch = tiny.batch(task_of(), size)
    batch["points"] = {
        "points": values * (np.arange(24) < length[:, None])[..., None],
        "length": length,
        "present": length > 0,
        LABELS: np.eye(2, dtype=np.float32)[np.arange(size) % 2],
    }
    return jax.tree.map(jnp.asarray, batch)


def embedded(task, params, batch):
    return task.model.apply(
        {"params": params}, method=lambda model: model.embedders["points"](batch["points"])
    )


def test_centres_are_the_farthest_and_groups_the_nearest():
    """Against the definition, one by one."""
    rng = np.random.default_rng(0)
    places = rng.integers(-2, 3, (3, 24, 3)).astype(np.float32)  # many ties
    there = np.arange(24) < np.array([24, 9, 5])[:, None]
    ordered = np.asarray(in_order(jnp.asarray(places), jnp.asarray(there)))
    found = centres_and_nearest(jnp.asarray(ordered), jnp.asarray(there), 6, 4)
    centre, near, real = map(np.asarray, found)
    for row, count in enumerate([24, 9, 5]):
        own = ordered[row, :count]
        assert own.tolist() == sorted(places[row, :count].tolist())
        squares = ((own[:, None] - own) ** 2).sum(-1)
        chosen = [int(((own - own.mean(0)) ** 2).sum(-1).argmax())]
        while len(chosen) < min(6, count):
            chosen.append(int(squares[chosen].min(0).argmax()))
        assert centre[row, : len(chosen)].tolist() == chosen
        for token, each in enumerate(chosen):
            expected = np.argsort(squares[each], kind="stable")[:4]
            assert near[row, token][real[row, token]].tolist() == expected.tolist()


def test_the_order_of_points_changes_nothing():
    """Nor do other numbers of points at equal places, as a cloud on a lattice has them."""
    task, batch = task_of(), batch_of()
    params = tiny.params(task)
    lattice = jnp.round(batch["points"]["points"][:, :, :3])
    given = batch["points"]["points"].at[:, :, :3].set(lattice)
    shuffled = np.asarray(given).copy()
    rng = np.random.default_rng(1)
    for row, length in enumerate([24, 10, 3]):
        shuffled[row, :length] = rng.permutation(shuffled[row, :length])
    assert np.abs(shuffled - np.asarray(given)).max() > 0.5
    run = jax.jit(lambda values: embedded(task, params, _with(batch, points=values)))
    one, other = run(given), run(jnp.asarray(shuffled))
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-5)
    np.testing.assert_array_equal(one.metadata.coords, other.metadata.coords)


def _with(batch, **changes):
    return {**batch, "points": {**batch["points"], **changes}}


def test_tokens_say_where_they_are_in_units_of_the_data():
    task, batch = task_of(), batch_of()
    tokens = jax.jit(functools.partial(embedded, task))(tiny.params(task), batch)
    assert tokens.embeddings.shape == (4, 6, 16)
    valid = np.asarray(tokens.metadata.valid)
    assert valid.sum(1).tolist() == [6, 6, 3, 0] and (np.diff(valid.astype(int)) <= 0).all()
    clouds = np.asarray(batch["points"]["points"])[..., :3]
    for row, length in enumerate([24, 10, 3]):
        own = set(map(tuple, clouds[row, :length].tolist()))
        assert set(map(tuple, np.asarray(tokens.metadata.coords)[row, valid[row]].tolist())) <= own
    assert not np.asarray(tokens.metadata.time).any()
    far = np.linalg.norm(clouds[0] - clouds[0].mean(0), axis=1).argmax()
    np.testing.assert_array_equal(tokens.metadata.coords[0, 0], clouds[0, far])


def test_the_size_of_a_shape_is_told():
    """Its groups are alike at twice the size, but for what tells that size."""
    task, batch = task_of(), batch_of()
    params = tiny.params(task)
    larger = batch["points"]["points"].at[..., :3].multiply(2.0)
    run = jax.jit(lambda params, values: embedded(task, params, _with(batch, points=values)))
    both = batch["points"]["points"], larger
    one, other = (run(params, values).embeddings for values in both)
    assert np.abs(one - other)[:3].max() > 1e-2
    mute = dict(params["embedders_points"])
    mute["place"] = jax.tree.map(jnp.zeros_like, mute["place"])
    one, other = (run({**params, "embedders_points": mute}, values) for values in both)
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-4)


@pytest.mark.parametrize(
    "fusion", ["early", pytest.param("gated_cross_attention", marks=pytest.mark.slow)]
)
def test_padding_and_what_is_absent_leak_nothing(fusion):
    """Not even where they are NaN, forward and backward."""
    task, batch = task_of(fusion), batch_of()
    params = tiny.params(task)
    beyond = jnp.arange(24) >= batch["points"]["length"][:, None]

    def loss(params, values):
        read = _with(batch, points=values)
        found = task.metrics(params, read, jax.random.key(0), deterministic=True)
        names = ("classification/loss", "contrastive/loss", "captioning/loss")
        return sum(found[name][0] for name in names), found

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    values = batch["points"]["points"]
    (clean, found), _ = run(params, values)
    assert found["classification/loss"][1] == 3
    assert found["contrastive/loss_points_text"][1] == 3
    broken = jnp.where(beyond[..., None], jnp.nan, values)
    (dirty, _), (of_params, of_values) = run(params, broken)
    assert np.isfinite(clean) and float(clean) == float(dirty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))
    of_values = np.asarray(of_values)
    assert (of_values[np.asarray(beyond)] == 0).all() and np.abs(of_values[:3]).max() > 0
    for name in ("first", "tokens", "place"):
        assert np.abs(of_params["embedders_points"][name]["kernel"]).max() > 0


def test_eight_devices_read_each_their_own_clouds():
    """The tokens of one device, and nothing is sent between them on the way."""
    task, batch = task_of(), jax.tree.map(np.array, batch_of(8))
    drawn = tiny.drawn(task, 0)

    def read(params, points):
        tokens = embedded(task, params, {"points": points})
        return tokens.embeddings, tokens.metadata.coords

    def on(mesh):
        with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
            params = jax.device_put(drawn, NamedSharding(mesh, PartitionSpec()))
            run = jax.jit(read).lower(params, to_global(batch["points"], mesh)).compile()
            return jax.device_get(run(params, to_global(batch["points"], mesh))), run.as_text()

    one, _ = on(make_mesh({}, jax.devices()[:1]))
    eight, text = on(make_mesh({"data": 8}))
    for mine, theirs in zip(eight, one, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert "f32[1,24,6]" in text and "f32[8,24,6]" not in text
    assert not any(each in text for each in ("all-gather", "all-reduce", "all-to-all", "permute("))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two kinds of solids, small and large, a folder a class, and a list of titles."""
    folder = tmp_path_factory.mktemp("solids")
    lines = []
    for kind, size in (("big", 10.0), ("small", 1.0)):
        (folder / kind).mkdir()
        for number in range(20):
            points = solid(CLASSES[number % 6], number)[: 200 if number else 8] * size
            np.save(folder / kind / f"{number}.npy", points.astype(np.float32))
            title = f"a {kind} {CLASSES[number % 6]}"
            lines.append({"points": f"{kind}/{number}.npy", "text": title, "label": kind})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def records(folder):
    return [
        Record(str(file), {"points": str(file)}, (), True, (file.parent.name,))
        for file in sorted(folder.glob("*/*.npy"))
    ]


def test_batches_depend_on_seed_and_step_alone(folder):
    task = build_task(
        Config(config_of(turn=180.0, stretch=1.2, mirror=True).to_dict()), tiny.tokenizer()
    )
    read_from = records(folder)
    preparers = {"points": task.preparers(read_from)["points"]}

    def read(start, steps, **more):
        batches = training_batches(
            read_from, preparers, seed=3, batch_size=8, start_step=start, **more
        )
        found = [next(batches)["points"] for _ in range(steps)]
        batches.close()
        return found

    whole, later, threaded = read(0, 4), read(2, 2), read(0, 4, threads=4)
    for one, other in zip([*whole[2:], *whole], [*later, *threaded], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert {int(n) for each in whole for n in each["length"]} == {8, 24}


def test_training_moves_shapes_and_evaluation_does_not(folder):
    record = Record(0, {"points": str(folder / "big/0.npy")}, (), True)
    own = np.load(folder / "big/0.npy")
    still = points_of().prepare(record, None)["points"][:8, :3]
    np.testing.assert_array_equal(still, own)
    turned, large, mirrored = (
        points_of(**options).prepare(record, np.random.default_rng(3))["points"][:8, :3]
        for options in ({"turn": 90.0}, {"stretch": 2.0}, {"mirror": True})
    )
    np.testing.assert_allclose(turned[:, 2], own[:, 2], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(own, axis=1), 1e-5)
    assert np.abs(turned - own).max() > 0.1
    factors = large / own
    assert np.ptp(factors) < 1e-5 and 0.5 <= factors.min() <= 2 and abs(factors.min() - 1) > 0.01
    flips = {tuple(np.sign(mirrored[0] * own[0]))}
    for seed in range(8):
        moved = points_of(mirror=True).prepare(record, np.random.default_rng(seed))["points"]
        flips.add(tuple(np.sign(moved[0, :3] * own[0])))
        sided = points_of(mirror=True).prepare(
            replace(record, mirrorable=False), np.random.default_rng(seed)
        )
        np.testing.assert_allclose(sided["points"][:8, :3], own, rtol=1e-6)
    assert flips == {(1, 1, 1), (-1, 1, 1)}


def test_the_unit_is_the_mean_distance_from_the_centres(folder):
    chosen = records(folder)[:5]
    found = points_of(unit=0.0, points=200, colours=False).measure(chosen)["unit"]
    clouds = [np.load(each.parts["points"]) for each in chosen]
    expected = np.mean([np.linalg.norm(c - c.mean(0), axis=1).mean() for c in clouds])
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="unit=0: the command takes it from"):
        points_of(unit=0.0).embedder(8, jnp.float32)
    with pytest.raises(ValueError, match="points=24 cannot make .*groups=40"):
        build_task(Config(config_of(groups=40).to_dict()), tiny.tokenizer())


RECIPE = """
import tiny
from unified_mm.config import defaults_of
from unified_mm.modalities.points import PointsModality


def get_config():
    config = tiny.config_dict(data__source="solids", train__steps=6, train__learning_rate=1e-2)
    options = {"points": 24, "groups": 6, "group": 4, "hidden": 8, "turn": 180.0}
    given = {"type": "points", **defaults_of(PointsModality), **options}
    config.model.modalities = {"points": given, "text": config.model.modalities.text.to_dict()}
    config.objectives.captioning.weight = config.objectives.matching.weight = 0.0
    config.objectives.contrastive.between = "points"
    config.objectives.classification.update({"weight": 1.0, "of": "points"})
    return config
"""


@pytest.mark.slow
def test_a_run_is_scored_in_all_that_it_learns(folder, tmp_path):
    run, recipe = tmp_path / "run", tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    flags = (f"--config={recipe}", f"--config.data.dir={folder}", f"--workdir={run}")
    assert commands.run(*flags) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["objectives"]["classification"]["classes"] == ["big", "small"]
    assert config["model"]["modalities"]["points"]["unit"] > 0
    scores = json.loads((run / "result.json").read_text())["scores"]
    for name in ("classification/accuracy", "text_to_points/recall_at_1"):
        assert 0 <= scores[name] <= 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["classification/loss"] for line in lines if "classification/loss" in line]
    assert losses[-1] < losses[0]


def test_shapes_are_indexed_and_served(folder, tmp_path):
    """By the paths of any modality; an upload that would become too large is refused."""
    config, task = Config(config_of().to_dict()), task_of()
    model = LoadedModel(task, tiny.params(task), one_device_mesh(), config, 1)
    files = [folder / kind / f"{number}.npy" for kind in ("big", "small") for number in (1, 2)]
    expected = model.embed([str(file) for file in files], of="points")
    np.testing.assert_allclose(
        model.embed([file.read_bytes() for file in files], of="points"), expected, atol=1e-6
    )
    (tmp_path / "items").mkdir()
    for number, file in enumerate(files):
        shutil.copy(file, tmp_path / "items" / f"{number}.npy")
    (tmp_path / "items" / "bad.off").write_text("OFF\n8 1 0\n")
    items = read_items(tmp_path / "items", of="points", suffixes=shapes.SUFFIXES)
    write_index(model, items, tmp_path / "index", print)
    index = SearchIndex.open(tmp_path / "index")
    assert index.of == "points" and sorted(index.rows.names) == [f"{n}.npy" for n in range(4)]
    (problem,) = index.header["problems"]
    assert problem["file"] == "bad.off" and "cut short" in problem["what"]
    large = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 3)}
    np.lib.format.write_array_header_1_0(large, header)
    with live_server.Running(model, index=index) as running:
        asked = {"files": {"item": files[1].read_bytes()}, "data": {"of": "points", "count": 1}}
        (best,) = running.client.post("/search", **asked).json()["results"]
        assert index.rows.names[best["picture"]] == "1.npy"
        asked["files"] = {"item": large.getvalue()}
        refused = running.client.post("/search", **asked)
        assert refused.status_code == 422 and "2,000,000 are the most" in refused.json()["message"]
