"""A modality, its data and its recipe from outside the package, through the command."""

import json
from pathlib import Path

import commands
import jax
import pytest
import tiny

import unified_mm
from unified_mm.config import Config
from unified_mm.task import build_task


def test_a_third_modality_is_new_files_alone(tmp_path):
    recipe = Path(__file__).parent / "toy_recipe.py"
    (tmp_path / "data").mkdir()
    flags = (f"--config={recipe}", f"--config.data.dir={tmp_path / 'data'}")
    assert commands.run(*flags, f"--workdir={tmp_path / 'run'}") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["captioning/loss"] for line in lines if "captioning/loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    # The pictures are noise and the words are equally frequent: only the tone tells them apart.
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scores"]["caption/bleu_1"] > 0.9
    assert result["chance"]["caption/bleu_1"] <= 1.0
    model = unified_mm.load(tmp_path / "run")
    assert "embedders_tone" in model.params
    assert model.embed_images([tmp_path / "data" / "val0.png"]).shape == (1, 8)


def test_a_modality_that_nothing_reads_is_refused():
    config = tiny.config_dict(objectives__matching__weight=0.0)
    config.objectives.captioning.rule = "separate"
    config.model.modalities.tone = {"type": "toy_tone:Tone", "samples": 8, "frame": 4}
    with pytest.raises(ValueError, match="model.modalities.tone is declared"):
        build_task(Config(config.to_dict()), tiny.tokenizer())


def test_a_modality_that_is_read_must_be_declared():
    config = tiny.config_dict(objectives__contrastive__between="tone")
    with pytest.raises(ValueError, match="reads modality 'tone'"):
        build_task(Config(config.to_dict()), tiny.tokenizer())


def test_context_modalities_come_in_order_and_text_last():
    config = tiny.config_dict()
    config.model.modalities.tone = {"type": "toy_tone:Tone", "samples": 8, "frame": 4}
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    assert list(task.modalities) == ["image", "tone", "text"]
    batch = jax.tree.map(jax.numpy.asarray, task.example_batch(2))
    read = jax.jit(lambda params, key: task.metrics(params, batch, key, deterministic=True))
    metrics = read(tiny.params(task), jax.random.key(0))
    assert float(metrics["captioning/loss"][1]) == 0.0
