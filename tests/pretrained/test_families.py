"""What a config.json becomes, and what of it is refused by name; no weights are needed."""

import json

import numpy as np
import published
import pytest
import tiny

import unified_mm
from unified_mm.config import Config
from unified_mm.import_weights import import_directory, write_run
from unified_mm.inference.imported import parameter_shapes, run_config
from unified_mm.pretrained.families import FAMILIES, family_of
from unified_mm.pretrained.source import Source
from unified_mm.task import build_task

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 310,
}
TOWERS = {"text_config": {}, "vision_config": {}}
EYE = {"embed_dim": 24, "image_size": 28, "num_attention_heads": 3, "num_hidden_layers": 1}


LLAVA = {
    "model_type": "llava",
    "text_config": {**SMALL, "num_key_value_heads": 1},
    "vision_config": {**SMALL, "image_size": 16, "patch_size": 8},
}


class Directory(Source):
    """One without weights."""

    def _open_all(self):
        return {}


def fields(folder, config, **files):
    """The run's config for a config.json and further JSON files."""
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    source = Directory(folder)
    family = family_of(source)
    return run_config(family, source, tiny.tokenizer() if family.tokens else None)


REFUSED = {
    "llama scaled": (
        {"model_type": "llama", "rope_scaling": {"type": "longrope", "factor": 2.0}},
        "config.json: rope_scaling: type='longrope' .* no scaling but linear, llama3",
    ),
    "llama scaled in the later key": (
        {"model_type": "llama", "rope_parameters": {"type": "dynamic", "factor": 2.0}},
        "config.json: rope_parameters: type='dynamic'",
    ),
    "llama half scaled": (
        {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling: has no low_freq_factor, high_freq_factor, original_max",
    ),
    "mistral layers": (
        {"model_type": "mistral", "layer_types": ["sliding_attention"]},
        "layer_types=",
    ),
    "llama by layer": (
        {"model_type": "llama", "rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters: full_attention=.* all layers are alike",
    ),
    "llama yarn": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        "rope_parameters: rope_type='yarn'",
    ),
    "llama partly rotary": (
        {"model_type": "llama", "partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5",
    ),
    "llama window": ({"model_type": "llama", "sliding_window": 1024}, "sliding_window=1024"),
    "qwen window": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32},
        "sliding_window=32",
    ),
    "qwen layers": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types=",
    ),
    "bert relative": (
        {"model_type": "bert", "position_embedding_type": "relative_key"},
        "position_embedding_type='relative_key'",
    ),
    "bert decoder": ({"model_type": "bert", "is_decoder": True}, "is_decoder=True"),
    "siglip headless": (
        {"model_type": "siglip", "vision_config": {"vision_use_head": False}},
        "vision_config: vision_use_head=False",
    ),
    "siglip widths": (
        {"model_type": "siglip", "text_config": {"projection_size": 8}},
        "text_config: projection_size=8",
    ),
    "clip colours": (
        {"model_type": "clip", "vision_config": {"num_channels": 1}},
        "vision_config: num_channels=1",
    ),
    "idefics layers": (
        {"model_type": "idefics", "num_hidden_layers": 5, "cross_layer_interval": 2},
        "num_hidden_layers=5 is no multiple of cross_layer_interval=2",
    ),
    "llava tiles": ({"model_type": "llava_next"}, "'llava_next' .* into tiles"),
    "llava videos": ({"model_type": "video_llava"}, "'video_llava' .* reads videos"),
    "llava layers": (LLAVA | {"vision_feature_layer": [-2, -5]}, "vision_feature_layer=.* of one"),
    "llava beyond": (LLAVA | {"vision_feature_layer": 9}, "vision_feature_layer=9 .* 1 to 2"),
    "llava tower": (
        LLAVA | {"vision_config": {"model_type": "siglip_vision_model"}},
        "vision_config: model_type='siglip_vision_model'",
    ),
    "llava language": (
        LLAVA | {"text_config": {"model_type": "gemma"}},
        "text_config: model_type='gemma' .* llama, mistral",
    ),
    "idefics gates": ({"model_type": "idefics", "alpha_type": "matrix"}, "alpha_type='matrix'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_its_key(case, tmp_path):
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        fields(tmp_path, config)


PREPROCESSED = {
    "other size": ({"size": {"height": 32, "width": 32}}, r"size=.*takes 224 x 224"),
    "other crop": (
        {"size": {"shortest_edge": 224}, "crop_size": 196},
        "needs do_center_crop and crop_size=224",
    ),
    "uncropped": ({"size": {"shortest_edge": 224}, "do_center_crop": False}, "needs do_center"),
    "nearest": ({"resample": 0}, "resample=0"),
    "padded": ({"do_pad": True}, "do_pad=True"),
    "unscaled": ({"do_rescale": False}, "do_rescale=False"),
    "another scale": ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
}


@pytest.mark.parametrize("case", PREPROCESSED)
def test_preprocessing_that_we_do_not_do_is_refused_by_its_key(case, tmp_path):
    said, message = PREPROCESSED[case]
    with pytest.raises(ValueError, match=message):
        fields(tmp_path, {"model_type": "clip", **TOWERS}, preprocessor_config=said)


@pytest.mark.parametrize(
    ("said", "fit", "resampling"),
    [
        (None, "crop_resized", "bicubic"),
        ({"size": 224, "crop_size": 224, "resample": 3}, "crop_resized", "bicubic"),
        ({"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
         "crop_resized", "bicubic"),
        ({"size": {"height": 224, "width": 224}, "resample": 2}, "squash", "bilinear"),
    ],
)  # fmt: skip
def test_preprocessing_is_a_part_of_the_run(said, fit, resampling, tmp_path):
    files = {} if said is None else {"preprocessor_config": said}
    config = fields(tmp_path, {"model_type": "clip", **TOWERS}, **files)
    assert (config["data"]["fit"], config["data"]["resampling"]) == (fit, resampling)
    assert config["data"]["image_size"] == 224
    image = config["model"]["modalities"]["image"]
    assert image["mean"][0] == pytest.approx(0.48145466) and image["norm"]


@pytest.mark.parametrize("key", ("rope_scaling", "rope_parameters"))
@pytest.mark.parametrize("kind", ("type", "rope_type"))
def test_rotary_positions_that_are_said_not_to_be_scaled(key, kind, tmp_path):
    said = {kind: "default", "rope_theta": 500.0}
    assert fields(tmp_path, {"model_type": "llama", key: said})["model"]["rotary_base"] == 500


def test_published_configs_that_say_only_what_is_unusual_have_the_usual_rest(tmp_path):
    config = fields(tmp_path, {"model_type": "siglip", **TOWERS})
    model, contrastive = config["model"], config["objectives"]["contrastive"]
    assert (model["width"], model["layers"], model["tower"]["heads"]) == (768, 12, 12)
    assert model["modalities"]["image"]["patch"] == 16
    assert model["modalities"]["text"]["length"] == 64
    assert model["modalities"]["text"]["attend_padding"] and not contrastive["bound_scale"]
    assert [n for n, each in config["objectives"].items() if each["weight"]] == ["contrastive"]


def test_the_older_of_two_keys_of_a_tower_is_followed(tmp_path):
    """As transformers does, with the defaults of what it does not say; the first CLIPs have it."""
    said = {"text_config": {"hidden_size": 128}, "vision_config": {"hidden_size": 192}}
    older = {"text_config_dict": {"hidden_size": 256}, "vision_config_dict": None}
    model = fields(tmp_path, {"model_type": "clip", **said, **older})["model"]
    assert (model["width"], model["tower"]["width"]) == (256, 192)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", **SMALL, "num_key_value_heads": 1},
        {"model_type": "bert", **SMALL, "max_position_embeddings": 20},
        {"model_type": "vit", **SMALL, "image_size": 16, "patch_size": 8},
        {"model_type": "idefics", **SMALL, "vision_config": EYE, "use_resampler": True},
        LLAVA,
        {"model_type": "clip", "text_config": SMALL, "vision_config": SMALL},
        {"model_type": "clip_vision_model", **SMALL},
        {"model_type": "clip_text_model", **SMALL},
        {"model_type": "qwen3", **SMALL, "num_key_value_heads": 1},
        {"model_type": "mistral", **SMALL, "sliding_window": None, "num_key_value_heads": 1},
    ],
    ids=lambda config: config["model_type"],
)
def test_every_line_of_a_table_has_a_place_and_every_place_a_line(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = Directory(tmp_path)
    family = family_of(source)
    tokenizer = tiny.tokenizer() if family.tokens else None
    whole = run_config(family, source, tokenizer)
    places = parameter_shapes(whole, tokenizer, family.part)
    table = family.table(whole, frozenset())
    filled = {path for entry in table.entries for _, paths, _ in entry.lines() for path in paths}
    assert filled | set(table.starts) == set(places)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode": "cls", "include_prompt": True}, "first"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None),
    ],
)
def test_pooling_of_sentence_encoders(said, found, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    if found is None:
        with pytest.raises(ValueError, match="1_Pooling.config.json: pooling "):
            fields(tmp_path, {"model_type": "bert"})
    else:
        longest = {"max_seq_length": 9}
        config = fields(tmp_path, {"model_type": "bert"}, sentence_bert_config=longest)
        assert config["objectives"]["contrastive"]["text_pool"] == found
        assert config["model"]["modalities"]["text"]["length"] == 9


def test_layers_after_the_pooling_are_refused(tmp_path):
    modules = [{"type": "sentence_transformers.models.Dense"}]
    with pytest.raises(ValueError, match="modules.json: sentence_transformers.models.Dense"):
        fields(tmp_path, {"model_type": "bert"}, modules=modules)


def test_pixels_that_fill_no_patch_are_left_out_where_that_is_asked_for(tmp_path):
    said = {"model_type": "siglip", "text_config": {}, "vision_config": {"image_size": 384}}
    said["vision_config"]["patch_size"] = 14
    assert fields(tmp_path, said)["model"]["modalities"]["image"]["cut_rest"]
    sizes = {"data__image_size": 19, "model__modalities__image__patch": 8}
    with pytest.raises(ValueError, match="image_size=19 is no multiple .*image.cut_rest"):
        tiny.task(**sizes)
    task = tiny.task(**sizes, model__modalities__image__cut_rest=True)
    params, batch = tiny.params(task), tiny.batch(task)

    def look(pixels):
        given = {"image": {**batch["image"], "pixels": pixels}}
        method = lambda model, given: model.embedders["image"](given["image"]).embeddings  # noqa: E731
        return task.model.apply({"params": params}, given, method=method)

    pixels = batch["image"]["pixels"]
    whole = look(pixels)
    assert whole.shape[1] == 4
    assert np.array_equal(whole, look(pixels.at[:, 16:].set(0).at[:, :, 16:].set(0)))
    assert not np.array_equal(whole, look(pixels.at[:, 15:].set(0)))


def test_an_image_tower_is_one_to_start_from(tmp_path):
    imported = import_directory(published.write_vit(tmp_path / "vit"))
    assert imported.part == "image" and imported.tokenizer is None
    assert list(imported.ignored.values()) == [("classifier.bias", "classifier.weight")]
    run = write_run(imported, tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds an image tower \(ViT\).* to start training from"):
        unified_mm.load(run.path)


def test_padding_counts_as_text_where_that_is_asked_for():
    config = tiny.config_dict()
    config.model.modalities.text.attend_padding = True
    text = build_task(Config(config.to_dict()), tiny.tokenizer()).modalities["text"]
    arrays = text.encode("", "a red square")
    assert arrays["valid"].all() and not arrays["scored"].all()
    assert arrays["ids"][-1] == tiny.tokenizer().pad_id
    plain = tiny.task().modalities["text"].encode("", "a red square")
    assert np.array_equal(plain["scored"], arrays["scored"]) and not plain["valid"].all()


def test_a_vocabulary_may_have_more_rows_than_the_tokenizer_has_tokens_but_no_fewer():
    config = tiny.config_dict()
    config.model.modalities.text.vocabulary = 400
    text = build_task(Config(config.to_dict()), tiny.tokenizer()).modalities["text"]
    assert text.embedding.used == 400 and text.vocabulary == 448
    config.model.modalities.text.vocabulary = 10
    with pytest.raises(ValueError, match="vocabulary=10: the tokenizer has"):
        build_task(Config(config.to_dict()), tiny.tokenizer())


@pytest.mark.parametrize(("field", "value"), [("fit", "stretch"), ("resampling", "nearest")])
def test_views_that_we_do_not_have(field, value):
    with pytest.raises(ValueError, match=f"data.{field}='{value}': must be one of"):
        tiny.task(**{f"data__{field}": value})


def test_every_family_is_known_by_one_name():
    types = [name for family in FAMILIES for name in family.types]
    assert len(types) == len(set(types))
