"""open_clip's directories: the same scores as the CLIP that transformers makes of the weights."""

import collections
import json
import pickle

import hugging_face as hf
import numpy as np
import pytest

from unified_mm.export_weights import export
from unified_mm.import_weights import import_directory

TEXT = hf.TEXT | {"eos_token_id": 2}
WIDTHS = {"text": 16, "visual": 24}


def names(theirs):
    """A tensor's name in transformers, as open_clip has it."""
    for old, new in (
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.encoder.layers.", "transformer.resblocks."),
        ("text_model.final_layer_norm.", "ln_final."),
        ("text_projection.weight", "text_projection"),
        ("visual_projection.weight", "visual.proj"),
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
        ("vision_model.pre_layrnorm.", "visual.ln_pre."),
        ("vision_model.post_layernorm.", "visual.ln_post."),
        ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
        (".self_attn.out_proj.", ".attn.out_proj."),
        (".layer_norm1.", ".ln_1."),
        (".layer_norm2.", ".ln_2."),
        (".mlp.fc1.", ".mlp.c_fc."),
        (".mlp.fc2.", ".mlp.c_proj."),
    ):
        theirs = theirs.replace(old, new)
    return theirs


def state(model, custom):
    """The state dictionary of a CLIP of transformers as open_clip's model has it."""
    import torch

    found = collections.OrderedDict()
    found._metadata = collections.OrderedDict({"": {"version": 1}})  # as torch's own have
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    for name, value in weights.items():
        if ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{each}_proj.")] for each in "qkv"]
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            value = torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        value = value.T if name.endswith("_projection.weight") else value
        name = names(name)
        before = "text." if custom and not name.startswith(("visual.", "logit")) else ""
        found[before + name] = value.contiguous()
    return found


def write(folder, model, *, custom=False, quick=True, pickled=False, **vision):
    import safetensors.torch
    import torch

    folder.mkdir()
    config = {
        "model_cfg": {
            "embed_dim": 8,
            "quick_gelu": quick,
            "custom_text": custom,
            "vision_cfg": {
                "image_size": 16,
                "layers": 3,
                "width": 24,
                "head_width": 8,
                "mlp_ratio": 40 / 24,
                "patch_size": 4,
                **vision,
            },
            "text_cfg": {
                "context_length": hf.LENGTH,
                "vocab_size": hf.VOCABULARY,
                "width": 16,
                "heads": 2,
                "layers": 2,
                "mlp_ratio": 1.5,
            },
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(state(model, custom), folder / "open_clip_pytorch_model.bin")
    else:
        safetensors.torch.save_file(state(model, custom), folder / "open_clip_model.safetensors")
    hf.tiny.tokenizer().save(folder / "tokenizer.json")
    known = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    hf.write_tokenizer(folder, eos_token=max(known, key=known.__getitem__))
    return folder


def clip(quick=True):
    import transformers

    act = {"hidden_act": "quick_gelu" if quick else "gelu"}
    config = transformers.CLIPConfig(
        text_config=TEXT | act, vision_config=hf.VISION | act, projection_dim=8
    )
    return hf.randomised(transformers.CLIPModel(config))


@pytest.mark.parametrize("custom", (False, True), ids=("clip", "custom text"))
@pytest.mark.parametrize("pickled", (False, True), ids=("safetensors", "bin"))
def test_the_same_scores(custom, pickled, tmp_path):
    import torch

    model = clip(quick=custom)
    folder = write(tmp_path / "clip", model, custom=custom, quick=custom, pickled=pickled)
    imported, task = hf.opened(folder)
    assert imported.family == "open_clip" and not imported.ignored
    images = hf.pixels(3, 16)
    ids, batch = hf.texts(task)
    with torch.no_grad():
        values = torch.tensor(hf.normalised(images, imported))
        theirs = model(input_ids=torch.tensor(ids), pixel_values=values)
    hf.assert_close(hf.contrast(imported, task, images, batch), theirs.logits_per_text)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"timm_model_name": "vit_base_patch16_siglip_224"}, "timm_model_name='vit_base_patch16"),
        ({"layers": [3, 4, 6, 3]}, r"layers=\[3, 4, 6, 3\].* a ResNet"),
        ({"ls_init_value": 0.1}, "ls_init_value=0.1"),
        ({"pool_type": "avg"}, "pool_type='avg'"),
    ],
    ids=("timm", "resnet", "layer scale", "pooling"),
)
def test_towers_of_another_make_are_refused_by_name(vision, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_directory(write(tmp_path / "clip", clip(), **vision))


def test_it_is_exported_as_the_clip_of_transformers(tmp_path):
    import torch
    import transformers

    model = clip()
    imported = import_directory(write(tmp_path / "clip", model))
    family = export(imported.config, imported.params, imported.tokenizer, tmp_path / "out")
    again = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    assert family.name == "CLIP"
    ids = torch.arange(24).reshape(2, 12)
    ids[:, -1] = imported.tokenizer.eos_id
    values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        one, other = (
            each(input_ids=ids, pixel_values=values).logits_per_text for each in (again, model)
        )
    hf.assert_close(one.numpy(), other)


class Harm:
    """What a pickle may do to one who reads it without care."""

    def __reduce__(self):
        return print, ("harm",)


def test_a_file_that_holds_more_than_tensors_is_refused(tmp_path, capsys):
    import torch

    folder = write(tmp_path / "clip", clip(), pickled=True)
    torch.save({"a": torch.ones(2), "b": Harm()}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="can be read safely: it asks for .*builtin.*print"):
        import_directory(folder)
    assert capsys.readouterr().out == ""
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"a": np.ones(2)}))
    with pytest.raises(ValueError, match="can be read safely"):
        import_directory(folder)
