"""What is exported is what was imported, bit by bit, and transformers reads it."""

import hugging_face as hf
import jax
import numpy as np
import pytest
import safetensors.numpy

from unified_mm.export_weights import export
from unified_mm.import_weights import import_directory

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 310}
LLAMA = {
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "biased untied": {"num_attention_heads": 2, "attention_bias": True, "mlp_bias": True},
    "wide heads": {"num_attention_heads": 2, "head_dim": 12},
}
GPT2 = {"tied": {}, "untied": {"tie_word_embeddings": False, "n_inner": 24}}


def check(model, folder, again):
    """There, back, and there again; returns the tensors that were written."""
    hf.saved(model, folder)
    hf.write_tokenizer(folder, eos_token="<unk>")
    imported = import_directory(folder)
    export(imported.config, imported.params, imported.tokenizer, again)
    written = safetensors.numpy.load_file(again / "model.safetensors")
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    assert written.keys() == theirs.keys()
    for name, values in theirs.items():
        assert written[name].shape == values.shape and written[name].dtype == values.dtype, name
        assert np.array_equal(written[name], values), name
    second = import_directory(again)
    assert {**second.config, "imported": 0} == {**imported.config, "imported": 0}
    assert jax.tree.all(jax.tree.map(np.array_equal, second.params, imported.params))
    return type(model).from_pretrained(again).eval()


@pytest.mark.parametrize("shape", GPT2)
def test_gpt2(shape, tmp_path):
    import torch
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=20, vocab_size=310, **GPT2[shape]
    )
    model = hf.randomised(transformers.GPT2LMHeadModel(config))
    again = check(model, tmp_path / "theirs", tmp_path / "ours")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("shape", LLAMA)
def test_llama(shape, tmp_path):
    import torch
    import transformers

    config = transformers.LlamaConfig(
        **TEXT, max_position_embeddings=20, rope_theta=300.0, **LLAMA[shape]
    )
    model = hf.randomised(transformers.LlamaForCausalLM(config))
    again = check(model, tmp_path / "theirs", tmp_path / "ours")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


SCALED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MORE = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 12},
    "Mistral": {"sliding_window": 4},
    "Llama": {"rope_parameters": {**SCALED, "rope_theta": 100.0}},
}


@pytest.mark.parametrize("kind", MORE)
def test_those_built_like_llama(kind, tmp_path):
    import torch
    import transformers

    class_ = getattr(transformers, f"{kind}ForCausalLM")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 20}
    model = hf.randomised(class_(class_.config_class(**TEXT, **heads, **MORE[kind])))
    again = check(model, tmp_path / "theirs", tmp_path / "ours")
    assert type(again) is class_
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_siglip(tmp_path):
    import torch
    import transformers

    text = TEXT | {"num_attention_heads": 2, "max_position_embeddings": 12}
    text |= {"projection_size": 24, "eos_token_id": 2, "pad_token_id": 2}
    vision = TEXT | {"num_attention_heads": 4, "image_size": 19, "patch_size": 4}
    vision |= {"hidden_size": 24}
    del vision["vocab_size"]
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    model = hf.randomised(transformers.SiglipModel(config))
    again = check(model, tmp_path / "theirs", tmp_path / "ours")
    values, ids = torch.randn(2, 3, 19, 19), torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        one, other = (
            each(input_ids=ids, pixel_values=values).logits_per_text for each in (again, model)
        )
    assert torch.equal(one, other)


def test_clip(tmp_path):
    import torch
    import transformers

    text = TEXT | {"num_attention_heads": 2, "max_position_embeddings": 12, "hidden_act": "gelu"}
    text["eos_token_id"] = 3
    vision = TEXT | {"num_attention_heads": 4, "image_size": 16, "patch_size": 4, "hidden_size": 24}
    del vision["vocab_size"]
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = hf.randomised(transformers.CLIPModel(config))
    again = check(model, tmp_path / "theirs", tmp_path / "ours")
    values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        one, other = (
            each.get_image_features(pixel_values=values).pooler_output for each in (again, model)
        )
    assert torch.equal(one, other)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert processor.crop_size["height"] == 16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.eos_token == "<unk>" and again.config.text_config.eos_token_id == 3


