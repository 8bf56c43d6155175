"""AST, Whisper's encoder and VideoMAE: the same features, from files on."""

import hugging_face as hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import unified_mm
from unified_mm.config import Config
from unified_mm.import_weights import import_directory, write_run
from unified_mm.task import build_task

soundfile = pytest.importorskip("soundfile")

AST = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 6,
    "time_stride": 4,
    "frequency_stride": 5,
    "max_length": 30,
    "num_mel_bins": 19,  # two bands and two frames fill no patch
}
WHISPER = {
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "num_mel_bins": 12,
    "max_source_positions": 50,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
VIDEO = {
    **hf.VISION,
    "num_frames": 4,
    "tubelet_size": 2,
    "decoder_num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 16,
}


def waves():
    """A sound that fills the window and more, and one that ends within it."""
    rng = np.random.default_rng(0)
    time = np.arange(20_000) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * 600 * time) + 0.05 * rng.normal(size=len(time))
    return [np.round(x * 32767).astype(np.int16) for x in (tone, 0.4 * tone[:1900])]


def looked(imported, modality, rows):
    """The tower's features [B, N, D] of what the modality prepared."""
    task = build_task(Config(imported.config), hf.tiny.tokenizer())
    batch = {modality: jax.tree.map(lambda *each: jnp.stack(each), *rows)}

    def look(params, batch):
        method = lambda model, batch: model.look(modality, batch).embeddings  # noqa: E731
        return task.model.apply({"params": params}, batch, method=method)

    return np.asarray(jax.jit(look)(imported.params, batch))


def heard(imported):
    task = build_task(Config(imported.config), hf.tiny.tokenizer())
    audio = task.modalities["audio"]
    return looked(imported, "audio", [audio.arrays(wave) for wave in waves()])


def pooled(folder, files, of):
    """What the run of an imported tower embeds files as; nothing is asked of texts."""
    model = unified_mm.load(folder)
    with pytest.raises(ValueError, match=f"reads no text: what it reads is {of}"):
        model.embed(["a dog"], of="text")
    with pytest.raises(ValueError, match="cannot write"):
        model.caption(files)
    return model.embed(files, of=of)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sound_files(folder):
    files = [folder / f"{number}.wav" for number in range(2)]
    for file, wave in zip(files, waves(), strict=True):
        soundfile.write(file, wave, 16_000)
    return files


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize("kind", ("WhisperModel", "WhisperForConditionalGeneration"))
def test_whisper(kind, tmp_path):
    import torch
    import transformers

    model = hf.randomised(getattr(transformers, kind)(transformers.WhisperConfig(**WHISPER)))
    model.save_pretrained(tmp_path / "theirs")
    extractor = transformers.WhisperFeatureExtractor(feature_size=12, chunk_length=1)
    extractor.save_pretrained(tmp_path / "theirs")
    imported = import_directory(tmp_path / "theirs")
    assert imported.part == "audio" and any("decoder" in why for why in imported.ignored)
    given = extractor([x / np.float32(32768) for x in waves()], sampling_rate=16_000)
    with torch.no_grad():
        encoder = model.get_encoder()
        theirs = encoder(torch.tensor(np.array(given["input_features"]))).last_hidden_state
    hf.assert_close(heard(imported), theirs)
    run = write_run(imported, tmp_path / "run").path
    found = pooled(run, sound_files(tmp_path)[1:], "audio")
    hf.assert_close(found, unit(theirs.numpy()[1:].mean(1)))


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize("kind", ("ASTModel", "ASTForAudioClassification"))
def test_ast(kind, tmp_path):
    import torch
    import transformers

    config = transformers.ASTConfig(**AST, qkv_bias=kind == "ASTModel")
    model = hf.randomised(getattr(transformers, kind)(config))
    model.save_pretrained(tmp_path / "theirs")
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=19, max_length=30, mean=-3.0, std=2.5)
    extractor.save_pretrained(tmp_path / "theirs")
    imported = import_directory(tmp_path / "theirs")
    assert bool(imported.ignored) == (kind != "ASTModel")
    given = extractor([x / np.float32(32768) for x in waves()], sampling_rate=16_000)
    with torch.no_grad():
        backbone = getattr(model, "audio_spectrogram_transformer", model)
        theirs = backbone(torch.tensor(np.array(given["input_values"])))
    features = theirs.last_hidden_state.numpy()
    order = np.arange(3 * 7).reshape(3, 7).T.reshape(-1)  # theirs go by band, then by time
    hf.assert_close(
        heard(imported), np.concatenate([features[:, :2], features[:, 2:][:, order]], 1)
    )
    run = write_run(imported, tmp_path / "run").path
    found = pooled(run, sound_files(tmp_path)[1:], "audio")
    hf.assert_close(found, unit(theirs.pooler_output.numpy()[1:]))


KINDS = ("VideoMAEModel", "VideoMAEForVideoClassification", "VideoMAEForPreTraining")


@pytest.mark.parametrize("kind", KINDS)
def test_videomae(kind, tmp_path):
    import torch
    import transformers

    config = transformers.VideoMAEConfig(**VIDEO, use_mean_pooling="Classification" in kind)
    model = hf.randomised(getattr(transformers, kind)(config))
    model.save_pretrained(tmp_path / "theirs")
    name_biases(tmp_path / "theirs", older=kind != "VideoMAEModel")
    imported = import_directory(tmp_path / "theirs")
    assert imported.part == "video" and bool(imported.ignored) == (kind != "VideoMAEModel")
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3)).astype(np.uint8)
    moments, length = np.arange(4, dtype=np.float32), np.array(4, np.int32)
    more = {"times": moments, "length": length, "present": np.array(True)}
    ours = looked(imported, "video", [{"frames": clip, **more} for clip in clips])
    with torch.no_grad():
        backbone = getattr(model, "videomae", model)
        theirs = backbone(torch.tensor(hf.normalised(clips, imported, "video")))
    hf.assert_close(ours, theirs.last_hidden_state)
    run = write_run(imported, tmp_path / "run").path
    np.savez(tmp_path / "clip.npz", frames=clips[1], fps=4.0)
    found = pooled(run, [tmp_path / "clip.npz"], "video")
    hf.assert_close(found, unit(theirs.last_hidden_state.numpy()[1:].mean(1)))


def name_biases(folder, older):
    """Gives biases the names that older or newer versions write."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name in list(tensors):
        for one, other in (("q_bias", "query.bias"), ("v_bias", "value.bias")):
            there, wanted = (other, one) if older else (one, other)
            if name.endswith(f"attention.attention.{there}"):
                tensors[name.replace(there, wanted)] = tensors.pop(name)
    assert any(name.endswith("q_bias") for name in tensors) == older
    safetensors.numpy.save_file(tensors, path)
