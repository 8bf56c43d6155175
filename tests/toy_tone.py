"""A third modality and its data, as a user would write them: nothing in the package is edited."""

import json
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unified_mm.data import Manifest, Record, Text
from unified_mm.modalities import Group, Tokens, blank, single_document
from unified_mm.nn import Dense


@dataclass(frozen=True)
class Tone:
    """A short signal; one token a `frame` of samples."""

    name: str
    samples: int
    frame: int

    @classmethod
    def from_config(cls, name, options, resources):
        return cls(name, options["samples"], options["frame"])

    def fault(self, part):
        if not isinstance(part, list):
            return "no list of values"
        return "" if len(part) == self.samples else f"{len(part)} values, not {self.samples}"

    def prepare(self, record, rng):
        if "tone" not in record.parts:
            return self.absent()
        signal = np.array(record.parts["tone"], np.float32)
        return {"signal": signal, "present": np.array(True)}

    suffixes = (".json",)

    def read(self, content):
        signal = np.array(json.loads(content), np.float32)
        if signal.shape != (self.samples,):
            raise ValueError(f"a tone has {self.samples} samples, this has {list(signal.shape)}")
        return {"signal": signal, "present": np.array(True)}

    def absent(self):
        return {"signal": np.zeros(self.samples, np.float32), "present": np.array(False)}

    def embedder(self, width, dtype):
        return ToneEmbedder(self.name, self.frame, width)


class ToneEmbedder(nn.Module):
    group: str
    frame: int
    width: int

    @nn.compact
    def __call__(self, batch):
        signal = blank(batch["signal"], batch["present"])
        frames = signal.reshape(signal.shape[0], -1, self.frame)
        x = Dense((self.width,), (None,), ("embed",), name="frames")(frames)
        valid = jnp.broadcast_to(batch["present"][:, None], x.shape[:2])
        group = Group(self.group, self.group, x.shape[1])
        return Tokens(blank(x, valid), single_document(valid, group))


class ToneSource:
    """Noise for pictures; only the tone says which word is right. Every fifth has no picture."""

    name = "tones"
    banner = None

    def __init__(self, data):
        self.folder = data.dir

    def splits(self):
        return ("train", "val")

    def manifest(self, split):
        rng = np.random.default_rng(len(split))
        records = []
        for number in range(64 if split == "train" else 16):
            path = Path(self.folder) / f"{split}{number}.png"
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
            high = number % 2
            wave = np.sin(np.arange(8) * (2.5 if high else 0.4) + rng.uniform(0, 6))
            parts = {"tone": wave.tolist()}
            if split == "val" or number % 5:
                parts["image"] = str(path)
            records.append(
                Record(
                    id=number,
                    parts=parts,
                    texts=(Text("", f"{'high' if high else 'low'} tone"),),
                    mirrorable=True,
                )
            )
        return Manifest(split, tuple(records), self.name, self.folder, f"tones-{split}")
