"""Towers of sounds and clips: read from files as they are published, asked, and trained on."""

import json
from functools import partial
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

import unified_mm
from unified_mm import export_weights, import_weights
from unified_mm.config import Config
from unified_mm.default_config import defaults
from unified_mm.import_weights import import_directory, write_run
from unified_mm.modalities.audio import AudioModality
from unified_mm.task import build_task
from unified_mm.training.start_from import (
    config_from_run,
    heard,
    load_params,
    weights_to_start_from,
)

soundfile = pytest.importorskip("soundfile")

WIDTH, HIDDEN, MELS = 8, 12, 6
STACK = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
WHISPER = {
    "model_type": "whisper",
    "d_model": WIDTH,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": HIDDEN,
    "num_mel_bins": MELS,
    "max_source_positions": 50,
}
AST = {
    "model_type": "audio-spectrogram-transformer",
    **STACK,
    "patch_size": 4,
    "time_stride": 3,
    "frequency_stride": 2,
    "max_length": 20,
    "num_mel_bins": MELS,
}
VIDEOMAE = {
    "model_type": "videomae",
    **STACK,
    "image_size": 16,
    "patch_size": 8,
    "num_frames": 4,
    "use_mean_pooling": False,
}
VIT_MAPS = {
    "attention.attention.query": (WIDTH, WIDTH),
    "attention.attention.key": (WIDTH, WIDTH),
    "attention.attention.value": (WIDTH, WIDTH),
    "attention.output.dense": (WIDTH, WIDTH),
    "intermediate.dense": (HIDDEN, WIDTH),
    "output.dense": (WIDTH, HIDDEN),
}


def maps(block, shapes, norms, without=()):
    """Kernels and biases of dense maps, and norms."""
    found = {f"{block}.{name}.weight": shape for name, shape in shapes.items()}
    found |= {f"{block}.{n}.bias": s[:1] for n, s in shapes.items() if n not in without}
    return found | {f"{name}.{kind}": (WIDTH,) for name in norms for kind in ("weight", "bias")}


def whisper_shapes():
    square = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
    norms = [f"encoder.layers.0.{name}_layer_norm" for name in ("self_attn", "final")]
    return {
        "encoder.conv1.weight": (WIDTH, MELS, 3),
        "encoder.conv1.bias": (WIDTH,),
        "encoder.conv2.weight": (WIDTH, WIDTH, 3),
        "encoder.conv2.bias": (WIDTH,),
        "encoder.embed_positions.weight": (50, WIDTH),
        "decoder.layer_norm.weight": (WIDTH,),
        **maps(
            "encoder.layers.0",
            {**square, "fc1": (HIDDEN, WIDTH), "fc2": (WIDTH, HIDDEN)},
            [*norms, "encoder.layer_norm"],
            without=("self_attn.k_proj",),
        ),
    }


def vit_norms(*more):
    return [f"encoder.layer.0.layernorm_{name}" for name in ("before", "after")] + list(more)


def ast_shapes():
    return {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.distillation_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 2 + 6 * 2, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 1, 4, 4),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        **maps("encoder.layer.0", VIT_MAPS, vit_norms("layernorm")),
    }


def videomae_shapes():
    return {
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 2, 8, 8),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        **maps(
            "encoder.layer.0",
            VIT_MAPS,
            vit_norms("layernorm"),
            without=("attention.attention.key",),
        ),
    }


KINDS = {
    "whisper": (WHISPER, whisper_shapes()),
    "ast": (AST, ast_shapes()),
    "videomae": (VIDEOMAE, videomae_shapes()),
}


