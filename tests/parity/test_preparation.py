"""Texts and pictures are prepared as transformers prepares them for each family."""

import json

import hugging_face as hf
import numpy as np
import pytest
import tiny
import tokenizers
from PIL import Image

from unified_mm.data import images
from unified_mm.pretrained import preprocessing
from unified_mm.pretrained.bert import BERT
from unified_mm.pretrained.clip import CLIP, SIGLIP
from unified_mm.pretrained.gpt2 import GPT2
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.vocabularies import read_tokenizer

TEXTS = [
    "a red square of size 2",
    "It's a DOG's  life, isn't it? 42!",
    "",
    "two\tgreen   squares\n",
    "naïve 中文 <odd> [MASK",
    "blue " * 30,
]
LENGTH = 16


class Directory(Source):
    """One without weights."""

    def _open_all(self):
        return {}


def opened(folder, family, **config):
    """Our tokenizer of a directory."""
    (folder / "config.json").write_text(json.dumps({"model_type": family.types[0], **config}))
    return read_tokenizer(Directory(folder), family.tokens)


def byte_pairs(end_of_word=""):
    """vocab.json and merges.txt of a small byte-level vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix=end_of_word))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=alphabet,
        end_of_word_suffix=end_of_word,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.lower() for text in TEXTS] + tiny.TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in alphabet:
        vocabulary.setdefault(byte + end_of_word, len(vocabulary))
    return vocabulary, [tuple(pair) for pair in model["merges"]]


def write_pairs(folder, vocabulary, merges):
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def same(ours, theirs):
    """Padded and cut to one length, every text gets the same ids."""
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=LENGTH)
    for text, ids, seen in zip(
        TEXTS, expected["input_ids"], expected["attention_mask"], strict=True
    ):
        arrays = ours.encode("", text, LENGTH)
        assert arrays["ids"].tolist() == ids, text
        assert arrays["valid"].tolist() == [bool(s) for s in seen]


def test_clip_from_its_two_files_and_from_one(tmp_path):
    import transformers

    vocabulary, merges = byte_pairs("</w>")
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    write_pairs(tmp_path, vocabulary, merges)
    end = {"text_config": {"eos_token_id": vocabulary["<|endoftext|>"]}}
    same(opened(tmp_path, CLIP, **end), theirs)
    theirs.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "tokenizer.json").is_file()
    same(opened(tmp_path / "one", CLIP, **end), theirs)


def test_gpt2_puts_its_end_token_before_a_text(tmp_path):
    import transformers

    vocabulary, merges = byte_pairs()
    vocabulary["<|endoftext|>"] = len(vocabulary)
    theirs = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    write_pairs(tmp_path, vocabulary, merges)
    ours = opened(tmp_path, GPT2)
    assert ours.bos_id == ours.eos_id == ours.pad_id == vocabulary["<|endoftext|>"]
    for text in TEXTS:
        assert ours.ids(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.ids(text)) == text.strip()


@pytest.mark.parametrize("lower", (True, False), ids=("uncased", "cased"))
def test_bert_from_its_list_of_words(lower, tmp_path):
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127)), "red", "dog"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    words += ["square", "size", "of", "##ing", "中", "##ue", "bl", "'"]
    words = list(dict.fromkeys(words))
    theirs = transformers.BertTokenizer(
        vocab={word: i for i, word in enumerate(words)}, do_lower_case=lower
    )
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    same(opened(tmp_path, BERT), theirs)
    theirs.save_pretrained(tmp_path / "one")
    same(opened(tmp_path / "one", BERT), theirs)


def test_siglip_ends_a_text_and_pads_with_ends(tmp_path):
    import transformers

    pieces = [("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581red", -3.0)]
    pieces += [("square", -4.0)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=1))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    theirs.save_pretrained(tmp_path)
    ours = opened(tmp_path, SIGLIP)
    assert ours.bos_id is None and ours.special_tokens["eos_when_cut"]
    same(ours, theirs)


def test_siglip2_lowers_the_case_of_its_texts(tmp_path):
    import transformers

    known = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"]
    known += [f"<0x{byte:02X}>" for byte in range(256)]
    known += list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'?!,")
    pairs = [("r", "e"), ("re", "d"), ("D", "O"), ("d", "o"), ("do", "g")]
    known += ["".join(pair) for pair in pairs]
    vocabulary = {token: number for number, token in enumerate(known)}
    theirs = transformers.Siglip2Tokenizer(vocab=vocabulary, merges=pairs)
    theirs._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    theirs.padding_side = "right"
    theirs.save_pretrained(tmp_path / "lower")
    same(opened(tmp_path / "lower", SIGLIP), theirs)
    # As it was published, before their library had a class of its own for it.
    plain = json.loads((tmp_path / "lower" / "tokenizer.json").read_text())
    plain["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    named = json.loads((tmp_path / "lower" / "tokenizer_config.json").read_text())
    named["tokenizer_class"] = "GemmaTokenizer"
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    same(opened(tmp_path, SIGLIP), theirs)


def photograph(height, width):
    """Smooth waves with hard edges in them: uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + 3 * c)) + np.cos(y / (7 + 2 * c)) for c in range(3)]
    picture = 127 + 55 * np.stack(waves, -1)
    picture[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", ((60, 80), (97, 41), (32, 32), (50, 333), (20, 15)))
@pytest.mark.parametrize("family", ("clip", "siglip", "vit", "idefics"))
def test_pictures(shape, family, tmp_path):
    import transformers

    size, sides = 32, {"height": 32, "width": 32}
    kind, options, usual = {
        "clip": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": sides}, "crop_resized"),
        "siglip": ("Siglip", {"size": sides}, "squash"),
        "vit": ("ViT", {"size": sides}, "squash"),
        "idefics": ("Idefics", {"image_size": 32}, "squash"),
    }[family]
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(**options)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    data, embedding = preprocessing.image_fields(
        Directory(tmp_path), Section("", {"image_size": size}), preprocessing.Preprocessing(usual)
    )
    assert data["resampling"] == ("bilinear" if family == "vit" else "bicubic")
    picture = photograph(*shape)
    seen = images.evaluation_view(
        picture, data["image_size"], resampling=data["resampling"], fit=data["fit"]
    )
    found = theirs(Image.fromarray(picture), return_tensors="np")
    expected = np.asarray(found if family == "idefics" else found["pixel_values"])
    expected = expected.reshape(3, size, size).transpose(1, 2, 0)
    levels = (expected * embedding["std"] + embedding["mean"]) * 255
    assert np.abs(levels - seen).max() < 1.01  # one grey level


def test_a_run_sees_pictures_so(tmp_path):
    import transformers

    from unified_mm.config import Config
    from unified_mm.import_weights import import_directory
    from unified_mm.task import build_task

    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.ViTConfig(**vision, num_attention_heads=2, image_size=32, patch_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    imported = import_directory(tmp_path)
    image = build_task(Config(imported.config), hf.tiny.tokenizer()).modalities["image"]
    assert (image.size, image.resampling, image.fit) == (32, "bilinear", "squash")
    picture = photograph(40, 70)
    wanted = images.evaluation_view(picture, 32, resampling="bilinear", fit="squash")
    assert np.array_equal(image.whole_view(picture), wanted)
