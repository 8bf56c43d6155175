"""A model that `python -m unified_mm.export` wrote, ready to run; this file lies beside it.

    import exported                       # in the folder, or with the folder on the path
    model = exported.load()
    model.embed_images(pixels)            # uint8 [B, size, size, 3] -> float32 [B, Z], unit norm
    model.embed_texts(["a red cube"])     # -> float32 [B, Z], unit norm
    model.caption(pixels)                 # -> list of str

It needs jax and numpy, and tokenizers where texts are given or wanted rather than token ids. How
pixels have to be prepared is said in manifest.json, under 'image'.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export  # of which `import jax` knows nothing
import jax.numpy as jnp
import numpy as np

MANIFEST = "manifest.json"
FORMAT = 1


class DamagedExport(ValueError):
    """The error that a file of an export is missing or is not what was written."""


def load(folder: str | Path = Path(__file__).parent) -> ExportedModel:
    """Loads the model of a folder, by default of the one that this file lies in.

    Raises:
      FileNotFoundError: no manifest.json there.
      DamagedExport: a file that is missing or changed.
      ValueError: another format, or programs for other devices than this machine's.
    """
    return ExportedModel(Path(folder))


class ExportedModel:
    """Programs and parameters of an export. Batches may have any size; each size is compiled once.

    Attributes:
      manifest: the contents of manifest.json.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        here = jax.export.default_export_platform()
        if here not in self.manifest["platforms"]:
            asked = ", ".join(self.manifest["platforms"])
            raise ValueError(
                f"{folder} was written for {asked}, and this is {here}: export again with "
                f"--platforms={here}, or set JAX_PLATFORMS"
            )
        for name, entry in self.manifest["files"].items():
            check_file(folder / name, entry["sha256"])
        with np.load(folder / "parameters.npz", allow_pickle=False) as arrays:
            self._params = [
                jnp.asarray(arrays[entry["name"]].view(jnp.dtype(entry["dtype"])))
                for entry in self.manifest["parameters"]
            ]
        self._programs = {
            name: _read_program(folder / entry["file"], donated=entry["state"])
            for name, entry in self.manifest["programs"].items()
        }
        self._tokenizer_file = folder / "tokenizer.json"
        self._text = self.manifest["text"]

    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Returns unit vectors, float32 [B, Z], of images, uint8 [B, size, size, 3]."""
        if not len(pixels):
            return self._nothing("embed_images")
        return np.asarray(self._run("embed_images", {"pixels": pixels}))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns unit vectors of texts, float32 [B, Z]; a text that is too long is cut.

        Raises:
          ValueError: one text alone.
        """
        _refuse_text(texts)
        return self.embed_tokens([self.tokens(text) for text in texts])

    def embed_tokens(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns unit vectors of texts, given as token ids without begin and end tokens."""
        length, end = self._text["length"], self._text["end"]
        if not texts:
            return self._nothing("embed_texts")
        rows = [(self._begin() + list(text) + [end])[:length] for text in texts]
        if self._text["end_when_cut"]:
            rows = [row[:-1] + [end] for row in rows]
        ids, valid = self._padded(rows, length)
        if self._text["attend_padding"]:
            valid[:] = True
        return np.asarray(self._run("embed_texts", {"ids": ids, "valid": valid}))

    def caption(self, pixels: np.ndarray) -> list[str]:
        """Writes a text about each image, greedily."""
        return self.answer(pixels, [""] * len(pixels))

    def answer(self, pixels: np.ndarray | None, prompts: Sequence[str]) -> list[str]:
        """Writes a text about each image after its prompt, greedily.

        Raises:
          ValueError: one text alone, or as `write` does.
        """
        _refuse_text(prompts)
        return [self.text(row) for row in self.write([self.tokens(p) for p in prompts], pixels)]

    def write(
        self, prompts: Sequence[Sequence[int]], pixels: np.ndarray | None = None
    ) -> list[list[int]]:
        """Writes the likeliest token again and again, until each text has ended or is full.

        Args:
          prompts: token ids, without the begin token.
          pixels: the image that each text is about; None where the model reads none.

        Returns:
          The ids that were written, without the end token.

        Raises:
          ValueError: a prompt that is empty or leaves no room, or pixels of another shape or type.
        """
        if not prompts:
            return []
        rows = [self._begin() + list(prompt) for prompt in prompts]
        longest = min(self._text["prompt"], self._text["length"] - 1)
        for row in rows:
            if not 0 < len(row) <= longest:
                raise ValueError(
                    f"a prompt of {len(row)} tokens: at least 1 and at most {longest} can be read"
                )
        ids, valid = self._padded(rows, self._text["prompt"])
        logits, state = self.prefill(ids, valid, pixels)
        most = [min(self._text["room"], self._text["length"] - len(row)) for row in rows]
        written: list[list[int]] = [[] for _ in rows]
        done = np.zeros(len(rows), bool)
        for step in range(max(most)):
            token = np.asarray(logits).argmax(-1).astype(np.int32)
            for number in np.flatnonzero(~done):
                done[number] = token[number] == self._text["end"]
                if not done[number]:
                    written[number].append(int(token[number]))
                    done[number] = step + 1 >= most[number]
            if done.all():
                break
            logits, state = self.decode(token, state)
        return written

    def prefill(
        self, ids: np.ndarray, valid: np.ndarray, pixels: np.ndarray | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Reads images and prompts.

        Args:
          ids, valid: int32 and bool [B, T], the begin token, the prompt, then padding.
          pixels: uint8 [B, size, size, 3].

        Returns:
          Logits [B, V] of the next token, and the state to go on from.
        """
        inputs = {"ids": ids, "valid": valid}
        if pixels is not None:
            inputs["pixels"] = pixels
        logits, state = self._run("prefill", inputs)
        return logits, state

    def decode(
        self, token: np.ndarray, state: list[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Reads one more token of each text.

        Args:
          token: int32 [B].
          state: the state to go on from; it is donated.

        Returns:
          Logits [B, V] of the next token, and the next state.
        """
        logits, state = self._run("decode", {"token": token}, state)
        return logits, state

    def tokens(self, text: str) -> list[int]:
        """Returns the token ids of a text, without begin and end tokens."""
        ids: list[int] = self._tokenizer().encode(text, add_special_tokens=False).ids
        return ids if text else []

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids."""
        decoded: str = self._tokenizer().decode(list(ids), skip_special_tokens=True)
        return decoded.strip()

    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._tokenizer_file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # those written out in a text are ordinary text
        return tokenizer

    def _nothing(self, name: str) -> np.ndarray:
        """Returns the output of a program for a batch of no rows."""
        if name not in self._programs:
            raise ValueError(f"this export has no {name}, but {', '.join(self._programs)}")
        output = self.manifest["programs"][name]["output"]
        return np.zeros((0, *output["shape"][1:]), output["dtype"])

    def _begin(self) -> list[int]:
        return [] if self._text["begin"] is None else [self._text["begin"]]

    def _padded(self, rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(rows), length), self._text["padding"], np.int32)
        valid = np.zeros((len(rows), length), bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            valid[number, : len(row)] = True
        return ids, valid

    def _run(self, name: str, inputs: dict[str, Any], state: Sequence[jax.Array] = ()) -> Any:
        if name not in self._programs:
            there = ", ".join(self._programs)
            raise ValueError(f"this export has no {name}, but {there}")
        asked = self.manifest["programs"][name]["inputs"]
        for key in asked.keys() | inputs.keys():
            wanted = asked.get(key)
            given = np.asarray(inputs[key]) if key in inputs else None
            if wanted is None or given is None or not _fits(given, wanted):
                said = "none" if given is None else f"{given.dtype} {list(given.shape)}"
                due = "none" if wanted is None else f"{wanted['dtype']} {wanted['shape']}"
                raise ValueError(f"{name} takes of {key!r} {due}, and was given {said}")
        return self._programs[name](self._params, inputs, list(state))


def _refuse_text(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError("give a list of texts, not one alone")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads manifest.json and checks it against its own checksum.

    Raises:
      FileNotFoundError: no manifest.json there.
      DamagedExport: it is changed.
      ValueError: another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no export (it has no {MANIFEST})")
    try:
        whole = json.loads(path.read_bytes())
        manifest, said = whole["manifest"], whole["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedExport(f"{path} is damaged: {error}") from error
    if digest(manifest) != said:
        raise DamagedExport(f"{path} is damaged: its checksum is another one")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}; this loader reads {FORMAT}")
    found: dict[str, Any] = manifest
    return found


def digest(manifest: Any) -> str:
    """Returns the SHA-256 of a manifest, however its file is laid out."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_file(path: Path, sha256: str) -> None:
    """Checks a file against its SHA-256.

    Raises:
      DamagedExport: it is missing, or not the file that was written.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedExport(f"{path} cannot be read: {error.strerror}") from error
    if found != sha256:
        raise DamagedExport(f"{path} is damaged: it is not the file that was written")


def _read_program(path: Path, donated: Sequence[Any]) -> Any:
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    return jax.jit(program.call, donate_argnums=(2,) if donated else ())


def _fits(given: np.ndarray, wanted: dict[str, Any]) -> bool:
    shape = tuple(wanted["shape"][1:])
    return given.dtype.name == wanted["dtype"] and given.shape[1:] == shape and len(given) > 0
