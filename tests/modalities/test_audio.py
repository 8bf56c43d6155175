"""Sounds as tokens: spectrograms, what is padding, what is drawn, in every fusion."""

import functools
import json
import shutil
from dataclasses import replace

import commands
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from unified_mm.config import Config
from unified_mm.data.pipeline import training_batches
from unified_mm.data.records import Record
from unified_mm.default_config import defaults
from unified_mm.modalities.audio import spectrogram
from unified_mm.modalities.spectrogram import PRESETS, log_mel, mel_power
from unified_mm.objectives.classification import LABELS
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import rule_items, to_global
from unified_mm.task import build_task

soundfile = pytest.importorskip("soundfile")

TINY = {"type": "audio", "seconds": 0.2, "mels": 8, "patch": (5, 4), "mean": -0.1, "std": 0.5}
CLASSES = ("high", "low")


def config_of(fusion="early", **options):
    config = tiny.config_dict(
        model__fusion=fusion,
        objectives__matching__weight=0.0,
        objectives__captioning__weight=0.0,
        objectives__classification__weight=1.0,
        objectives__classification__of="audio",
        objectives__classification__classes=CLASSES,
    )
    config.model.modalities.audio = {**TINY, **options}
    return config


@functools.cache
def task_of(fusion="early"):
    return build_task(Config(config_of(fusion).to_dict()), tiny.tokenizer())


def audio(**changes):
    return replace(task_of().modalities["audio"], **changes)


def batch_of(size=4, seed=0):
    rng = np.random.default_rng(seed)
    batch = tiny.batch(task_of(), size) if "image" in task_of().modalities else {}
    samples = rng.normal(size=(size, 3200)) * 3000
    length = np.array([3200, 1000, 400, 0])[:size]
    batch["audio"] = {
        "samples": np.where(np.arange(3200) < length[:, None], samples, 0).astype(np.int16),
        "length": length.astype(np.int32),
        "gain": np.ones(size, np.float32),
        "masks": np.zeros((size, 2, 2), np.int32),
        "present": length > 0,
        LABELS: np.eye(2, dtype=np.float32)[np.arange(size) % 2],
    }
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize("name", PRESETS)
def test_a_spectrum_is_that_of_its_definition(name):
    preset = PRESETS[name]
    wave = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 0.1
    found = np.asarray(mel_power(preset, jnp.asarray(wave)[None], 20))[0]
    padded = np.pad(wave, 200, mode="reflect") if preset.centred else wave
    assert len(found) == preset.frames(1000)
    frames = np.stack([padded[at : at + 400] for at in range(0, 160 * len(found), 160)])
    ways = [way(jnp.asarray(frames)[None])[0] for way in (preset.multiplied, preset.transformed)]
    for number, row in enumerate(found):
        frame = frames[number].astype(np.float64)
        if preset.mean_off:
            frame = frame - frame.mean()
        frame = frame - preset.emphasis * np.concatenate([frame[:1], frame[:-1]])
        window = np.hanning(401)[:400] if preset.periodic else np.hanning(400)
        power = np.abs(np.fft.rfft(frame * window, preset.fft)) ** 2
        np.testing.assert_allclose(row, power @ preset.filters(20), rtol=1e-4, atol=1e-9)
        for each in ways:
            np.testing.assert_allclose(each[number], power, rtol=1e-4, atol=1e-5 * power.max())


def test_what_does_not_change_within_a_sound_may_tell_nothing():
    """What a microphone does to each frequency is a constant in the logarithm."""
    centred, batch = audio(centre=True), batch_of(3)["audio"]
    x, there, _ = spectrogram(centred, batch)
    louder = {**batch, "gain": jnp.full(3, 0.25)}
    np.testing.assert_allclose(spectrogram(centred, louder)[0][there], x[there], atol=1e-3)
    plain = spectrogram(audio(), batch)[0][there]
    assert np.abs(spectrogram(audio(), louder)[0][there] - plain).max() > 0.1
    for row, heard in zip(np.asarray(x), np.asarray(there), strict=True):
        expected = np.full(row.shape[1], -centred.mean / centred.std)
        np.testing.assert_allclose(row[heard].mean(0), expected, atol=1e-5)


def test_whisper_hears_eighty_decibels():
    wave = np.zeros((1, 3200), np.float32)
    wave[0, :1600] = np.sin(np.arange(1600))
    found = np.asarray(log_mel("whisper", jnp.asarray(wave), 8, jnp.ones((1, 20), bool)))
    assert found.max() - found.min() == pytest.approx(2.0)  # 8 powers of ten, divided by 4


def embedded(task, params, batch, name="audio"):
    def run(model):
        return model.embedders[name](batch[name])

    return task.model.apply({"params": params}, method=run)


