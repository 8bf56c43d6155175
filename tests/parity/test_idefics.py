"""IDEFICS: the same scores of the next token where texts have several images, or none yet."""

import hugging_face as hf
import jax.numpy as jnp
import numpy as np
import pytest

VISION = {
    "embed_dim": 24,
    "image_size": 16,
    "intermediate_size": 40,
    "patch_size": 8,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
}
PERCEIVER = {
    "use_resampler": True,
    "resampler_n_latents": 3,
    "resampler_depth": 2,
    "resampler_n_heads": 2,
    "resampler_head_dim": 6,
}
SHAPES = {
    "resampled": {
        "num_hidden_layers": 4,
        "cross_layer_interval": 2,
        "use_resampler": True,
        "qk_layer_norms": True,
        "additional_vocab_size": 2,
        "vocab_size": hf.VOCABULARY - 2,
        "perceiver_config": PERCEIVER | {"qk_layer_norms_perceiver": True},
    },
    "every feature": {
        "num_hidden_layers": 2,
        "alpha_type": "vector",
        "tie_word_embeddings": True,
        "vocab_size": hf.VOCABULARY,
    },
    "resampled without norms": {
        "num_hidden_layers": 3,
        "cross_layer_interval": 3,
        "use_resampler": True,
        "vocab_size": hf.VOCABULARY,
        "perceiver_config": PERCEIVER,
    },
}
# The image that each token sees, counted from 1; 0 is before any.
LATEST = np.array([[0, 0, 1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]])


@pytest.mark.parametrize("shape", SHAPES)
def test_idefics(shape, tmp_path):
    import torch
    import transformers

    config = transformers.IdeficsConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        vision_config=VISION,
        **SHAPES[shape],
    )
    model = hf.randomised(transformers.IdeficsForVisionText2Text(config))
    with torch.no_grad():
        for layer in model.model.gated_cross_attn_layers:
            layer.alpha_cross_attn.add_(0.7)
            layer.alpha_dense.sub_(0.5)
    imported, task = hf.opened(hf.saved(model, tmp_path / "idefics"))
    rows, length = LATEST.shape
    slots = LATEST.max()
    images = hf.pixels(rows * slots, 16).reshape(rows, slots, 16, 16, 3)
    ids = np.random.default_rng(1).integers(0, hf.VOCABULARY, (rows, length))
    seen = LATEST[..., None] == np.arange(1, slots + 1)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(ids),
            pixel_values=torch.tensor(hf.normalised(images, imported)),
            image_attention_mask=torch.tensor(seen.astype(int)),
        ).logits
    hf.assert_close(hf.logits(imported, task, placed(images, ids)), theirs)


def placed(images, ids):
    """Images and tokens in one document a row, as `data.interleave` places them."""
    batch = hf.text_batch(ids)
    rows, slots = images.shape[:2]
    zeros = jnp.zeros(ids.shape, jnp.int32)
    batch["text"] |= {
        "position": zeros + jnp.arange(ids.shape[1]),
        "segment": jnp.asarray(LATEST, jnp.int32),
        "document": zeros,
    }
    none = jnp.zeros((rows, slots), jnp.int32)
    batch["image"] = {
        "pixels": jnp.asarray(images),
        "present": jnp.ones((rows, slots), bool),
        "position": none,
        "segment": none + jnp.arange(1, slots + 1),
        "document": none,
    }
    return batch
