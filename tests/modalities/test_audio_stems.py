"""What towers of others hear with: convolutions, patches that overlap, tokens of no moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.modalities.audio import AudioModality, with_neighbours
from unified_mm.parallel.sharding import without_names
from unified_mm.task import build_task

CONVOLUTION = {"stem": "convolution", "mels": 8, "patch": (2, 8), "seconds": 0.2}
OVERLAPPING = {"patch": (6, 4), "stride": (4, 3), "mels": 9, "class_tokens": 2, "seconds": 0.2}


def modality(**options):
    shared = {"mean": -1.0, "std": 0.5, "positions": "none", "modality_embedding": False}
    return AudioModality.from_config("audio", shared | options, None)


def sounds(audio, *lengths):
    """A batch of sounds, of which 0 is none."""
    wave = (8000 * np.sin(np.arange(9000) ** 1.2 / 7)).astype(np.int16)
    rows = [audio.arrays(wave[:length]) if length else audio.absent() for length in lengths]
    return jax.tree.map(lambda *each: jnp.stack(each), *rows)


def embedded(audio, batch, seed=0):
    embedder = audio.embedder(8, jnp.float32)
    params = without_names(embedder.init(jax.random.key(seed), batch)["params"])
    return params, embedder.apply({"params": params}, batch)


def test_neighbours_are_those_in_time():
    x = jnp.arange(6.0).reshape(1, 3, 2)
    found = np.asarray(with_neighbours(x))[0]
    assert found.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 0, 0]]


@pytest.mark.parametrize("options", (CONVOLUTION, OVERLAPPING), ids=("convolution", "overlapping"))
def test_a_sound_is_heard_alike_however_much_padding_follows(options):
    short, long = modality(**options), modality(**{**options, "seconds": 0.4})
    _, brief = embedded(short, sounds(short, 1600, 3200, 0))
    _, padded = embedded(long, sounds(long, 1600, 3200, 0))
    valid, more = (np.asarray(each.metadata.valid) for each in (brief, padded))
    assert not valid[2].any() and (valid[:2].sum(1) == more[:2].sum(1))[0]
    first = brief.embeddings[0][valid[0]]
    np.testing.assert_allclose(padded.embeddings[0][more[0]], first, rtol=1e-5, atol=1e-5)
    assert np.abs(first).max() > 0.1 and not np.asarray(brief.embeddings[0])[~valid[0]].any()


@pytest.mark.parametrize("options", (CONVOLUTION, OVERLAPPING), ids=("convolution", "overlapping"))
def test_padding_that_is_not_attended_is_never_heard(options):
    """Not even where it is NaN, forward and backward."""
    audio = modality(**options)
    batch = sounds(audio, 1600, 0)
    beyond = np.arange(3200) >= np.array([[1600], [0]])
    samples = batch["samples"].astype(jnp.float32)
    params, _ = embedded(audio, batch)

    def total(params, samples):
        given = {**batch, "samples": samples}
        found = audio.embedder(8, jnp.float32).apply({"params": params}, given)
        return jnp.square(found.embeddings).sum()

    run = jax.value_and_grad(total, argnums=(0, 1))
    clean, _ = run(params, samples)
    found, (of_params, of_samples) = run(params, jnp.where(beyond, jnp.nan, samples))
    assert float(found) == float(clean) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))
    assert (np.asarray(of_samples)[beyond] == 0).all() and np.abs(of_samples[0]).max() > 0


def test_patches_overlap_as_a_convolution_does():
    audio = modality(**OVERLAPPING)
    assert audio.frames == 20 and audio.grid == (4, 2)  # two frames and two bands fill no patch
    params, tokens = embedded(audio, sounds(audio, 3200))
    assert tokens.embeddings.shape == (1, 2 + 4 * 2, 8)
    np.testing.assert_allclose(tokens.embeddings[0, :2], params["class_tokens"])
    time, coords = tokens.metadata.time[0], tokens.metadata.coords[0]
    np.testing.assert_allclose(time[2:], np.repeat(np.arange(4) * 0.04 + 0.025, 2), rtol=1e-5)
    assert not time[:2].any() and not coords[:2].any()
    np.testing.assert_allclose(coords[2:, 1], [0.25, 0.75] * 4)


@pytest.mark.parametrize("preset", ("whisper", "kaldi"))
def test_padding_is_heard_where_that_is_asked_for(preset):
    audio = modality(**{**OVERLAPPING, "preset": preset, "attend_padding": True})
    _, tokens = embedded(audio, sounds(audio, 1600, 0))
    assert tokens.metadata.valid[0].all() and not tokens.metadata.valid[1].any()
    plain = modality(**{**OVERLAPPING, "preset": preset})
    _, other = embedded(plain, sounds(plain, 1600, 0))
    assert int(other.metadata.valid[0].sum()) < tokens.embeddings.shape[1]
    assert np.abs(tokens.embeddings[0, -1]).max() > 0


def test_tokens_of_no_moment_say_nothing():
    config = tiny.config_dict()
    config.model.modalities = {
        "audio": {"type": "audio", "std": 0.5, "longer": "leave_out", **OVERLAPPING}
    }
    for objective in config.objectives.values():
        objective.weight = 0.0
    own = {"weight": 1.0, "alphabet": ("a", "b"), "longest": 2}
    config.objectives.transcription.update(own)
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    (objective,) = task.objectives

    def logits(model, batch):
        return objective.logits(model, model.read_context(batch, objective.view))

    batch = {"audio": sounds(task.modalities["audio"], 3200)}
    found, valid = task.model.apply({"params": tiny.params(task)}, batch, method=logits)
    assert found.shape == (1, 4, 3) and valid.shape == (1, 4)  # not five, of ten tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**CONVOLUTION, "patch": (4, 8)}, r"patch=\(4, 8\): tokens of .*set it to \(2, 8\)"),
        ({**CONVOLUTION, "stride": (1, 1)}, r"stride=\(1, 1\): tokens of .*set it to \(0, 0\)"),
        ({**OVERLAPPING, "stride": (0, 3)}, r"stride=\(0, 3\): give frames and bands"),
        ({**OVERLAPPING, "seconds": 0.03}, "seconds and mels that fill .*patch"),
        ({"mels": 9, "patch": (6, 4)}, "mels=9 is no multiple of the bands"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        modality(**options)