def test_tokens_say_when_and_how_high_they_are():
    task = task_of()
    tokens = jax.jit(functools.partial(embedded, task))(tiny.params(task), batch_of())
    assert tokens.embeddings.shape == (4, 4 * 2, 16)  # 20 frames of 5, 8 bands of 4
    # 1,000 samples are 7 frames, 400 are 3: two patches, and one.
    assert np.asarray(tokens.metadata.valid).sum(1).tolist() == [8, 4, 2, 0]
    np.testing.assert_allclose(
        tokens.metadata.time[0], np.repeat([0.02, 0.07, 0.12, 0.17], 2), rtol=1e-5
    )
    np.testing.assert_allclose(tokens.metadata.coords[1, :, 1], [0.25, 0.75] * 4)


def test_eight_devices_hear_each_their_own_sounds():
    """The tokens of one device, which hears by another transform, and nothing is sent."""
    task, batch = task_of(), jax.tree.map(np.array, batch_of())["audio"]
    batch = {key: np.concatenate([each, each]) for key, each in batch.items()}
    drawn = tiny.drawn(task, 0)

    def on(mesh):
        with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
            params = jax.device_put(drawn, NamedSharding(mesh, PartitionSpec()))
            heard = to_global(batch, mesh)
            read = jax.jit(lambda params, heard: embedded(task, params, {"audio": heard}))
            run = read.lower(params, heard).compile()
            return jax.device_get(run(params, heard).embeddings), run.as_text()

    one, fast = on(make_mesh({}, jax.devices()[:1]))
    eight, text = on(make_mesh({"data": 8}))
    np.testing.assert_allclose(eight, one, atol=1e-4)
    assert "fft(" in fast and "fft(" not in text
    assert not any(each in text for each in ("all-gather", "all-reduce", "all-to-all", "permute("))


def test_padding_is_never_heard():
    """Not even where it is NaN, forward and backward."""
    task, batch = task_of(), batch_of()
    params = tiny.params(task)
    given = batch["audio"]
    beyond = jnp.arange(3200) >= given["length"][:, None]
    samples = given["samples"].astype(jnp.float32)

    def loss(params, samples):
        heard = {**batch, "audio": {**given, "samples": samples}}
        found = task.metrics(params, heard, jax.random.key(0), deterministic=True)
        return found["classification/loss"][0], found

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (clean, _), _ = run(params, samples)
    broken = jnp.where(beyond, jnp.nan, samples).at[3].set(jnp.nan)
    (found, metrics), (of_params, of_samples) = run(params, broken)
    assert float(clean) == float(found) and metrics["classification/loss"][1] == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))
    assert (np.asarray(of_samples)[np.asarray(beyond)] == 0).all()
    assert np.abs(np.asarray(of_samples)[:3]).max() > 0


def test_a_tower_of_sounds_is_classified_beside_pictures_and_texts():
    task, batch = task_of("late"), batch_of()
    params = tiny.params(task)

    def loss(params, batch):
        found = task.metrics(params, batch, jax.random.key(0), deterministic=True)
        return found["classification/loss"][0] + found["contrastive/loss"][0], found

    batch["image"]["pixels"] = batch["image"]["pixels"].astype(jnp.float32)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, found), grads = run(params, batch)
    assert np.isfinite(found["classification/loss"][0]) and found["classification/loss"][1] == 3
    assert np.abs(grads["embedders_audio"]["patches"]["kernel"]).max() > 0
    # What is absent changes nothing, whatever it holds.
    batch["audio"]["present"] = jnp.zeros(4, bool)
    (_, one), _ = run(params, batch)
    batch["audio"]["samples"] = batch["audio"]["samples"] + jnp.int16(77)
    (_, other), _ = run(params, batch)
    assert one["classification/loss"][1] == 0
    assert float(one["contrastive/loss"][0]) == float(other["contrastive/loss"][0])


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for kind, hertz in (("high", 3000.0), ("low", 300.0)):
        (folder / kind).mkdir()
        for number in range(24):
            count = 8000 if number == 0 else int(rng.integers(1200, 3000))
            wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(count) / 16_000)
            wave += 0.02 * rng.normal(size=count)
            soundfile.write(folder / kind / f"{number}.wav", wave, 16_000)
    return folder


def records(folder):
    return [
        Record(str(file), {"audio": str(file)}, (), True, (file.parent.name,))
        for file in sorted(folder.glob("*/*.wav"))
    ]


def test_batches_depend_on_seed_and_step_alone(sounds):
    config = config_of(gain=6.0, roll=True, mask_frames=5, mask_mels=3)
    config.objectives.classification.update({"many": True, "mix": 0.5})
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    heard = records(sounds)
    preparers = {"audio": task.preparers(heard)["audio"]}

    def read(start, steps, **more):
        batches = training_batches(heard, preparers, seed=3, batch_size=8, start_step=start, **more)
        found = [next(batches)["audio"] for _ in range(steps)]
        batches.close()
        return found

    whole, later, threaded = read(0, 4), read(2, 2), read(0, 4, threads=4)
    for one, other in zip([*whole[2:], *whole], [*later, *threaded], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert {2.0} <= {float(x) for each in whole for x in each[LABELS].sum(1)} <= {1.0, 2.0}
    assert len({float(x) for each in whole for x in each["gain"]}) > 8
    assert max(each["masks"][:, 0, 1].max() for each in whole) <= 5


def test_long_sounds_are_cropped_and_heard_in_windows(sounds):
    long, short = str(sounds / "high/0.wav"), str(sounds / "high/1.wav")
    a = audio()
    assert a.windows(short) == [short]
    starts = [each["start"] for each in a.windows(long)]
    np.testing.assert_allclose(starts, [0.0, 0.15, 0.3])  # half a second by a fifth
    record = Record(0, {"audio": a.windows(long)[-1]}, (), True)
    whole = soundfile.read(long, dtype="int16")[0]
    np.testing.assert_array_equal(a.prepare(record, None)["samples"], whole[-3200:])
    crops = [
        a.prepare(replace(record, parts={"audio": long}), np.random.default_rng(i))["samples"]
        for i in range(3)
    ]
    assert not any(np.array_equal(crops[0], other) for other in crops[1:])


def test_mean_and_deviation_are_those_of_the_frames(sounds):
    heard = records(sounds)[:7]
    open_ = audio(std=0.0, mean=0.0)
    found = open_.measure(heard)
    frames = []
    for record in heard:
        wave = soundfile.read(record.parts["audio"], dtype="float32")[0][:3200]
        there = -(-len(wave) // 160)
        padded = jnp.asarray(np.pad(wave, (0, 3200 - len(wave))))[None]
        mask = jnp.arange(20)[None] < there
        frames.append(np.asarray(log_mel("whisper", padded, 8, mask))[0, :there])
    every = np.concatenate(frames)
    assert found["mean"] == pytest.approx(every.mean(), rel=1e-4)
    assert found["std"] == pytest.approx(every.std(), rel=1e-4)
    assert replace(open_, mean=-4.0).measure(heard) == found  # it takes both
    with pytest.raises(ValueError, match="std=0: the command takes mean and std"):
        open_.embedder(8, jnp.float32)


RECIPE = """
import tiny
from unified_mm.config import defaults_of
from unified_mm.modalities.audio import AudioModality


def get_config():
    config = tiny.config_dict(data__source="sounds", train__steps=6, train__learning_rate=1e-2)
    options = {"seconds": 0.2, "mels": 8, "patch": (5, 4), "mask_frames": 3, "gain": 3.0}
    config.model.modalities = {"audio": {"type": "audio", **defaults_of(AudioModality), **options}}
    for objective in config.objectives.values():
        objective.weight = 0.0
    config.objectives.classification.update({"weight": 1.0, "of": "audio"})
    return config
"""


def flags_of(folder, data, run):
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE)
    return f"--config={recipe}", f"--config.data.dir={data}", f"--workdir={run}"


@pytest.fixture(scope="module")
def run(sounds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert commands.run_uncounted(*flags_of(folder, sounds, folder / "run")) == 0
    return folder / "run"


def test_a_run_keeps_what_it_takes_from_its_data(run, sounds):
    config = json.loads((run / "config.json").read_text())
    assert config["objectives"]["classification"]["classes"] == ["high", "low"]
    assert config["model"]["modalities"]["audio"]["std"] > 0
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["scores"]["classification/accuracy"] <= 1
    assert result["chance"]["classification/mean_per_class"] == 0.5
    assert set(defaults()["model"]["modalities"]["audio"]) <= set(
        config["model"]["modalities"]["audio"]
    )


def test_a_run_that_lost_its_end_ends_in_the_same_bits(run, sounds, tmp_path):
    """The run goes on from step 4 with its own mean, deviation and classes."""
    again = tmp_path / "run"
    shutil.copytree(run, again)
    (again / "result.json").unlink()
    shutil.rmtree(again / "checkpoints" / "6")
    commands.train(*flags_of(tmp_path, sounds, again))
    metrics = [
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (run, again)
    ]
    losses = [[m["loss"] for m in each if "loss" in m] for each in metrics]
    assert losses[0] == losses[1] and len(losses[0]) == 3
