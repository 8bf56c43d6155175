"""CLIP and SigLIP: the same embeddings, scale and bias; ViT: the same class token."""

import json

import hugging_face as hf
import jax.numpy as jnp
import numpy as np
import pytest

SHAPES = [
    ({}, {}),
    ({"hidden_act": "gelu"}, {"image_size": 24, "patch_size": 8, "hidden_act": "gelu"}),
]


@pytest.mark.parametrize(("text", "vision"), SHAPES, ids=("quick", "larger patches"))
def test_clip(text, vision, tmp_path):
    import torch
    import transformers

    config = transformers.CLIPConfig(
        text_config=hf.TEXT | text, vision_config=hf.VISION | vision, projection_dim=8
    )
    model = hf.randomised(transformers.CLIPModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(5.6)  # above 100: it is used as it is saved
    hf.saved(model, tmp_path / "clip")
    hf.write_tokenizer(tmp_path / "clip", eos_token="<unk>")
    imported, task = hf.opened(tmp_path / "clip")
    images = hf.pixels(3, config.vision_config.image_size)
    ids, batch = hf.texts(task)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(ids), pixel_values=torch.tensor(hf.normalised(images, imported))
        )
    hf.assert_close(hf.contrast(imported, task, images, batch), theirs.logits_per_text)
    assert imported.part == "both"


@pytest.mark.parametrize(
    ("said", "end"), [(4, "<unk>"), (2, "<eos>")], ids=("another", "the highest id")
)
def test_clip_that_pools_where_its_tokenizer_does_not_end(said, end, tmp_path):
    import transformers

    text = hf.TEXT | {"eos_token_id": said}
    config = transformers.CLIPConfig(text_config=text, vision_config=hf.VISION, projection_dim=8)
    hf.saved(transformers.CLIPModel(config), tmp_path / "clip")
    hf.write_tokenizer(tmp_path / "clip", eos_token=end)
    with pytest.raises(ValueError, match=f"text_config: eos_token_id={said} pools texts at"):
        hf.opened(tmp_path / "clip")


def test_clip_that_pools_at_the_highest_id_where_that_ends_a_text(tmp_path):
    import torch
    import transformers

    text = hf.TEXT | {"eos_token_id": 2}  # as the first published files have it
    config = transformers.CLIPConfig(text_config=text, vision_config=hf.VISION, projection_dim=8)
    model = hf.randomised(transformers.CLIPModel(config))
    hf.saved(model, tmp_path / "clip")
    known = json.loads((tmp_path / "clip" / "tokenizer.json").read_text())["model"]["vocab"]
    hf.write_tokenizer(tmp_path / "clip", eos_token=max(known, key=known.__getitem__))
    imported, task = hf.opened(tmp_path / "clip")
    ids, batch = hf.texts(task)
    images = hf.pixels(3, 16)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(ids), pixel_values=torch.tensor(hf.normalised(images, imported))
        )
    hf.assert_close(hf.contrast(imported, task, images, batch), theirs.logits_per_text)


CUT = {"image_size": 19, "patch_size": 4}  # three pixels on a side fill no patch


@pytest.mark.parametrize(
    "vision", [*(vision for _, vision in SHAPES), CUT], ids=("small", "large", "cut")
)
def test_siglip(vision, tmp_path):
    import torch
    import transformers

    config = transformers.SiglipConfig(
        text_config=hf.TEXT | {"projection_size": 24, "eos_token_id": 2, "pad_token_id": 2},
        vision_config=hf.VISION | vision | {"hidden_act": "gelu_pytorch_tanh"},
    )
    model = hf.randomised(transformers.SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(4.8)  # above 100, as the published ones are
    hf.saved(model, tmp_path / "siglip")
    hf.write_tokenizer(tmp_path / "siglip", pad_token="<eos>")
    imported, task = hf.opened(tmp_path / "siglip")
    images = hf.pixels(3, config.vision_config.image_size)
    ids, batch = hf.texts(task)
    assert (ids[:, -1] == 2).all() and ids[0, 0] != 1  # padded with ends, nothing before the text
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(ids), pixel_values=torch.tensor(hf.normalised(images, imported))
        )
    hf.assert_close(hf.contrast(imported, task, images, batch), theirs.logits_per_text)


