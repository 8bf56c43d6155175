"""A whole imported model that was trained on here is exported: transformers computes the same."""

from pathlib import Path

import commands
import hugging_face as hf
import numpy as np
import pytest
import tiny

import unified_mm
from unified_mm.export_weights import export
from unified_mm.import_weights import Imported, import_directory, write_run

RECIPE = f"--config={Path(__file__).parents[2] / 'configs' / 'coco.py'}:tiny"
GELU = {"hidden_act": "gelu_pytorch_tanh"}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOWERS = {
    "CLIP": {"text_config": hf.TEXT, "vision_config": hf.VISION, "projection_dim": 8},
    "Siglip": {
        "text_config": hf.TEXT | {"projection_size": 24, "eos_token_id": 2, "pad_token_id": 2},
        "vision_config": hf.VISION | GELU,
    },
}
LANGUAGE = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "vocab_size": 310},
    "Llama": hf.SMALL | HEADS,
    "Qwen2": hf.SMALL | HEADS,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIFIED_MM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny.write_coco(tmp_path_factory.mktemp("data") / "coco")


def made(kind, options, folder, **names):
    """A directory of a random model, and its class."""
    import transformers

    class_ = getattr(transformers, kind)
    model = hf.randomised(class_(class_.config_class(**options)))
    hf.saved(model, folder)
    hf.write_tokenizer(folder, **names)
    return class_


def trained(folder, data, *fields):
    """Imports a directory, trains it whole for two steps and exports it again."""
    imported = import_directory(folder)
    run = write_run(imported, folder.parent / "run").path
    given = {
        "data.dir": data,
        "model.start_from.whole": run,
        "train.steps": 2,
        "train.batch_size": 8,
        "train.warmup_steps": 0,
        "train.learning_rate": 0.01,
        "evaluation.batch_size": 8,
    }
    flags = [f"--config.{name}={value}" for name, value in given.items()]
    assert commands.run(RECIPE, *flags, *fields, f"--workdir={folder.parent / 'tuned'}") == 0
    model = unified_mm.load(folder.parent / "tuned")
    config = model.config.as_dict()
    family = export(config, model.params, model.task.tokenizer, folder.parent / "out")
    assert family.name == imported.family
    moved = hf.jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), dict(model.params), imported.params
    )
    assert max(hf.jax.tree.leaves(moved)) > 0.01
    return Imported(config, model.params, model.task.tokenizer, "both", "", {}), model.task


@pytest.mark.parametrize("kind", TOWERS)
def test_towers(kind, data, tmp_path):
    import torch

    names = {"eos_token": "<unk>"} if kind == "CLIP" else {"pad_token": "<eos>"}
    class_ = made(f"{kind}Model", TOWERS[kind], tmp_path / "theirs", **names)
    imported, task = trained(tmp_path / "theirs", data)
    images = hf.pixels(3, 16)
    ids, batch = hf.texts(task)
    again = class_.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        values = torch.tensor(hf.normalised(images, imported))
        theirs = again(input_ids=torch.tensor(ids), pixel_values=values)
    hf.assert_close(hf.contrast(imported, task, images, batch), theirs.logits_per_text)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_language_models(kind, data, tmp_path):
    import torch

    class_ = made(
        f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM",
        LANGUAGE[kind],
        tmp_path / "theirs",
    )
    alone = "--config.objectives.contrastive.weight=0.0"
    imported, task = trained(tmp_path / "theirs", data, alone)
    ids = np.random.default_rng(0).integers(0, hf.VOCABULARY, (2, 11))
    again = class_.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        theirs = again(input_ids=torch.tensor(ids)).logits
    hf.assert_close(hf.logits(imported, task, hf.text_batch(ids)), theirs)