def written(folder, kind, processor=None, **changes):
    """A directory as it is published, of random numbers."""
    config, shapes = KINDS[kind]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    weights = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind."""
    folder = tmp_path_factory.mktemp("towers")
    return {
        kind: write_run(import_directory(written(folder / kind, kind)), folder / f"{kind}-run").path
        for kind in KINDS
    }


def files_of(of, folder):
    rng = np.random.default_rng(0)
    files = [folder / f"{number}.{'wav' if of == 'audio' else 'npz'}" for number in range(2)]
    for number, file in enumerate(files):
        if of == "audio":
            wave = 0.1 * rng.normal(size=3000) * (np.arange(3000) < 3000 - 1500 * number)
            soundfile.write(file, wave, 16_000)
        else:
            np.savez(file, frames=rng.integers(0, 255, (4, 20, 24, 3)).astype(np.uint8), fps=2.0)
    return files


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_embeds_files_and_nothing_else(kind, runs, tmp_path):
    of = "video" if kind == "videomae" else "audio"
    model = unified_mm.load(runs[kind])
    files = files_of(of, tmp_path)
    found = model.embed(files, of=of)
    assert found.shape == (2, WIDTH) and np.abs(found[0] - found[1]).max() > 1e-4
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match=f"this model reads no text: what it reads is {of}"):
        model.embed(["a dog"], of="text")
    with pytest.raises(ValueError, match="this model cannot write: it was trained on contrastive"):
        model.caption(files)
    with pytest.raises(ValueError, match=f"a tower of {of} alone .* cannot be served; train a"):
        model.refuse_alone("served")
    with pytest.raises(SystemExit):
        export_weights.main(["--run", str(runs[kind]), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def begun(run, of, asked=(), **changes):
    """The config and the parameters of a model of a tower and texts that begins with a run."""
    config = tiny.config_dict(
        model__fusion="late",
        objectives__matching__weight=0.0,
        objectives__captioning__weight=0.0,
        objectives__contrastive__between=of,
    )
    config.model.modalities = {
        of: {**defaults()["model"]["modalities"][of], **changes},
        "text": config.model.modalities.text,
    }
    config.model.start_from[of] = str(run)
    chosen = config_from_run(config, tuple(f"model.modalities.{of}.{name}" for name in asked))
    fields = Config(chosen.to_dict())
    task = build_task(fields, tiny.tokenizer())
    params = load_params(tiny.params(task, seed=1), fields, weights_to_start_from(fields))
    return chosen, task, params


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_with_the_tower_as_it_is(kind, runs):
    of = "video" if kind == "videomae" else "audio"
    own = {"mask_frames": 3} if of == "audio" else {"seconds": 2.0}
    config, task, params = begun(runs[kind], of, **own)
    theirs = unified_mm.load(runs[kind])
    for part in (f"embedders_{of}", f"towers_{of}"):
        jax.tree.map(np.testing.assert_array_equal, params[part], theirs.params[part])
    modality = theirs.task.modalities[of]
    assert task.model.tower_of(of) == theirs.task.model.tower_of(of)
    if of == "video":
        assert (config.data.image_size, config.data.fit) == (16, "crop_resized")
        assert task.modalities[of].seconds == 2.0 and modality.seconds == 0.0
        assert task.modalities[of].mean == modality.mean == (0.485, 0.456, 0.406)
    else:  # what training does to sounds is the new run's own affair
        assert config.model.modalities.audio.mask_frames == 3
        assert task.modalities[of].mask_frames == 3 and modality.mask_frames == 0


def test_a_tower_may_hear_less_than_it_did(runs):
    _, whole, params = begun(runs["whisper"], "audio")
    config, task, fewer = begun(runs["whisper"], "audio", ("seconds",), seconds=0.4)
    assert whole.modalities["audio"].seconds == 1.0 and config.model.modalities.audio.seconds == 0.4
    positions = params["embedders_audio"]["positions"]
    assert fewer["embedders_audio"]["positions"].shape == (20, 1, WIDTH)
    np.testing.assert_array_equal(fewer["embedders_audio"]["positions"], positions[:20])
    with pytest.raises(ValueError, match="audio.seconds=2.0, but the weights of .* have 1.0"):
        begun(runs["whisper"], "audio", ("seconds",), seconds=2.0)


@pytest.mark.parametrize("class_token", (False, True))
def test_sounds_begin_with_a_tower_of_pictures(class_token, tmp_path):
    changes = {
        "model__fusion": "late",
        "model__tower__width": 8,
        "model__modalities__image__patch": 4,
        "model__modalities__image__class_token": class_token,
        "objectives__matching__weight": 0.0,
        "objectives__captioning__weight": 0.0,
    }
    weights = tiny.params(tiny.task(**changes))
    run = tiny.write_run(tmp_path / "run", tiny.config_dict(**changes), weights)
    options = {"seconds": 0.32, "mels": 12, "mean": 0.0, "std": 1.0}
    config, task, params = begun(run, "audio", **options)
    assert list(config.model.modalities.audio.patch) == [4, 4]
    jax.tree.map(np.testing.assert_array_equal, params["towers_audio"], weights["towers_image"])
    given, found = weights["embedders_image"], params["embedders_audio"]
    # A grey picture whose columns are the frames: a third of what its three colours say.
    patch = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)  # frames, bands
    grey = np.repeat(patch.T[:, :, None], 3, axis=2).reshape(-1)
    np.testing.assert_allclose(
        patch.reshape(-1) @ found["patches"]["kernel"],
        grey @ given["patches"]["kernel"] / 3,
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_array_equal(found["patches"]["bias"], given["patches"]["bias"])
    # 4 x 4 places become 8 moments of 3 bands; a place's row is a band.
    table = jax.image.resize(given["positions"].swapaxes(0, 1), (8, 3, 8), "bilinear")
    np.testing.assert_allclose(found["positions"], table, atol=1e-6)
    assert ("class_tokens" in found) == class_token
    if class_token:
        token = given["class_token"] + given["class_position"]
        np.testing.assert_array_equal(found["class_tokens"], token[None])
    batch = {"audio": {k: jnp.asarray(v)[None] for k, v in tone(task).items()}}
    look = task.model.apply({"params": params}, batch, method=lambda m, b: m.look("audio", b))
    assert look.embeddings.shape == (1, 8 * 3 + class_token, 8)
    assert np.isfinite(look.embeddings).all()


def tone(task):
    wave = 8000 * np.sin(np.arange(5000) / 3)
    return task.modalities["audio"].arrays(wave.astype(np.int16))


def test_positions_that_are_not_learned_are_not_resized():
    kernel = np.ones((4 * 4 * 3, 8), np.float32)
    audio = AudioModality("audio", patch=(4, 4), mels=8, positions="none")
    assert list(heard({"embedders_audio/patches/kernel": kernel}, audio)) == [
        "embedders_audio/patches/kernel"
    ]


@pytest.mark.slow
def test_from_a_published_directory_to_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for kind, hertz in (("high", 3000), ("low", 300)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number in range(10):
            wave = 0.4 * np.sin(hertz * np.arange(3000) / 2546) + 0.02 * rng.normal(size=3000)
            soundfile.write(tmp_path / "data" / kind / f"{number}.wav", wave, 16_000)
    source, tower = written(tmp_path / "whisper", "whisper"), tmp_path / "tower"
    with pytest.raises(SystemExit) as stopped:
        import_weights.main(["--from", str(source), "--out", str(tower)])
    assert stopped.value.code == 0
    assert "family: Whisper's encoder (part: audio)" in capsys.readouterr().out
    recipe = Path(__file__).parents[2] / "configs" / "audio.py"
    flags = {
        "data.dir": tmp_path / "data",
        "model.fusion": "late",
        "model.start_from.audio": tower,
        "model.modalities.audio.seconds": 0.2,
        "train.steps": 2,
        "train.batch_size": 8,
        "train.learning_rate": 1e-30,
        "evaluation.batch_size": 8,
        "logging.tensorboard": False,
    }
    given = [f"--config.{field}={value}" for field, value in flags.items()]
    assert commands.run(f"--config={recipe}:tiny", f"--workdir={tmp_path / 'run'}", *given) == 0
    said = capsys.readouterr().out
    assert f"starts with audio from {tower}; afresh: heads_classification\n" in said
    before, after = (unified_mm.load(each).params for each in (tower, tmp_path / "run"))
    same = partial(np.testing.assert_allclose, rtol=0, atol=1e-25)  # zeros are moved by the rate
    jax.tree.map(same, after["towers_audio"], before["towers_audio"])
    options = json.loads((tmp_path / "run" / "config.json").read_text())["model"]["modalities"]
    assert options["audio"]["seconds"] == 0.2 and options["audio"]["mask_frames"] == 20
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 <= result["scores"]["classification/accuracy"] <= 1


REFUSED = {
    "another rate": ("whisper", {"sampling_rate": 8000}, {}, "sampling_rate=8000 .*16000"),
    "other bands": ("whisper", {"feature_size": 80}, {}, "feature_size=80 .*of one model"),
    "another length": ("whisper", {"chunk_length": 30}, {}, "chunk_length=30 .*of one model"),
    "noise": ("whisper", {"dither": 1e-4}, {}, "dither=0.0001 .*nothing of it is done"),
    "an activation": ("whisper", None, {"activation_function": "tanh"}, "'tanh' is none of"),
    "other frames": ("ast", {"max_length": 1024}, {}, "max_length=1024 .*of one model"),
    "no square": ("ast", None, {"patch_size": [4, 2]}, "patch_size=.* only squares"),
    "cut pictures": ("videomae", None, {"image_size": 20}, "image_size=20 is no multiple of"),
    "another size": ("videomae", {"size": {"shortest_edge": 32}}, {}, "takes 16 x 16 pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(name, tmp_path):
    kind, processor, changes, said = REFUSED[name]
    folder = written(tmp_path / "theirs", kind, processor, **changes)
    with pytest.raises(ValueError, match=said):
        import_directory(folder)
