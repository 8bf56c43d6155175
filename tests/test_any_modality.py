"""Contrast between any modalities: its losses, its towers, and what is refused.

tests/test_any_modality_used.py trains, embeds and scores by their names.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.inference.loaded import LoadedModel, one_device_mesh
from unified_mm.objectives.contrastive import named_modalities
from unified_mm.task import build_task
from unified_mm.training.setup import usual_best
from unified_mm.training.start_from import config_from_run, load_params, weights_to_start_from

PICTURE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)


def config_of(**changes):
    config = tiny.config_dict(objectives__matching__weight=0.0, **changes)
    config.model.modalities.tone = {"type": "toy_tone:Tone", "samples": 8, "frame": 4}
    return config


def batch_of(task, size=4):
    rng = np.random.default_rng(1)
    batch = (
        tiny.batch(task, size)
        if "text" in task.modalities
        else {
            "image": {
                "pixels": jnp.asarray(rng.uniform(0, 255, (size, 16, 16, 3)), jnp.float32),
                "present": jnp.ones(size, bool),
            }
        }
    )
    signal = jnp.asarray(rng.normal(size=(size, 8)), jnp.float32)
    return batch | {"tone": {"signal": signal, "present": jnp.ones(size, bool).at[2].set(False)}}


def test_three_modalities_have_a_loss_a_pair():
    config = config_of(objectives__captioning__weight=0.0)
    config.objectives.contrastive.between = "text,image,tone"
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    params, batch = tiny.params(task), batch_of(task)
    key = jax.random.key(0)
    metrics, embedded = jax.jit(
        lambda p: task.metrics_and_embedded(p, batch, key, deterministic=True)
    )(params)
    image, tone, text = (np.float64(each) for each in embedded["contrastive"].vectors)
    scale = float(metrics["contrastive/scale"][0])
    total, count = 0.0, 0
    for name, one, other, there in (
        ("image_tone", image, tone, [0, 1, 3]),
        ("image_text", image, text, [0, 1, 2, 3]),
        ("tone_text", tone, text, [0, 1, 3]),
    ):
        logits = scale * one[there] @ other[there].T
        rows = np.log(np.exp(logits).sum(1)) + np.log(np.exp(logits).sum(0))
        expected = (0.5 * rows - np.diag(logits)).sum()
        np.testing.assert_allclose(metrics[f"contrastive/loss_{name}"][0], expected, rtol=1e-4)
        total, count = total + expected, count + len(there)
    np.testing.assert_allclose(metrics["contrastive/loss"], (total, count), rtol=1e-4)
    heads = {name for name in params["heads_contrastive"] if "project" in name}
    assert heads == {"project_image", "project_tone", "project_text"}


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_a_config_without_text_is_trained(fusion):
    config = config_of(model__fusion=fusion, objectives__captioning__weight=0.0)
    config.objectives.contrastive.between = "image,tone"
    config = config.to_dict()
    del config["model"]["modalities"]["text"]
    task = build_task(Config(config), tiny.tokenizer())
    params, batch = tiny.params(task), batch_of(task)
    assert not any("text" in name for name in params)
    loss = jax.jit(lambda p: task.metrics(p, batch, jax.random.key(0), deterministic=True))
    found = loss(params)["contrastive/loss"]
    assert np.isfinite(found[0]) and found[1] == 3


def test_two_contrasts_read_their_text_once():
    """The text's tokens count once in the compiled FLOPs, and apart they count twice."""
    flops = {}
    for name, rule in (("one", "separate"), ("once", "separate"), ("twice", "separate_causal")):
        config = config_of(objectives__captioning__weight=0.0, model__layers=2)
        config.objectives.audio = {**config.objectives.contrastive.to_dict(), "between": "tone"}
        config.objectives.audio.rule = rule
        if name == "one":
            config.objectives.audio.weight = 0.0
            del config.model.modalities.tone
        task = build_task(Config(config.to_dict()), tiny.tokenizer())
        params = tiny.params(task)
        batch = batch_of(task) if name != "one" else tiny.batch(task)
        run = jax.jit(
            lambda p, t=task, b=batch: t.metrics(p, b, jax.random.key(0), deterministic=True)
        )
        flops[name] = run.lower(params).compile().cost_analysis()["flops"]
    tones, text = 2, 12
    grown = flops["once"] / flops["one"]
    assert grown < (4 + text + tones) / (4 + text) * 1.1
    assert flops["twice"] > flops["once"] * (4 + 2 * text + tones) / (4 + text + tones) * 0.9


def test_spaces_that_have_nothing_in_common_are_not_compared():
    config = config_of(objectives__captioning__weight=0.0)
    config.objectives.contrastive.between = "image,tone"
    config.objectives.other = {**config.objectives.contrastive.to_dict(), "between": "tone,text"}
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    found = LoadedModel(task, tiny.params(task), one_device_mesh(), Config(config.to_dict()), 1)
    assert found.embed_images([PICTURE]).shape == found.embed_texts(["high"]).shape == (1, 8)
    with pytest.raises(ValueError, match="have no common space"):
        found.classify([PICTURE], ["high"])
    assert usual_best(Config(config.to_dict())) == "tone_to_image/recall_at_1"
    config.objectives.contrastive.between = "text"
    config.objectives.other.weight = 0.0
    assert usual_best(Config(config.to_dict())) == ""


def test_a_tower_of_any_modality_is_started_from(tmp_path):
    def config():
        found = config_of(model__fusion="late", objectives__captioning__weight=0.0)
        found.objectives.contrastive.between = "image,tone"
        return found

    source = config()
    source.model.towers = {"tone": {"width": 8, "layers": 1, "heads": 1, "feed_forward": 8}}
    task = build_task(Config(source.to_dict()), tiny.tokenizer())
    saved = tiny.params(task, 3)
    tiny.write_run(tmp_path / "run", source, saved)
    asked = config()
    asked.model.start_from.tone = str(tmp_path / "run")
    adopted = Config(config_from_run(asked, ()).to_dict())
    assert adopted.model.towers.tone.width == 8
    params = tiny.params(build_task(adopted, tiny.tokenizer()), 4)
    found = load_params(params, adopted, weights_to_start_from(adopted))
    for name in ("towers_tone", "embedders_tone"):
        jax.tree.map(np.testing.assert_array_equal, found[name], saved[name])
    asked.model.towers = {"tone": {"width": 4}}
    with pytest.raises(ValueError, match="model.start_from.tone: model.modalities must declare"):
        config_from_run(asked, ())


def test_names_of_a_contrast():
    assert named_modalities("image", "f") == ("image", "text")
    assert named_modalities("text", "f") == ("text",)
    assert named_modalities("text, audio,image", "f") == ("audio", "image", "text")
    assert named_modalities(("a", "b"), "f") == ("a", "b")
    for wrong in ("", "a,,b", "a,a"):
        with pytest.raises(ValueError, match="f=.*name each modality once"):
            named_modalities(wrong, "f")


def test_each_modality_may_have_a_tower_of_its_own():
    config = config_of(model__fusion="late", objectives__captioning__weight=0.0)
    config.objectives.contrastive.between = "image,tone"
    config.model.towers = {"tone": {"width": 8, "layers": 1, "heads": 1, "feed_forward": 8}}
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    shapes = tiny.drawn(task, 0)
    tone, image = (
        shapes[f"towers_{name}"]["layers"]["block_0"]["attention_norm"]["scale"].shape
        for name in ("tone", "image")
    )
    assert tone == (1, 8) and image == (2, 16)
    config.model.fusion = "gated_cross_attention"
    with pytest.raises(ValueError, match="model.towers.tone.width=8: what gated cross-attention"):
        build_task(Config(config.to_dict()), tiny.tokenizer())
    config.model.towers = {"sound": {"width": 8}}
    with pytest.raises(ValueError, match="model.towers.sound: model.modalities has no such"):
        build_task(Config(config.to_dict()), tiny.tokenizer())


def test_a_modality_without_a_head_can_be_read_and_not_written():
    task = build_task(Config(config_of().to_dict()), tiny.tokenizer())

    def logits(model):
        return model.logits(jnp.zeros((1, 2, 16)), of="tone")

    with pytest.raises(ValueError, match="model.modalities.tone has no logits"):
        task.model.apply({"params": tiny.params(task)}, method=logits)
