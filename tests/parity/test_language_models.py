"""GPT-2, Llama, SmolLM's make and Qwen 2: the same scores of the next token."""

import hugging_face as hf
import numpy as np
import pytest

from unified_mm.inference.decoding import Decoding
from unified_mm.inference.loaded import one_device_mesh
from unified_mm.inference.predictor import Predictor

GPT2 = [
    {"n_embd": 16, "n_layer": 2, "n_head": 2},
    {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_inner": 40, "tie_word_embeddings": False},
]
LLAMA = [
    {"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
]


def gpt2(**options):
    import transformers

    config = transformers.GPT2Config(n_positions=20, vocab_size=hf.VOCABULARY, **options)
    return hf.randomised(transformers.GPT2LMHeadModel(config))


def llama(**options):
    import transformers

    config = transformers.LlamaConfig(**hf.SMALL | options)
    return hf.randomised(transformers.LlamaForCausalLM(config))


def check(model, folder, **saving):
    import torch

    imported, task = hf.opened(hf.saved(model, folder, **saving))
    ids = np.random.default_rng(0).integers(0, hf.VOCABULARY, (2, 11))
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids)).logits
    hf.assert_close(hf.logits(imported, task, hf.text_batch(ids)), theirs)
    return imported


@pytest.mark.parametrize("options", GPT2, ids=("tied", "untied"))
def test_gpt2(options, tmp_path):
    imported = check(gpt2(**options), tmp_path / "gpt2")
    assert imported.part == "text" and imported.family == "GPT-2"


def test_gpt2_without_its_prefix_as_the_first_files_have_it(tmp_path):
    import torch

    model = gpt2(**GPT2[0])
    folder = hf.saved(model.transformer, tmp_path / "gpt2")
    imported, task = hf.opened(folder)
    ids = np.arange(9)[None]
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids)).logits
    hf.assert_close(hf.logits(imported, task, hf.text_batch(ids)), theirs)


@pytest.mark.parametrize("options", LLAMA, ids=("plain", "grouped tied", "biased one head"))
def test_llama(options, tmp_path):
    check(llama(**options), tmp_path / "llama")


def test_llama_in_shards(tmp_path):
    folder = tmp_path / "llama"
    check(llama(**LLAMA[1]), folder, max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").is_file()
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_llama_in_sixteen_bits(tmp_path):
    import torch

    model = llama(**LLAMA[0]).to(torch.bfloat16)
    folder = hf.saved(model, tmp_path / "llama")
    imported, task = hf.opened(folder)
    ids = np.arange(9)[None]
    with torch.no_grad():
        theirs = model.float()(input_ids=torch.tensor(ids)).logits
    hf.assert_close(hf.logits(imported, task, hf.text_batch(ids)), theirs)


SCALED = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_llama_with_scaled_positions(kind, tmp_path):
    said = {**SCALED[kind], "rope_theta": 100.0}
    imported = check(
        llama(num_attention_heads=2, head_dim=16, rope_parameters=said), tmp_path / "llama"
    )
    assert imported.config["model"]["rotary_options"]["type"] == kind


@pytest.mark.parametrize("more", ({}, {"attention_bias": True, "tie_word_embeddings": True}))
def test_qwen3(more, tmp_path):
    import transformers

    config = transformers.Qwen3Config(
        **hf.SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=6, **more
    )
    check(hf.randomised(transformers.Qwen3ForCausalLM(config)), tmp_path / "qwen3")


@pytest.mark.parametrize("window", (None, 20, 4))
def test_mistral(window, tmp_path):
    imported = check(mistral(window), tmp_path / "mistral")
    assert imported.config["model"]["window"] == (4 if window == 4 else 0)


def mistral(window):
    import transformers

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    config = transformers.MistralConfig(**hf.SMALL, **heads, sliding_window=window)
    return hf.randomised(transformers.MistralForCausalLM(config))


def test_writing_beyond_a_window_with_a_cache(tmp_path):
    """What is written is what theirs writes, reading all tokens anew each time."""
    import torch

    model = mistral(4)
    imported, task = hf.opened(hf.saved(model, tmp_path / "mistral"))
    predictor = Predictor(task, imported.params, one_device_mesh())
    prompts = ["a red square", "size 1"]
    written = predictor.generate({}, prompts, Decoding(tokens=8))
    longest = 0
    for prompt, (text,) in zip(prompts, written, strict=True):
        ids = np.array(task.tokenizer.encode_prompt(prompt))
        for token in text.tokens:
            with torch.no_grad():
                scores = model(input_ids=torch.tensor(ids[None])).logits[0, -1]
            assert int(scores.argmax()) == token
            ids = np.append(ids, token)
        longest = max(longest, len(ids))
    assert longest > 8


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_qwen2(tied, tmp_path):
    import transformers

    config = transformers.Qwen2Config(
        **hf.SMALL, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied
    )
    check(hf.randomised(transformers.Qwen2ForCausalLM(config)), tmp_path / "qwen2")
