"""A modality, its data and its recipe from outside the package, through the command."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import jax
import numpy as np
import pytest
import tiny
import toy_tone

import unified_mm
from unified_mm.config import Config
from unified_mm.data.manifest import summary, without_bad_parts
from unified_mm.task import build_task


def test_a_third_modality_is_new_files_alone(tmp_path, capfd):
    recipe = Path(__file__).parent / "toy_recipe.py"
    (tmp_path / "data").mkdir()
    flags = (f"--config={recipe}", f"--config.data.dir={tmp_path / 'data'}")
    assert commands.run(*flags, f"--workdir={tmp_path / 'run'}") == 0
    # Captions under `prefix` cannot share the pass of contrast; under the other rule they can.
    told = re.search(r"by rule: prefix ([\d.]+), prefix_separate ([\d.]+)", capfd.readouterr().out)
    assert told and float(told[2]) < 0.9 * float(told[1])
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


def test_its_bad_parts_are_named_and_left_out(tmp_path):
    tones = toy_tone.ToneSource(SimpleNamespace(dir=str(tmp_path))).manifest("train")
    read = {"tone": toy_tone.Tone("tone", 8, 4), "image": object()}
    assert without_bad_parts(tones, read, 0.0) is tones
    records = list(tones.records)
    for number, part in ((3, [0.0] * 7), (5, "hum")):
        records[number] = replace(records[number], parts={**records[number].parts, "tone": part})
    bad = replace(tones, records=tuple(records))
    found = without_bad_parts(bad, read, 0.05)
    assert [record.id for record in found.records] == [i for i in range(64) if i not in (3, 5)]
    assert found.fingerprint != tones.fingerprint
    told = summary(found)
    assert "62 tones" in told and "left out: 1 x 7 values, not 8 (tone of 3)" in told
    with pytest.raises(ValueError, match=r"2 of the 64 tones of 'train' .* first tone of 3"):
        without_bad_parts(bad, read, 0.03)


DOCUMENTS = """
import toy_recipe


def get_config():
    config = toy_recipe.get_config()
    config.data.documents.update({"images": 2, "length": 12})
    config.objectives.captioning.rule = "interleaved"
    config.objectives.contrastive.weight = 0.0
    config.train.phases = {"documents": {"steps": 60, "data": "documents"}}
    return config
"""


@pytest.mark.slow
def test_documents_of_tones_are_trained_on(tmp_path):
    """Documents hold what a modality from outside reads, in the order of the file."""
    (tmp_path / "data").mkdir()
    toy_tone.ToneSource(SimpleNamespace(dir=str(tmp_path / "data"))).manifest("train")
    lines = []
    for number in range(24):
        kind, pace = (("high", 2.5), ("low", 0.4))[number % 2]
        wave = np.sin(np.arange(8) * pace + number).tolist()
        parts = [{"image": f"train{number}.png"}, {"tone": wave}, {"text": f"{kind} tone"}]
        lines.append(json.dumps({"parts": parts}))
    (tmp_path / "data" / "pages.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / "recipe.py"
    recipe.write_text(DOCUMENTS)
    pages = tmp_path / "data" / "pages.jsonl"
    flags = (
        f"--config={recipe}",
        f"--config.data.dir={tmp_path / 'data'}",
        f"--config.data.documents.file={pages}",
    )
    commands.train(*flags, f"--workdir={tmp_path / 'run'}")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["captioning/loss"] for line in lines if "captioning/loss" in line]
    assert losses[-1] < 0.5 * losses[0]


def test_a_task_embeds_without_a_run():
    config = tiny.config_dict(objectives__captioning__weight=0.0, objectives__matching__weight=0.0)
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    params, batch = tiny.params(task), tiny.batch(task)
    embed = jax.jit(lambda of: task.embed(params, batch, of), static_argnums=0)
    image, text = embed("image"), embed("text")
    losses = jax.jit(
        lambda key: task.metrics_and_embedded(params, batch, key, deterministic=True)[1]
    )(jax.random.key(0))
    for mine, theirs in zip((image, text), losses["contrastive"].vectors, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="this model reads no tone"):
        task.embed(params, batch, "tone")
