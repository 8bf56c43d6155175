"""Videos as tokens: tubelets, what is padding, what is drawn, in every fusion."""

import functools
from dataclasses import replace

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from unified_mm.config import Config
from unified_mm.data.clips import ClipError
from unified_mm.data.listing import Foil
from unified_mm.data.pipeline import training_batches
from unified_mm.data.records import Manifest, Record
from unified_mm.evaluation.evaluate import Scores, Split, score_compared_foils
from unified_mm.files import write_json
from unified_mm.inference.loaded import one_device_mesh, read_file
from unified_mm.inference.predictor import Predictor
from unified_mm.modalities.video import inflated, tubelets
from unified_mm.objectives.classification import LABELS
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import param_shardings, rule_items, to_global
from unified_mm.runs.folder import RunFolder
from unified_mm.task import build_task
from unified_mm.training.notices import crop_lines
from unified_mm.training.start_from import config_from_run, load_params, weights_to_start_from

FUSIONS = ("early", "gated_cross_attention", "late")
TINY = {"type": "video", "frames": 4, "patch": 8, "stem": "difference"}


def config_of(fusion="early", **options):
    config = tiny.config_dict(
        model__fusion=fusion,
        model__resampler__latents=4,
        model__resampler__head_width=8,
        model__resampler__feed_forward=16,
        model__cross__start=0.3,  # open gates, or nothing behind them would have a gradient
        objectives__matching__weight=0.0,
        objectives__captioning__weight=0.0 if fusion == "late" else 1.0,
        objectives__contrastive__between="video",
        objectives__classification__weight=1.0,
        objectives__classification__of="video",
        objectives__classification__classes=("hit", "pass"),
    )
    config.model.modalities = {
        "video": {**TINY, **options},
        "text": config.model.modalities.text,
    }
    return config


@functools.cache
def task_of(fusion="early"):
    return build_task(Config(config_of(fusion).to_dict()), tiny.tokenizer())


def video(**changes):
    return replace(task_of().modalities["video"], **changes)


def batch_of(size=4, seed=0):
    """Clips of four frames, of three, of one, and none."""
    rng = np.random.default_rng(seed)
    text = tiny.batch(tiny.task(), size)["text"]
    length = np.array([4, 3, 1, 0])[:size]
    clip = {
        "frames": rng.integers(0, 255, (size, 4, 16, 16, 3)).astype(np.float32),
        "times": np.tile(np.arange(4, dtype=np.float32) / 4, (size, 1)),
        "length": length.astype(np.int32),
        "present": length > 0,
        LABELS: np.eye(2, dtype=np.float32)[np.arange(size) % 2],
    }
    return {"video": jax.tree.map(jnp.asarray, clip), "text": text}


def test_a_clip_of_ones_own_may_be_longer_than_an_upload(tmp_path):
    video = task_of().modalities["video"]
    path = tmp_path / "long.npz"
    np.savez(path, frames=np.zeros((3, 16, 16, 3), np.uint8), fps=0.001)
    (shown,) = read_file(video, path)
    assert shown["present"]
    with pytest.raises(ClipError, match="3000 seconds are over 600"):
        video.read_windows(path.read_bytes())


def embedded(task, params, batch):
    return task.model.apply(
        {"params": params}, method=lambda model: model.embedders["video"](batch["video"])
    )


