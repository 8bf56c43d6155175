"""Text to token ids and back, by byte-level BPE, so that every script has tokens.

Sennrich et al. 2016 (arXiv:1508.07909) for BPE, Radford et al. 2019 (GPT-2) for its bytes.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from unified_mm.files import write_atomically

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN)
FORMAT = 1  # raise it when training changes: what was trained before is not found then
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte must have a token


class TextTokenizer:
    """A `tokenizers.Tokenizer` with the layout `<bos> prompt target <eos>` on top.

    Any tokenizer works that knows its special tokens; ours has `<pad>`, `<bos>` and `<eos>` as ids
    0, 1 and 2. Special tokens that are written out in a text are ordinary text here.

    Args:
      tokenizer: the library's tokenizer.
      pad, bos, eos: names of its special tokens; two may be the same. With '' as `bos`, nothing
        stands before a text.
      eos_when_cut: whether a text that is too long still ends in `<eos>`, as encoders that pool
        there need it.
      space_before_target: whether a prompt and its target have the tokens that they have with a
        space between them in a text: where words begin with their space (GPT-2), the target's
        first one has it. Otherwise the target is encoded as if nothing stood before it.
      image: name of the added token that stands for the picture in a prompt; each text has it
        once, at its beginning where the prompt does not say where. '' for none.

    Attributes:
      reader: that of the model by which texts are read for contrast (`models.reader`), if any; it
        is saved beside this one.

    Raises:
      ValueError: the tokenizer lacks a special token.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        pad: str = PAD,
        bos: str = BOS,
        eos: str = EOS,
        eos_when_cut: bool = False,
        space_before_target: bool = False,
        image: str = "",
    ):
        if image:
            tokenizer = _read_in_texts(tokenizer, image)
        vocabulary = tokenizer.get_vocab()
        needed = [pad, bos, eos] if bos else [pad, eos]
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer has no {', '.join(missing)}: add them to its "
                "added_tokens or name others in data.special_tokens, or give no tokenizer and "
                "one is trained on the training captions"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # not part of tokenizer.json, so set here
        self._tokenizer = tokenizer
        self.special_tokens = {
            "pad": pad,
            "bos": bos,
            "eos": eos,
            "eos_when_cut": eos_when_cut,
            "space_before_target": space_before_target,
            "image": image,
        }
        self.pad_id, self.eos_id = vocabulary[pad], vocabulary[eos]
        self.bos_id = vocabulary[bos] if bos else None
        self.image_id = vocabulary[image] if image else None
        # Many tokenizers begin every text as a word, and then need no space.
        self._space = " " * (space_before_target and self.words_need_spaces)
        self.reader: TextTokenizer | None = None

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.as_json().encode()).hexdigest()
        return f"TextTokenizer({digest[:32]}, {self.special_tokens})"

    def __reduce__(self):
        # Worker processes get a tokenizer that went through __init__ again.
        return _from_text, (self._tokenizer.to_str(), self.special_tokens, self.reader)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> "TextTokenizer":
        """Learns BPE merges from texts: lower case, NFC, at most `vocabulary_size` tokens.

        Equal texts give equal tokenizers. There are fewer tokens where the texts have no more pairs
        to merge.

        Raises:
          ValueError: the vocabulary is below 260 (256 bytes, 4 special tokens).
        """
        if vocabulary_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"a vocabulary of {vocabulary_size} tokens is too small: 256 bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens need at least {SMALLEST_VOCABULARY}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def train_once(cls, texts: Sequence[str], vocabulary_size: int, kept: Path) -> "TextTokenizer":
        """Returns what `train` makes of texts; a folder that can be written keeps it.

        Raises:
          ValueError: as `train` does, or the tokenizer that is kept is damaged.
        """
        digest = hashlib.sha256(f"{FORMAT} {tokenizers.__version__} {vocabulary_size}".encode())
        for text in texts:
            digest.update(f" {len(text)} {text}".encode(errors="surrogatepass"))
        path = kept / f"{digest.hexdigest()}.json"
        if os.path.isfile(path):
            try:
                return cls.load(path)
            except ValueError as error:
                raise ValueError(f"{error}: it is kept for the next run, delete it") from error
        tokenizer = cls.train(texts, vocabulary_size)
        try:
            tokenizer.save(path)
        except OSError as error:
            said = f"the tokenizer is not kept for the next run: {path}: {error.strerror or error}"
            warnings.warn(said, stacklevel=2)
        return tokenizer

    @classmethod
    def load(
        cls, path: str | os.PathLike, reader: Mapping[str, Any] | None = None, **special_tokens: Any
    ) -> "TextTokenizer":
        """Reads a tokenizer.json whose special tokens are named as the constructor's arguments.

        Args:
          path: of the file.
          reader: names of the special tokens of the reader's, which lies beside it; None if there
            is none.
          **special_tokens: of this one.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not a usable tokenizer; the message names it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        beside = None if reader is None else cls.load(reader_file(path), **reader)
        try:
            return _from_text(path.read_text(encoding="utf-8"), special_tokens, beside)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is no usable tokenizer.json: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes tokenizer.json in one step: who reads it sees the old file or the new one."""
        if self.reader is not None:
            self.reader.save(reader_file(path))
        write_atomically(path, self.as_json().encode())

    def as_json(self) -> str:
        """Returns the content of tokenizer.json."""
        return str(self._tokenizer.to_str())

    @property
    def vocabulary_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, prompt: str, target: str, length: int) -> dict[str, np.ndarray]:
        """Encodes `<bos> prompt target <eos>`, padded or cut to `length` tokens.

        A text that is too long is cut and then has no `<eos>`, so that no model learns to stop
        there (but see `eos_when_cut`).

        Returns:
          `ids` int32 [T], `valid` bool [T] (not padding) and `scored` bool [T] (the tokens of the
          target and the `<eos>`: what a model is asked to predict), where T is `length`.

        Raises:
          ValueError: the prompt leaves no room for one token of the target.
        """
        prompt_ids = self.encode_prompt(prompt)
        if len(prompt_ids) >= length:
            raise ValueError(
                f"a text length of {length} tokens leaves no room after the prompt {prompt!r} "
                f"({len(prompt_ids)} tokens with <bos>): raise the length or shorten the prompt"
            )
        row = (prompt_ids + self.target_ids(prompt, target) + [self.eos_id])[:length]
        if self.special_tokens["eos_when_cut"]:
            row[-1] = self.eos_id
        ids = np.full(length, self.pad_id, np.int32)
        ids[: len(row)] = row
        position = np.arange(length)
        valid = position < len(row)
        return {"ids": ids, "valid": valid, "scored": valid & (position >= len(prompt_ids))}

    def encode_prompt(self, prompt: str) -> list[int]:
        """Returns the ids of `<bos> prompt`, where generation starts.

        Raises:
          ValueError: the prompt names several pictures.
        """
        begin = [] if self.bos_id is None else [self.bos_id]
        found = self.ids(prompt)
        if self.image_id is None:
            return begin + found
        image = str(self.special_tokens["image"])
        if self.image_id not in found:  # as LLaVA's own code puts it there
            found = self.ids(image + "\n" * bool(prompt) + prompt)
        if found.count(self.image_id) > 1:
            raise ValueError(f"{image} stands more than once in {prompt!r}: a text has one picture")
        return begin + found

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """Returns the ids of a target where it stands after a prompt, '' for none.

        Raises:
          ValueError: the target names a picture.
        """
        found = self.ids(self._space * bool(prompt and target) + target)
        if self.image_id in found:
            image = self.special_tokens["image"]
            raise ValueError(f"{image} stands in the answer {target!r}: pictures are in prompts")
        return found

    @property
    def words_need_spaces(self) -> bool:
        """Whether a text's first word differs from the same word within a text."""
        first, second, both = map(self.ids, ("it?", "a cat", "it? a cat"))
        return first + second != both == first + self.ids(" a cat")

    def ids(self, text: str) -> list[int]:
        """Returns the token ids of a text alone."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def spellings(self, text: str) -> list[int]:
        """Returns the tokens that are just this text, at the start of a word or within one."""
        found = [] if len(ids := self.ids(text)) != 1 else ids
        within = self._tokenizer.token_to_id(text)
        return list(dict.fromkeys(found + ([] if within is None else [within])))

    def words(self, text: str) -> tuple[list[str], list[int]]:
        """Returns the words of a text, split at white space, and the word index of each token."""
        found = list(re.finditer(r"\S+", text))
        ends = np.array([word.end() for word in found])
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets if found else []
        # By where a token's last character stands: a space may be part of what follows it.
        owners = [int(np.searchsorted(ends, max(end, 1))) for _, end in offsets]
        return [word[0] for word in found], [min(owner, len(found) - 1) for owner in owners]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text before the first `<eos>`, without special tokens and outer spaces."""
        row = [int(i) for i in ids]
        end = row.index(self.eos_id) if self.eos_id in row else len(row)
        return self._tokenizer.decode(row[:end], skip_special_tokens=True).strip()


def reader_file(path: str | os.PathLike) -> Path:
    """Returns where the tokenizer of the reader lies, beside that at a path (`RunFolder`)."""
    return Path(path).with_name(f"reader_{Path(path).name}")


def _read_in_texts(tokenizer: tokenizers.Tokenizer, token: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer with one of its added tokens known where a text has it.

    Raises:
      ValueError: it is no added token.
    """
    said = json.loads(tokenizer.to_str())
    found = [each for each in said["added_tokens"] if each["content"] == token]
    if not found:
        raise ValueError(
            f"the tokenizer has no {token} among its added_tokens, which "
            "data.special_tokens.image names: add it, or name another"
        )
    found[0]["special"] = False  # special tokens that are written out are ordinary text here
    return tokenizers.Tokenizer.from_str(json.dumps(said))


def _from_text(
    text: str, special_tokens: Mapping[str, Any], reader: TextTokenizer | None
) -> TextTokenizer:
    found = TextTokenizer(tokenizers.Tokenizer.from_str(text), **special_tokens)
    found.reader = reader
    return found
