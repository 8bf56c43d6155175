"""Speech to text, by the captioner and by CTC, in every fusion, from sound files to scores."""

import contextlib
import functools
import glob
import io
import json
import os

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm import generate
from unified_mm.cli.recipes import settle_folders
from unified_mm.config import Config
from unified_mm.data.negatives import negatives
from unified_mm.data.pipeline import training_batches
from unified_mm.data.records import Record, Text
from unified_mm.inference.decoding import GREEDY
from unified_mm.inference.loaded import load, one_device_mesh
from unified_mm.inference.predictor import Predictor
from unified_mm.objectives.captioning import Captioning
from unified_mm.task import build_task

soundfile = pytest.importorskip("soundfile")

AUDIO = {"type": "audio", "seconds": 0.2, "mels": 8, "patch": (2, 4), "mean": -0.1, "std": 0.5}
SAMPLES = 3200


def config_of(fusion="early"):
    config = tiny.config_dict(model__fusion=fusion, objectives__matching__weight=0.0)
    text = config.model.modalities.text
    config.model.modalities = {"audio": {**AUDIO, "longer": "leave_out"}, "text": text}
    config.objectives.contrastive.weight = 0.0
    config.objectives.captioning.weight = 0.0 if fusion == "late" else 1.0
    config.objectives.transcription.update(
        {"weight": 1.0, "alphabet": (" ", "e", "n", "o", "t", "w"), "longest": 7}
    )
    return config


@functools.cache
def task_of(fusion="early"):
    return build_task(Config(config_of(fusion).to_dict()), tiny.tokenizer())


def batch_of(task):
    rng = np.random.default_rng(0)
    lengths = np.array([SAMPLES, 2000, 700, 0])
    rows = []
    for number, length in enumerate(lengths):
        pitch = np.repeat(rng.uniform(0.05, 2.5, 16), 200)[:length]
        loudness = np.repeat(rng.uniform(30, 9000, 16), 200)[:length]
        wave = (loudness * np.sin(np.cumsum(pitch))).astype(np.int16)
        text = ("one", "two one", "not one", "no")[number]
        heard = task.modalities["audio"].arrays(wave) | {"present": np.array(length > 0)}
        said = task.objectives[-1].targets(Record(number, {}, (Text("", text),), False))
        rows.append({"audio": {**heard, **said}, "text": task.modalities["text"].encode("", text)})
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)


def with_samples(batch, samples):
    return {**batch, "audio": {**batch["audio"], "samples": samples}}


@pytest.mark.parametrize("fusion", ["early", "gated_cross_attention", "late"])
def test_every_fusion_transcribes_and_padding_is_never_heard(fusion):
    """Late fusion by CTC alone: it writes no text."""
    task = task_of(fusion)
    params, batch = tiny.params(task), batch_of(task)
    samples = batch["audio"]["samples"].astype(jnp.float32)
    beyond = jnp.arange(SAMPLES) >= batch["audio"]["length"][:, None]

    def loss(params, samples):
        found = task.metrics(
            params, with_samples(batch, samples), jax.random.key(0), deterministic=True
        )
        return sum(v[0] for name, v in found.items() if name.endswith("/loss")), found

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (clean, found), _ = run(params, samples)
    (broken, _), (grads, of_samples) = run(params, jnp.where(beyond, jnp.nan, samples))
    assert float(clean) == float(broken)
    # Of 20, 13, 5 and no frames: 'one' and 'two one' fit, 'not one' does not, one has no sound.
    assert tuple(map(float, found["transcription/too_short"])) == (1, 3)
    assert float(found["transcription/loss"][1]) == (3 + 1) + (7 + 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.abs(grads["embedders_audio"]["patches"]["kernel"]).max() > 0
    assert not np.asarray(of_samples)[np.asarray(beyond)].any()
    assert ("captioning/loss" in found) == (fusion != "late")


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_what_is_heard_depends_on_no_padding_and_no_other_sound(fusion):
    task = task_of(fusion)
    batch = jax.tree.map(np.asarray, batch_of(task))
    tree = tiny.drawn(task, 1)
    stack = tree.get("towers_audio", tree.get("transformer"))
    stack["layers"] = jax.tree.map(lambda x: 4 * x, stack["layers"])
    tree["heads_transcription"]["score"]["kernel"] *= 8.0
    predictor = Predictor(task, tree, one_device_mesh())
    whole = predictor.transcribe(batch, task.objectives[-1])
    assert whole[3] == "" and len(set(whole)) == 4
    beyond = np.arange(SAMPLES) >= batch["audio"]["length"][:, None]
    noise = np.random.default_rng(3).integers(-9999, 9999, beyond.shape)
    noisy = np.where(beyond, noise, batch["audio"]["samples"]).astype(np.int16)
    assert predictor.transcribe(with_samples(batch, noisy), task.objectives[-1]) == whole
    turned = jax.tree.map(lambda leaf: leaf[[2, 0]], batch)
    assert predictor.transcribe(turned, task.objectives[-1]) == [whole[2], whole[0]]
    if any(isinstance(each, Captioning) for each in task.objectives):
        texts = predictor.write(batch, [""] * 4)
        assert predictor.write(with_samples(batch, noisy), [""] * 4) == texts
        assert predictor.write(turned, [""] * 2) == [texts[2], texts[0]]


def test_silence_and_noise_are_drawn_by_seed_and_sample():
    task = task_of()
    preparers = {"audio": task.preparers()["audio"], "text": task.modalities["text"]}
    made = negatives(task.modalities, 6)

    def read(seed, start, steps, **more):
        batches = training_batches(
            made, preparers, seed=seed, batch_size=4, start_step=start, **more
        )
        found = [next(batches) for _ in range(steps)]
        batches.close()
        return found

    whole = read(3, 0, 4)
    for one, other in zip([*whole[2:], *whole], [*read(3, 2, 2), *read(3, 0, 4, threads=3)]):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    heard = np.concatenate([each["audio"]["samples"] for each in whole])
    assert len(np.unique(heard, axis=0)) == 16  # new each time
    assert not np.array_equal(heard[:4], read(4, 0, 1)[0]["audio"]["samples"])
    assert all(each["audio"]["transcribed"].all() for each in whole)
    assert not any(each["audio"]["units"].any() for each in whole)
    assert (np.concatenate([each["text"]["valid"].sum(1) for each in whole]) == 2).all()  # no word
    fixed = [task.modalities["audio"].prepare(made[1], None)["samples"] for _ in range(2)]
    np.testing.assert_array_equal(*fixed)
    loud = np.abs(heard.astype(int)).max(1)
    assert loud.min() < 20 and loud.max() > 300


def test_negatives_of_files_are_stretches_of_them(tmp_path):
    task = task_of()
    wave = np.linspace(-0.9, 0.9, 3 * SAMPLES)  # each sample tells its place
    for name in ("a.wav", "b.WAV"):
        soundfile.write(tmp_path / name, wave, 16_000)
    (tmp_path / "notes.txt").write_text("no sound")
    made = negatives(task.modalities, 12, f"{tmp_path}/*")
    kinds = [record.id.partition(" ")[0] for record in made]
    assert kinds == ["silence", "noise", "sounds"] * 4
    parts = [record.parts["audio"] for record in made if "file" in record.parts["audio"]]
    assert [part["file"][-5] for part in parts] == ["a", "b"] * 2
    audio, rng = task.modalities["audio"], np.random.default_rng(0)
    heard = [audio.prepare(made[2], each) for each in (None, None, rng, rng)]
    np.testing.assert_array_equal(heard[0]["samples"], heard[1]["samples"])
    assert len({int(each["samples"][0]) for each in heard}) == 3  # anywhere, by the generator
    for each in heard:
        there = each["samples"][: each["length"]].astype(int)
        assert 0.2 * SAMPLES - 1 <= len(there) <= SAMPLES and (np.diff(there) >= 0).all()
    with pytest.raises(ValueError, match=r"negatives_of='.*/c\*': names no file of .*\.wav"):
        negatives(task.modalities, 3, f"{tmp_path}/c*")
    held = config_of()
    held.evaluation.negatives_of = "x/*.wav"
    settle_folders(held)
    assert held.evaluation.negatives_of == f"{glob.escape(os.getcwd())}/x/*.wav"
    (tmp_path / "c.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"c\.wav"):
        negatives(task.modalities, 3, f"{tmp_path}/*")


RECIPE = """
import tiny
from unified_mm.config import defaults_of
from unified_mm.modalities.audio import AudioModality


def get_config():
    config = tiny.config_dict(train__steps=4, evaluation__transcripts="plain")
    text = config.model.modalities.text
    options = {"seconds": 0.2, "mels": 8, "patch": (2, 8), "longer": "leave_out"}
    audio = {"type": "audio", **defaults_of(AudioModality), **options}
    config.model.modalities = {"audio": audio, "text": text}
    config.objectives.contrastive.weight = config.objectives.matching.weight = 0.0
    config.objectives.transcription.weight = 1.0
    config.data.update({"negatives": 0.25, "max_bad_share": 0.3})
    config.evaluation.negatives = 6
    return config
"""
WORDS = ("one", "two", "two one", "one, two")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("jiwer")
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        (folder / "data" / split).mkdir(parents=True)
        rows = ["file_name,transcription"]
        for number in range(count):
            # The last one is too long; the one before has no room for its transcript.
            samples = {count - 1: 8000, count - 2: 300}.get(number, int(rng.integers(2500, 3200)))
            wave = 0.3 * rng.normal(size=samples)
            soundfile.write(folder / "data" / split / f"{number}.wav", wave, 16_000)
            rows.append(f'{number}.wav,"{WORDS[number % 4]}"')
        (folder / "data" / split / "metadata.csv").write_text("\n".join(rows))
    (folder / "recipe.py").write_text(RECIPE)
    given = (f"--config={folder}/recipe.py", f"--config.data.dir={folder}/data")
    cache = f"--config.data.cache_dir={folder}/cache"
    sounds = f"--config.evaluation.negatives_of={folder}/data/val/[01].wav"
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert commands.run_uncounted(*given, cache, sounds, f"--workdir={folder}/run") == 0
    (folder / "told.txt").write_text(told.getvalue())
    return folder


def test_what_is_not_learned_from_is_named(run):
    told = (run / "told.txt").read_text()
    assert "1 of 11 audio items are too short for their transcripts" in told
    assert "first train/10.wav" in told
    assert "longer than model.modalities.audio.seconds=0.2" in told


def test_a_run_is_scored_by_its_errors_and_says_how(run):
    config = json.loads((run / "run/config.json").read_text())
    learned = config["objectives"]["transcription"]
    assert learned["alphabet"] == [" ", "e", "n", "o", "t", "w"] and learned["longest"] == 7
    result = json.loads((run / "run/result.json").read_text())
    assert result["normalisers"] == {"caption": "plain", "transcription": "plain"}
    assert result["data"]["counts"] == {"train": 11, "val": 5}
    for name in ("caption", "transcription"):
        assert result["scores"][f"{name}/wer"] > 0 and result["chance"][f"{name}/wer"] > 0
        for kind in ("silence", "noise", "sounds"):
            assert 0 <= result["scores"][f"{name}/empty_on_{kind}"] <= 1
    assert "caption/audio_gain" in result["scores"]
    written = json.loads((run / "run/transcripts.json").read_text())
    assert len(written) == 2 * 5
    assert written[0]["file_name"] == "val/0.wav" and written[0]["transcript"] == "one"
    assert json.loads((run / "run/captions.json").read_text())[0]["file_name"] == "val/0.wav"


def test_a_loaded_run_transcribes_files(run):
    model = load(run / "run")
    files = [run / "data/val" / f"{number}.wav" for number in range(3)]
    written = json.loads((run / "run/transcripts.json").read_text())
    heard = [each["heard"] for each in written if each["objective"] == "transcription"]
    assert model.transcribe(files) == heard[:3]
    assert model.transcribe([files[0].read_bytes()]) == heard[:1]
    captions = [each["heard"] for each in written if each["objective"] == "caption"]
    assert model.caption(files) == captions[:3]
    given = [generate.Picture(str(file), file.name, file.name) for file in files]
    texts = [texts[0].text for _, texts in generate.written(model, given, "", GREEDY)]
    assert texts == captions[:3]
    with pytest.raises(ValueError, match=r"5.wav .*: longer than model.modalities.audio.seconds"):
        model.transcribe([run / "data/val/5.wav"])
    with pytest.raises(ValueError, match=r"5.wav: longer than .*, and may not be cut"):
        model.transcribe([str(run / "data/val/5.wav")])


def test_it_goes_on_with_the_same_share_of_silence_alone(run, capsys):
    given = (f"--config={run}/recipe.py", f"--config.data.dir={run}/data", f"--workdir={run}/run")
    cache = f"--config.data.cache_dir={run}/cache"
    more = ("--config.train.steps=6", "--config.data.negatives=0.5")
    assert commands.run(*given, cache, *more) != 0
    assert "negatives" in capsys.readouterr().err
    other = (
        *given,
        cache,
        "--config.train.steps=6",
        f"--config.data.negatives_of={run}/data/val/0*",
    )
    assert commands.run(*other) != 0
    assert "is not what this run began with" in capsys.readouterr().err