def test_a_bounded_scale_is_exported_as_it_was_used(tmp_path):
    import transformers

    sizes = TEXT | {"num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 3}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config)
    model.logit_scale.data.fill_(5.6)
    hf.saved(model, tmp_path / "theirs")
    hf.write_tokenizer(tmp_path / "theirs", eos_token="<unk>")
    imported = import_directory(tmp_path / "theirs")
    assert not imported.config["objectives"]["contrastive"]["bound_scale"]
    for bounded, scale in ((False, np.exp(5.6)), (True, 100.0)):
        imported.config["objectives"]["contrastive"]["bound_scale"] = bounded
        out = tmp_path / f"bounded {bounded}"
        export(imported.config, imported.params, imported.tokenizer, out)
        again = transformers.CLIPModel.from_pretrained(out)
        assert np.isclose(again.logit_scale.exp().item(), scale, rtol=1e-4)


@pytest.mark.parametrize("projected", (False, True), ids=("plain", "projected"))
@pytest.mark.parametrize("whole", (False, True), ids=("alone", "of a whole CLIP"))
def test_the_text_tower_of_clip(whole, projected, tmp_path):
    """`text_model` and its projection, of a run of the tower alone or of a whole CLIP."""
    import torch
    import transformers

    if whole:
        model = whole_clip(tmp_path / "theirs")
    else:
        kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        config = transformers.CLIPTextConfig(**hf.TEXT, projection_dim=8)
        model = hf.randomised(getattr(transformers, kind)(config))
        hf.saved(model, tmp_path / "theirs")
        hf.write_tokenizer(tmp_path / "theirs", eos_token="<unk>")
    imported = import_directory(tmp_path / "theirs")
    part = "text" if whole else ""
    export(imported.config, imported.params, imported.tokenizer, tmp_path / "ours", part)
    assert not list((tmp_path / "ours").glob("preprocessor*"))
    class_ = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    again = class_.from_pretrained(tmp_path / "ours").eval()
    ids = torch.tensor([[1, 5, 7, hf.END, 0, 0]])
    key = "text_embeds" if projected else "pooler_output"
    with torch.no_grad():
        expected = model.get_text_features(ids) if whole else model(ids)[key]
        if whole and not projected:
            expected = model.text_model(ids).pooler_output
        expected = getattr(expected, "pooler_output", expected)
        assert torch.equal(again(ids)[key], expected)


@pytest.mark.parametrize("whole", (False, True), ids=("alone", "of a whole CLIP"))
def test_the_image_tower_of_clip(whole, tmp_path):
    import torch
    import transformers

    from unified_mm.export_weights import main
    from unified_mm.import_weights import write_run

    if whole:
        model = whole_clip(tmp_path / "theirs").vision_model
    else:
        config = transformers.CLIPVisionConfig(**hf.VISION)
        model = hf.randomised(transformers.CLIPVisionModel(config))
        model.save_pretrained(tmp_path / "theirs")
    run = write_run(import_directory(tmp_path / "theirs"), tmp_path / "run").path
    flags = ["--part=image"] if whole else []
    with pytest.raises(SystemExit) as ended:
        main([f"--run={run}", f"--out={tmp_path / 'ours'}", *flags])
    assert ended.value.code == 0
    written = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert written == ["config.json", "model.safetensors", "preprocessor_config.json"]
    again = transformers.CLIPVisionModel.from_pretrained(tmp_path / "ours").eval()
    pixels = torch.tensor(hf.pixels(2, 16)).movedim(-1, 1) / 100
    with torch.no_grad():
        theirs, ours = model(pixels), again(pixels)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert torch.equal(ours.pooler_output, theirs.pooler_output)


def whole_clip(folder):
    import transformers

    towers = {"text_config": hf.TEXT, "vision_config": hf.VISION, "projection_dim": 8}
    model = hf.randomised(transformers.CLIPModel(transformers.CLIPConfig(**towers)))
    hf.saved(model, folder)
    hf.write_tokenizer(folder, eos_token="<unk>")
    return model