def test_tubelets_are_a_convolution_whose_steps_are_its_kernel():
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(2, 4, 16, 16, 3)).astype(np.float32)
    kernel = rng.normal(size=(2, 8, 8, 3, 5)).astype(np.float32)
    found = tubelets(jnp.asarray(frames), 2, 8) @ kernel.reshape(-1, 5)
    want = jax.lax.conv_general_dilated(
        frames, kernel, (2, 8, 8), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    np.testing.assert_allclose(found, want, rtol=2e-3, atol=2e-3)
    # Central frame initialisation: a still clip is seen as its picture is.
    of_picture = kernel[0].reshape(-1, 5)
    still = np.repeat(frames[:, :1], 4, axis=1)
    seen = tubelets(jnp.asarray(still), 2, 8) @ inflated(of_picture, 2)
    alone = tubelets(jnp.asarray(frames[:, :1]), 1, 8) @ of_picture
    np.testing.assert_allclose(seen, np.repeat(alone, 2, axis=1), rtol=1e-4, atol=1e-4)


def test_tokens_say_when_and_where_they_are():
    task = task_of()
    tokens = jax.jit(functools.partial(embedded, task))(tiny.params(task), batch_of())
    assert tokens.embeddings.shape == (4, 2 * 4, 16)
    # Three frames begin both tubelets, one begins the first.
    assert np.asarray(tokens.metadata.valid).sum(1).tolist() == [8, 8, 4, 0]
    np.testing.assert_allclose(tokens.metadata.time[0], np.repeat([0.125, 0.625], 4))
    np.testing.assert_allclose(tokens.metadata.time[1], np.repeat([0.125, 0.5], 4))
    corners = [[0.25, 0.25, 0], [0.75, 0.25, 0], [0.25, 0.75, 0], [0.75, 0.75, 0]]
    np.testing.assert_allclose(tokens.metadata.coords[2], corners * 2)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_learns_and_never_sees_padding(fusion):
    """What is absent or beyond the end changes nothing, not even as NaN, forward and backward."""
    task, batch = task_of(fusion), batch_of()
    params = tiny.params(task)

    def loss(params, frames):
        seen = {**batch, "video": {**batch["video"], "frames": frames}}
        found = task.metrics(params, seen, jax.random.key(0), deterministic=True)
        return sum(x[0] for name, x in found.items() if name.endswith("/loss")), found

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    frames = batch["video"]["frames"]
    (clean, metrics), _ = run(params, frames)
    beyond = np.arange(4) >= np.asarray(batch["video"]["length"])[:, None]
    broken = jnp.where(beyond[..., None, None, None], jnp.nan, frames)
    (found, _), (of_params, of_frames) = run(params, broken)
    assert float(clean) == float(found) and np.isfinite(clean)
    assert metrics["classification/loss"][1] == 3 and metrics["contrastive/loss"][1] == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))
    assert (np.asarray(of_frames)[beyond] == 0).all()
    assert (np.abs(np.asarray(of_frames)[~beyond]).max(axis=(1, 2, 3)) > 0).all()
    for name in ("patches", "differences"):
        assert np.abs(of_params["embedders_video"][name]["kernel"]).max() > 0
    if fusion == "gated_cross_attention":
        times = np.abs(of_params["resamplers_video"]["times"]).max(1)
        assert (times[:2] > 0).all() and (times[2:] == 0).all()


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    task, batch = task_of("gated_cross_attention"), batch_of()
    params = tiny.drawn(task, 0)

    def loss(params, batch):
        found = task.metrics(params, batch, jax.random.key(0), deterministic=True)
        return sum(x[0] for name, x in found.items() if name.endswith("/loss"))

    found = []
    for sizes, devices in (({}, jax.devices()[:1]), ({"data": 2, "fsdp": 2, "tensor": 2}, None)):
        mesh = make_mesh(sizes, devices)
        with jax.set_mesh(mesh), flax.linen.logical_axis_rules(rule_items()):
            placement = param_shardings(task.abstract_params(), mesh)
            placed = jax.device_put(params, placement.params)
            run = jax.jit(jax.value_and_grad(loss))
            found.append(jax.device_get(run(placed, to_global(batch, mesh))))
    (one, of_one), (other, of_other) = found
    assert one == pytest.approx(other, rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-4), of_one, of_other
    )


def records(folder, count=8):
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        file = folder / f"{number}.npz"
        frames = np.broadcast_to(
            np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 20, 24, 3)
        ).copy()
        frames[:, :, :12] += np.uint8(rng.integers(100))
        np.savez(file, frames=frames, fps=10.0)
        found.append(Record(number, {"video": str(file)}, (), True, ("hit",)))
    return found


