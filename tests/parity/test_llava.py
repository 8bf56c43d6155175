"""LLaVA: the same scores of the next token, wherever the picture stands in its text."""

import json

import hugging_face as hf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from unified_mm.import_weights import import_directory, write_run
from unified_mm.inference.decoding import Decoding
from unified_mm.inference.loaded import load

PICTURE = hf.VOCABULARY - 3
VISION = hf.VISION | {"model_type": "clip_vision_model"}
TEXT = hf.SMALL | {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = {
    "as published": {},
    "whole": {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    "other numbers": {"vision_feature_layer": 1, "multimodal_projector_bias": False},
    "mistral": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 6, "sliding_window": None},
        "projector_hidden_act": "gelu_pytorch_tanh",
    },
    "tied": {"text_config": TEXT | {"tie_word_embeddings": True}},
}


def llava(folder, **options):
    """A random LLaVA, and its directory with a tokenizer that knows `<image>`."""
    import transformers

    given = {"vision_config": VISION, "text_config": TEXT, "image_token_index": PICTURE}
    config = transformers.LlavaConfig(**given | options)
    model = hf.randomised(transformers.LlavaForConditionalGeneration(config))
    hf.saved(model, folder)
    said = json.loads((folder / "tokenizer.json").read_text())
    spare = [f"<spare {number}>" for number in range(len(said["model"]["vocab"]), PICTURE)]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(said))
    tokenizer.add_special_tokens([*spare, "<image>"])
    assert tokenizer.token_to_id("<image>") == PICTURE
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def theirs(model, imported, images, ids, valid):
    """Their scores of the next token at each of our tokens, one row at a time."""
    import torch

    patches = 17 - imported.config["model"]["projector"]["skip"]
    found = []
    for image, row, length in zip(images, ids, valid.sum(1), strict=True):
        spread = np.concatenate(
            [np.repeat(i, patches if i == PICTURE else 1) for i in row[:length]]
        )
        with torch.no_grad():
            scores = model(
                input_ids=torch.tensor(spread[None]),
                pixel_values=torch.tensor(hf.normalised(image[None], imported)),
            ).logits[0]
        last = np.cumsum(np.where(row[:length] == PICTURE, patches, 1)) - 1
        found.append(np.asarray(scores)[last])
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_llava(shape, tmp_path):
    model = llava(tmp_path / "llava", **SHAPES[shape])
    imported, task = hf.opened(tmp_path / "llava")
    images = hf.pixels(3, 16)
    prompts = ("", "a red <image> square", "red")
    text = task.modalities["text"]
    rows = [text.encode(prompt, "of size") for prompt in prompts]
    ids, valid = (np.stack([row[key] for row in rows]) for key in ("ids", "valid"))
    assert (ids == PICTURE).sum(1).tolist() == [1, 1, 1]
    assert ids[1].tolist().index(PICTURE) > 2 and ids[2].tolist().index(PICTURE) == 1
    batch = hf.text_batch(ids, valid)
    rows = jnp.ones(len(images), bool)
    batch = {"image": {"pixels": jnp.asarray(images), "present": rows}, **batch}
    ours = hf.logits(imported, task, batch)
    for mine, expected, length in zip(
        ours, theirs(model, imported, images, ids, valid), valid.sum(1), strict=True
    ):
        hf.assert_close(mine[:length], expected)


def test_a_run_of_it_writes_what_theirs_writes(tmp_path):
    import torch

    model = llava(tmp_path / "llava")
    imported = import_directory(tmp_path / "llava")
    run = write_run(imported, tmp_path / "run")
    loaded = load(run.path)
    images, prompts = hf.pixels(3, 16, seed=4), ("a red <image> square", "of size", "red <image>")
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        ids = np.array(loaded.task.tokenizer.encode_prompt(prompt))
        spread = np.concatenate([np.repeat(i, 16 if i == PICTURE else 1) for i in ids])
        for _ in range(6):
            with torch.no_grad():
                scores = model(
                    input_ids=torch.tensor(spread[None]),
                    pixel_values=torch.tensor(hf.normalised(image[None], imported)),
                ).logits[0, -1]
            spread = np.append(spread, int(scores.argmax()))
        expected.append(spread[-6:].tolist())
    written = loaded.generate(images, prompts, Decoding(tokens=6))
    for (mine,), theirs_of_it in zip(written, expected, strict=True):
        assert list(mine.tokens) == theirs_of_it[: len(mine.tokens)]
    assert len({token for each in expected for token in each}) > 1