@pytest.mark.parametrize("options", ({}, {"qkv_bias": False, "patch_size": 8}), ids=str)
@pytest.mark.parametrize("classifier", (False, True), ids=("model", "classifier"))
def test_vit(options, classifier, tmp_path):
    import jax
    import torch
    import transformers

    from unified_mm.config import Config
    from unified_mm.import_weights import import_directory
    from unified_mm.task import build_task

    config = transformers.ViTConfig(**hf.VISION | options)
    kind = transformers.ViTForImageClassification if classifier else transformers.ViTModel
    model = hf.randomised(kind(config))
    model.save_pretrained(tmp_path / "vit")
    imported = import_directory(tmp_path / "vit")
    assert imported.part == "image" and imported.tokenizer is None
    assert any("classifier" if classifier else "pooler" in reason for reason in imported.ignored)
    assert set(imported.params) == {"embedders_image", "towers_image"}
    task = build_task(Config(imported.config), hf.tiny.tokenizer())
    images = hf.pixels(2, 16)

    def look(model, batch):
        return model.look("image", batch).embeddings

    batch = {"image": {"pixels": jnp.asarray(images), "present": jnp.ones(2, bool)}}
    ours = jax.jit(lambda p, b: task.model.apply({"params": p}, b, method=look))(
        imported.params, batch
    )
    with torch.no_grad():
        backbone = model.vit if classifier else model
        values = torch.tensor(hf.normalised(images, imported))
        hf.assert_close(np.asarray(ours), backbone(pixel_values=values).last_hidden_state)


@pytest.mark.parametrize("projected", (False, True), ids=("plain", "projected"))
def test_the_text_tower_of_clip_alone(projected, tmp_path):
    import torch
    import transformers

    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    config = transformers.CLIPTextConfig(**hf.TEXT, projection_dim=8)
    model = hf.randomised(getattr(transformers, kind)(config))
    hf.saved(model, tmp_path / "clip")
    hf.write_tokenizer(tmp_path / "clip", eos_token="<unk>")
    imported, task = hf.opened(tmp_path / "clip")
    ids, batch = hf.texts(task)
    (objective,) = task.objectives
    ours = hf.apply(imported, task, lambda m, b: objective.embed(m, b, "text"), batch)
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids))
    theirs = found.text_embeds if projected else found.pooler_output
    hf.assert_close(ours, theirs / theirs.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("projected", (False, True), ids=("plain", "projected"))
def test_the_image_tower_of_clip_alone(projected, tmp_path):
    import jax
    import torch
    import transformers

    from unified_mm.config import Config
    from unified_mm.import_weights import import_directory
    from unified_mm.task import build_task

    kind = "CLIPVisionModelWithProjection" if projected else "CLIPVisionModel"
    config = transformers.CLIPVisionConfig(**hf.VISION, projection_dim=8)
    model = hf.randomised(getattr(transformers, kind)(config))
    model.save_pretrained(tmp_path / "clip")
    imported = import_directory(tmp_path / "clip")
    assert imported.part == "image" and bool(imported.ignored) == projected
    task = build_task(Config(imported.config), hf.tiny.tokenizer())
    images = hf.pixels(2, 16)
    batch = {"image": {"pixels": jnp.asarray(images), "present": jnp.ones(2, bool)}}

    def look(params, batch):
        method = lambda m, b: m.look("image", b).embeddings[:, 0]  # noqa: E731
        return task.model.apply({"params": params}, batch, method=method)

    with torch.no_grad():
        found = model(pixel_values=torch.tensor(hf.normalised(images, imported)))
        last = found.last_hidden_state[:, 0]
        theirs = (model.vision_model if projected else model).post_layernorm(last)
    hf.assert_close(np.asarray(jax.jit(look)(imported.params, batch)), theirs)