def test_frames_are_drawn_in_training_and_central_in_evaluation(tmp_path):
    (record,) = records(tmp_path, 1)
    right = (slice(None), 8, -1, 0)  # the number of each frame

    def numbers(modality, seed=None):
        rng = None if seed is None else np.random.default_rng(seed)
        return modality.prepare(record, rng)["frames"][right].tolist()

    # Four seconds in four parts, and the middle two seconds of them.
    whole, part = video(mirror=False), video(mirror=False, seconds=2.0)
    assert numbers(whole) == [5, 15, 25, 35]
    assert numbers(part) == [12, 17, 22, 27]
    assert whole.prepare(record, None)["times"].tolist() == [0.5, 1.5, 2.5, 3.5]
    drawn = [numbers(part, seed) for seed in range(20)]
    assert len({tuple(each) for each in drawn}) > 10
    assert all(np.diff(each).tolist() == [5, 5, 5] or max(np.diff(each)) <= 6 for each in drawn)
    assert min(map(min, drawn)) >= 0 and max(map(max, drawn)) <= 39
    # All frames of a clip are cropped and mirrored alike.
    mirrored = video(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    for seed in range(8):
        frames = mirrored.prepare(record, np.random.default_rng(seed))["frames"].astype(int)
        brighter = frames[:, 8, 1, 0] > frames[:, 8, -2, 0]
        assert brighter.all() or not brighter.any()


def test_clips_that_are_longer_than_what_is_seen_are_said(tmp_path):
    seen = records(tmp_path, 2)
    train = Manifest("train", tuple(seen), "tests", "", "0")

    def said(**options):
        task = build_task(Config(config_of(**options).to_dict()), tiny.tokenizer())
        return crop_lines(task, train)

    assert said() == said(seconds=4.0) == []
    (line,) = said(seconds=2.0)
    assert line.startswith("2 of 2 videos that were looked at are longer than")
    assert line.endswith("seconds=2: training takes a random part of each, evaluation the middle")


def test_a_short_clip_has_fewer_frames_and_a_picture_one(tmp_path):
    (record,) = records(tmp_path, 1)
    long = video(seconds=8.0).prepare(record, None)
    assert long["length"] == 2 and long["times"].tolist() == [1.0, 3.0, 0.0, 0.0]
    assert not long["frames"][2:].any()
    Image.new("RGB", (20, 20), "white").save(tmp_path / "a.png")
    for seconds in (0.0, 2.0):
        for rng in (None, np.random.default_rng(0)):
            still = Record(0, {"video": str(tmp_path / "a.png")}, (), True)
            found = video(seconds=seconds).prepare(still, rng)
            assert found["length"] == 1 and found["frames"][0].min() == 255
    read = video().read((tmp_path / "a.png").read_bytes())
    assert read["present"] and read["length"] == 1


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    task, seen = task_of(), records(tmp_path)
    preparers = {"video": task.preparers(seen)["video"]}

    def read(start, steps, **more):
        batches = training_batches(seen, preparers, seed=3, batch_size=4, start_step=start, **more)
        found = [next(batches)["video"] for _ in range(steps)]
        batches.close()
        return found

    whole, later, threaded = read(0, 4), read(2, 2), read(0, 4, threads=4)
    for one, other in zip([*whole[2:], *whole], [*later, *threaded], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert len({each["times"].tobytes() for each in whole}) == 4


def test_a_tower_of_pictures_starts_one_of_videos(tmp_path):
    """A still clip is then seen as its picture is, in each of its moments."""
    late = {"fusion": "late", "tower__width": 8}
    changes = {f"model__{name}": value for name, value in late.items()}
    off = {f"objectives__{name}__weight": 0.0 for name in ("captioning", "matching")}
    donor = tiny.task(**changes, **off)
    weights = tiny.params(donor)
    run = tiny.write_run(tmp_path / "run", tiny.config_dict(**changes, **off), weights)
    config = config_from_run(config_with(run), ())
    assert config.model.towers.video.width == 8 and config.model.modalities.video.patch == 8
    fields = Config(config.to_dict())
    task = build_task(fields, tiny.tokenizer())
    params = load_params(tiny.params(task, seed=1), fields, weights_to_start_from(fields))
    # What pictures have not begins afresh: here it is made to say nothing.
    own = params["embedders_video"]
    own["time_positions"] = jnp.zeros_like(own["time_positions"])
    own["differences"]["bias"] = jnp.zeros_like(own["differences"]["bias"])
    picture = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
    present = np.ones(2, bool)
    still = {
        "frames": np.repeat(picture[:, None], 4, axis=1),
        "times": np.zeros((2, 4), np.float32),
        "length": np.full(2, 4, np.int32),
        "present": present,
    }

    def read(task, params, name, arrays):
        def embed(model, arrays):
            return model.embedders[name](arrays).embeddings

        run = jax.jit(functools.partial(task.model.apply, method=embed))
        return run({"params": params}, arrays)

    seen = read(task, params, "video", still)
    want = read(donor, weights, "image", {"pixels": picture, "present": present})
    np.testing.assert_allclose(seen[:, :4], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen[:, 4:], want, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, params["towers_video"], weights["towers_image"])
    hierarchical = {"model__modalities__image__stem": "hierarchical", **changes, **off}
    other = tiny.config_dict(**hierarchical)
    write_json(RunFolder(run).config, other.to_dict())
    with pytest.raises(ValueError, match="has stem='hierarchical', and video begins"):
        config_from_run(config_with(run), ())


def config_with(run):
    config = config_of("late")
    config.model.start_from.video = str(run)
    return config


def test_foils_are_told_by_the_contrast(tmp_path):
    class PrefersLong(Predictor):
        def embed(self, batch, of, objective=""):
            if of == "video":
                return np.ones((len(batch["video"]["present"]), 1), np.float32)
            return np.asarray(batch["text"]["valid"].sum(1, keepdims=True), np.float32)

    train = Manifest("train", tuple(records(tmp_path, 2)), "tests", "", "0")
    foils = [
        Foil(0, "a red square", "red", "length"),
        Foil(1, "red", "a red square", "length"),
        Foil(1, "a red square", "red", "other"),
        Foil(9, "red", "blue", "no clip"),
    ]
    found = Scores()
    predictor = PrefersLong(task_of(), None, one_device_mesh())
    score_compared_foils(predictor, Split(train, foils), found, 4)
    accuracy = "foil/video/accuracy"
    assert found.scores[f"{accuracy}/length"] == 0.5 and found.scores[f"{accuracy}/other"] == 1.0
    assert found.scores[accuracy] == pytest.approx(2 / 3) and len(found.scores) == 3


def test_what_does_not_divide_is_refused():
    for options, said in (
        ({"frames": 5}, "model.modalities.video.frames=5 is no multiple of .*tubelet=2"),
        ({"patch": 5}, "data.image_size=16 is no multiple of .*patch=5"),
    ):
        with pytest.raises(ValueError, match=said):
            build_task(Config(config_of(**options).to_dict()), tiny.tokenizer())
