"""A trained run, ready to be asked: `unified_mm.load("runs/first")`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from unified_mm.config import Config
from unified_mm.data import images as pictures
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.inference.classes import TEMPLATES, class_embeddings
from unified_mm.inference.predictor import Predictor
from unified_mm.objectives.task import Task, build_task
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import shardings_of, without_names
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder, read_json

Picture = Any  # a path, a PIL image, or uint8 [height, width, 3]
BATCH = 32


class LoadedModel:
    """A run's model with the parameters that its scores were taken with.

    Attributes:
      params: the parameter tree.
      step: of the checkpoint that they are from.
      config: of the run.
    """

    def __init__(self, task: Task, params: Any, mesh: Mesh, config: Config, step: int) -> None:
        self.task = task
        self.params = params
        self.config = config
        self.step = step
        self.predictor = Predictor(task, params, mesh)

    def embed_images(self, images: Sequence[Picture]) -> Float[np.ndarray, "B E"]:
        """Unit vectors, float32; an image is a path, a PIL image or uint8 [height, width, 3]."""
        return self._embed(self.predictor.embed_images, [self._beside(image) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "B E"]:
        """Unit vectors, float32; a text's cosine with an image says how well it fits."""
        text = self.task.modalities["text"]
        return self._embed(
            self.predictor.embed_texts, [{"text": text.encode("", each)} for each in texts]
        )

    def classify(
        self,
        images: Sequence[Picture],
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> Float[np.ndarray, "B C"]:
        """Cosine similarities of images and named classes, float32: the largest one fits best.

        Raises:
          ValueError: as `class_embeddings` does.
        """
        named = class_embeddings(self.embed_texts, classes, templates)
        return self.embed_images(images).reshape(-1, named.shape[1]) @ named.T

    def caption(self, images: Sequence[Picture]) -> list[str]:
        """What the model writes about each image, greedily."""
        return self.answer(images, [""] * len(images))

    def answer(self, images: Sequence[Picture], questions: Sequence[str]) -> list[str]:
        """What the model writes about each image after its question."""
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images and {len(questions)} questions: give as many")
        written: list[str] = []
        for batch, count in self._batches([self._beside(image) for image in images]):
            asked = list(questions[len(written) : len(written) + count])
            asked += [""] * (BATCH - count)
            written += self.predictor.write(batch, asked)[:count]
        return written

    def view(self, image: Picture) -> UInt8[np.ndarray, "size size 3"]:
        """What the model sees of an image: the central square, at the model's size.

        Raises:
          FileNotFoundError, OSError: a file that is not there or cannot be read.
          ValueError: what cannot be decoded (`ImageError`, naming the file) or is no image.
        """
        modality = self.task.modalities.get("image")
        if modality is None:
            raise ValueError("this model reads no images: it is of text alone")
        if isinstance(image, (str, os.PathLike)):
            if not Path(image).is_file():
                raise FileNotFoundError(f"there is no image {str(image)!r}")
            pixels = pictures.decode(image, at_least=modality.size, backend=modality.decoder)
        else:
            pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(
                "an image is a path, a PIL image or uint8 [height, width, 3]; got "
                f"{pixels.dtype} {list(pixels.shape)}"
            )
        return modality.whole_view(pixels)

    def _beside(self, image: Picture) -> dict[str, dict[str, np.ndarray]]:
        """A row of the context with this image and nothing else."""
        names = self.task.model.context_names
        absent = {name: self.task.modalities[name].absent() for name in names}
        return {**absent, "image": {"pixels": self.view(image), "present": np.array(True)}}

    def _batches(self, rows: list[dict]) -> Any:
        """Batches of one size (the last filled up by repeating), and how many rows count."""
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            full = part + [part[0]] * (BATCH - len(part))
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *full), len(part)

    def _embed(self, embed: Any, rows: list[dict]) -> np.ndarray:
        parts = [embed(batch)[:count] for batch, count in self._batches(rows)]
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def load(run: str | os.PathLike[str], *, mesh: Mesh | None = None) -> LoadedModel:
    """The newest whole checkpoint of a run.

    Args:
      run: the run folder.
      mesh: to lay the parameters out on; all devices along `data` by default.

    Raises:
      FileNotFoundError: no run there.
      CheckpointError: no whole checkpoint.
    """
    folder = RunFolder(run)
    if not folder.exists:
        raise FileNotFoundError(
            f"{folder.path} is no run (it has no config.json); give the --workdir of a training run"
        )
    config = Config(read_json(folder.config))
    refuse_image_tower(config, folder)
    task = build_task(config, TextTokenizer.load(folder.tokenizer, **config.data.special_tokens))
    mesh = mesh or one_device_mesh()
    averaged = config.train.average_decay > 0
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        name = "average" if averaged else "params"
        restored = checkpoints.restore({name: abstract_params(task, mesh)}, partial=True)
    return LoadedModel(task, restored.state[name], mesh, config, restored.step)


def refuse_image_tower(config: Config, folder: RunFolder) -> None:
    """Raises ValueError for imported weights that are but a part of a model."""
    if "imported" in config and config.imported.part == "image":
        raise ValueError(
            f"{folder.path} holds an image tower ({config.imported.family}) and no text model: it "
            "is one to start training from, and cannot be asked anything"
        )


def one_device_mesh() -> Mesh:
    """The first device alone: requests are small."""
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def abstract_params(task: Task, mesh: Mesh) -> Any:
    """Shapes, types and shardings of a task's parameters."""
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    shardings = shardings_of(boxed, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        without_names(boxed),
        shardings,
    )
