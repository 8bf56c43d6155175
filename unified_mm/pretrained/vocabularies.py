"""Tokenizers of other projects, read as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.pretrained.source import Source


@dataclass(frozen=True)
class TokenLayout:
    """The special tokens that a family puts around a text, and its older tokenizer files.

    Attributes:
      build: makes a tokenizer from the family's older files, where there is no tokenizer.json;
        returns None where they are missing.
      begins: whether a begin token may stand before a text.
      bos: key of tokenizer_config.json that names the begin token.
      eos: key of tokenizer_config.json that names the end token.
      defaults: the family's names for 'bos', 'eos' and 'pad', where no file names them.
      eos_when_cut: whether a text that is cut because it is too long still ends in `eos`.
      image: returns the id of the token that stands for a picture; None in a family without one.
      adapt: does to the tokenizer what their library does to it when it reads it.
      check: raises ValueError where config.json and the tokenizer contradict each other.
    """

    build: Callable[[Source], tokenizers.Tokenizer | None]
    begins: bool = True
    bos: str = "bos_token"
    eos: str = "eos_token"
    defaults: Mapping[str, str] | None = None
    eos_when_cut: bool = False
    image: Callable[[Source], int] | None = None
    adapt: Callable[[Source, tokenizers.Tokenizer], None] = lambda source, tokenizer: None
    check: Callable[[Source, TextTokenizer], None] = lambda source, tokenizer: None


NAMING = ("tokenizer_config.json", "special_tokens_map.json")


def read_tokenizer(source: Source, layout: TokenLayout) -> TextTokenizer:
    """Reads the tokenizer of a directory, with the special tokens of its family.

    Raises:
      FileNotFoundError: if there are no tokenizer files.
      ValueError: if a file holds no tokenizer, or the tokenizer lacks special tokens or is not
        the one that config.json was written for.
    """
    path = source.path / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is no usable tokenizer.json: {error}") from error
    else:
        built = layout.build(source)
        if built is None:
            raise FileNotFoundError(
                f"{source.path} has no tokenizer.json, nor the files that one is made of; "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes it"
            )
        tokenizer = built
    layout.adapt(source, tokenizer)
    try:
        found = TextTokenizer(tokenizer, **special_tokens(source, tokenizer, layout))
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error
    layout.check(source, found)
    return found


def special_tokens(
    source: Source, tokenizer: tokenizers.Tokenizer, layout: TokenLayout
) -> dict[str, Any]:
    """Returns the names of the special tokens, as keyword arguments of `TextTokenizer`.

    A name is from the first file of `NAMING` that has it, else from the defaults of the layout,
    else from the id in config.json.

    Raises:
      ValueError: if no end token is named.
    """
    files = [source.json(name) or {} for name in NAMING]
    defaults = layout.defaults or {}

    def named(role: str, key: str) -> str:
        for file in files:
            if file.get(key):
                return _content(file[key])
        if role in defaults:
            return defaults[role]
        number = source.config.get(f"{role}_token_id")
        return (isinstance(number, int) and tokenizer.id_to_token(number)) or ""

    eos = named("eos", layout.eos)
    if not eos:
        raise ValueError("neither its tokenizer_config.json nor its config.json names an end token")
    image = layout.image and tokenizer.id_to_token(layout.image(source))
    if layout.image and not image:
        raise ValueError(f"it has no token {layout.image(source)}, which stands for the picture")
    # A key that is there and says null means that there is none.
    silent = layout.bos in files[0] and not files[0][layout.bos]
    return {
        "pad": named("pad", "pad_token") or eos,
        "bos": named("bos", layout.bos) if layout.begins and not silent else "",
        "eos": eos,
        "eos_when_cut": layout.eos_when_cut,
        "image": image or "",
    }


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def only_json(source: Source) -> None:
    """Returns None, for families that have no older tokenizer files."""


GEMMA = ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer")


def lower_gemma(source: Source, tokenizer: tokenizers.Tokenizer) -> None:
    """Makes Gemma's tokenizer lower-case its texts, as SigLIP 2 was trained on them.

    Their files do not say so; their library does it (Tschannen et al. 2025, section 2.1).
    """
    if (source.json("tokenizer_config.json") or {}).get("tokenizer_class") not in GEMMA:
        return
    steps = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)


def gpt2_files(source: Source) -> tokenizers.Tokenizer | None:
    """Builds GPT-2's tokenizer from vocab.json and merges.txt, or None where they are missing.

    It is a byte-level BPE (Radford et al. 2019, section 2.2).
    """
    return _bpe(source, ["<|endoftext|>"])


CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def clip_files(source: Source) -> tokenizers.Tokenizer | None:
    """Builds CLIP's tokenizer from vocab.json and merges.txt, or None where they are missing.

    It is a BPE of lower-case text, whose words end in `</w>`.
    """
    tokenizer = _bpe(source, CLIP_SPECIAL, end_of_word_suffix="</w>")
    if tokenizer is None:
        return None
    special = "|".join(token.replace("|", r"\|") for token in CLIP_SPECIAL)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = tokenizers.Regex(f"{special}|{CLIP_WORDS}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert_files(source: Source) -> tokenizers.Tokenizer | None:
    """Builds BERT's tokenizer from vocab.txt, or None where it is missing.

    It is a WordPiece tokenizer (Devlin et al. 2019, section 3).
    """
    path = source.path / "vocab.txt"
    if not path.is_file():
        return None
    options = source.json("tokenizer_config.json") or {}
    words = path.read_text(encoding="utf-8").splitlines()
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in BERT_SPECIAL if token in vocabulary])
    return tokenizer


def _bpe(source: Source, special: list[str], **options: Any) -> tokenizers.Tokenizer | None:
    """Builds a BPE of bytes from vocab.json and merges.txt, or None where they are missing."""
    vocabulary, merges = source.path / "vocab.json", source.path / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        return None
    try:
        read = models.BPE.read_file(str(vocabulary), str(merges))
        tokenizer = tokenizers.Tokenizer(models.BPE(*read, unk_token="<|endoftext|>", **options))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{vocabulary} and {merges.name} hold no BPE vocabulary: {error}"
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer
