"""A trained run, ready for inference: `unified_mm.load("runs/first")`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from unified_mm.config import Config, MissingField
from unified_mm.data import images as pictures
from unified_mm.data.records import Image as ImageFile
from unified_mm.data.records import Problem, Record, StoredImage
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import defaults
from unified_mm.inference.classes import TEMPLATES, class_embeddings
from unified_mm.inference.decoding import GREEDY, Decoding, Written
from unified_mm.inference.predictor import Predictor
from unified_mm.inference.quantized_params import in_dtype, saved_shapes
from unified_mm.inference.streaming import stream
from unified_mm.nn.unstack import stack_layers, unstack_layers
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import shardings_of, without_names
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder, RunFolderError, keeps_average
from unified_mm.task import Task, build_task

Picture = Any  # a path, a stored image, a PIL image, or uint8 [height, width, 3]
BATCH = 32
BATCHES = (1, 8, BATCH)  # sizes that are compiled


class LoadedModel:
    """A run's model with the parameters that its scores were taken with.

    Attributes:
      task: the run's task.
      step: step of the checkpoint that the parameters are from.
      state: which state of the run that is: 'last', or 'best' for the one in `best/`.
      config: the run's config.
      saved: the config as the run's folder has it, perhaps written by an earlier version.
      predictor: computes what is asked for, batch by batch.
    """

    def __init__(
        self,
        task: Task,
        params: Any,
        mesh: Mesh,
        config: Config,
        step: int,
        saved: Mapping[str, Any] | None = None,
        state: str = "last",
    ) -> None:
        self.task = task
        self.config = config
        self.step = step
        self.state = state
        self.saved = config.as_dict() if saved is None else saved
        # A layer at a time: see `nn.unstack`.
        unstacked = replace(task, model=task.model.with_options(unstacked=True))
        self.predictor = Predictor(unstacked, unstack_layers(params), mesh)

    @property
    def params(self) -> Any:
        """The parameter tree as training has it, its layers stacked again."""
        return stack_layers(self.predictor.params)

    def embed(self, items: Iterable[Any], of: str, objective: str = "") -> Float[np.ndarray, "B Z"]:
        """Returns unit vectors, float32, of items of any modality that was trained by contrast.

        Args:
          items: images as `embed_images` takes them, texts, or what a `Record` holds of another
            modality under its name.
          of: the modality.
          objective: the contrastive objective in whose space they lie, where several embed the
            modality.

        Raises:
          ValueError: no list, an item that cannot be read, or as `Predictor.embed` does.
        """
        self.predictor.embedding(of, objective)  # what is wrong is said before anything is read
        if of == "text":
            encode = self.task.modalities["text"].encode
            rows = [{"text": encode("", each)} for each in listed_texts(items, "texts")]
        elif of == "image":
            rows = [self._beside(image) for image in listed(items, "images")]
        else:
            rows = [self._with(of, item) for item in listed(items, "items")]
        return self._embed(lambda batch: self.predictor.embed(batch, of, objective), rows)

    def embed_images(self, images: Iterable[Picture]) -> Float[np.ndarray, "B Z"]:
        """Returns unit vectors, float32, in the space that images share with texts.

        Args:
          images: paths, PIL images or uint8 [height, width, 3].

        Raises:
          ValueError: no list, or an image that `view` refuses.
        """
        return self.embed(images, "image", self.predictor.of_images_and_texts("image"))

    def embed_files(
        self, paths: Iterable[ImageFile]
    ) -> tuple[list[ImageFile], Float[np.ndarray, "B Z"], list[Problem]]:
        """Embeds the image files that can be read.

        Returns:
          The files that can be read, their embeddings, and what is wrong with the others.
        """
        files = listed(paths, "paths")
        kept, problems = [], []
        parts = [self.embed_images([])]
        for start in range(0, len(files), BATCH):
            views = []
            for path in files[start : start + BATCH]:
                try:
                    views.append(self.view(path))
                    kept.append(path)
                except pictures.ImageError as error:
                    problems.append(Problem(str(path), error.what, "left out"))
                except FileNotFoundError:
                    problems.append(Problem(str(path), "no file", "left out"))
            if views:
                parts.append(self.embed_images(views))
        return kept, np.concatenate(parts), problems

    def embed_texts(self, texts: Iterable[str]) -> Float[np.ndarray, "B Z"]:
        """Returns unit vectors, float32; a text's cosine with an image says how well it fits.

        A text is cut at the length that the model reads (`model.modalities.text.length` tokens).

        Raises:
          ValueError: no list, or an item that is no text; the message gives its index.
        """
        return self.embed(texts, "text", self.predictor.of_images_and_texts("text"))

    def classify(
        self,
        images: Iterable[Picture],
        classes: Iterable[str],
        templates: Iterable[str] = TEMPLATES,
    ) -> Float[np.ndarray, "B C"]:
        """Returns cosine similarities of images and named classes, float32: the largest fits best.

        Raises:
          ValueError: no lists, or as `class_embeddings` does.
        """
        if not self.predictor.can_retrieve():
            raise ValueError("images and texts of this model have no common space")
        names, sentences = listed_texts(classes, "classes"), listed_texts(templates, "templates")
        return self.embed_images(images) @ class_embeddings(self.embed_texts, names, sentences).T

    def caption(self, images: Iterable[Picture], decoding: Decoding = GREEDY) -> list[str]:
        """Writes a text about each image: greedily, or as `decoding` says."""
        pictured = listed(images, "images")
        return self.answer(pictured, [""] * len(pictured), decoding)

    def answer(
        self,
        images: Iterable[Picture],
        questions: Iterable[str],
        decoding: Decoding = GREEDY,
    ) -> list[str]:
        """Writes a text about each image after its question: greedily, or as `decoding` says."""
        images, questions = as_many(images, questions, "questions")
        return [texts[0].text for texts in self.generate(images, questions, decoding)]

    def generate(
        self,
        images: Iterable[Picture],
        prompts: Iterable[str],
        decoding: Decoding = GREEDY,
    ) -> list[list[Written]]:
        """Writes `decoding.samples` texts about each image, after its prompt ('' for a caption).

        Raises:
          ValueError: not as many prompts as images, a prompt that leaves no room, or an image that
            `view` refuses.
        """
        images, prompts = as_many(images, prompts, "prompts")
        written: list[list[Written]] = []
        for batch, count in self._batches([self._beside(image) for image in images]):
            asked = prompts[len(written) : len(written) + count]
            asked += [""] * (len(batch["image"]["present"]) - count)
            texts = self.predictor.generate(batch, asked, decoding, first=len(written))
            written += texts[:count]
        return written

    def stream(
        self, image: Picture, prompt: str = "", decoding: Decoding = GREEDY
    ) -> Iterator[str]:
        """Returns an iterator over the text for one image, in pieces as they are written.

        Raises:
          ValueError: as `generate` does, and for beams or several samples, which have no order.
        """
        batch = jax.tree.map(lambda leaf: leaf[None], self._beside(image))
        return stream(self.predictor, batch, prompt, decoding)

    def with_options(self, **changes: Any) -> LoadedModel:
        """Returns the same model with other `TransformerOptions`: `dtype`, `attention`, `cache`.

        Another `dtype` casts the parameters too, except those that are int8.
        """
        task = replace(self.task, model=self.task.model.with_options(**changes))
        params = self.params
        if "dtype" in changes:
            params = in_dtype(params, changes["dtype"])
        told = (self.config, self.step, self.saved, self.state)
        return LoadedModel(task, params, self.predictor.mesh, *told)

    def view(self, image: Picture) -> UInt8[np.ndarray, "size size 3"]:
        """Returns what the model sees of an image: its pixels at the model's size.

        By default that is the central square (`data.fit`). A PIL image is converted as a file is:
        upright, 8 bits, transparency over white.

        Raises:
          FileNotFoundError: a file that is not there.
          ValueError: what cannot be read or decoded (`ImageError`, naming it) or is no image.
        """
        modality = self.task.modalities.get("image")
        if modality is None:
            raise ValueError("this model reads no images: it is of text alone")
        if isinstance(image, (str, os.PathLike)):
            pixels = read_picture(image, modality.size, modality.decoder)
        elif isinstance(image, StoredImage):
            pixels = pictures.decode(image, at_least=modality.size, backend=modality.decoder)
        elif isinstance(image, Image.Image):
            pixels = pictures.from_pil(image)
        else:
            pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(
                "an image is a path, a PIL image or uint8 [height, width, 3]; got "
                f"{pixels.dtype} {list(pixels.shape)}"
            )
        if not pixels.size:
            raise ValueError(f"an image of {list(pixels.shape)} has no pixel")
        return modality.whole_view(pixels)

    def _beside(self, image: Picture) -> dict[str, dict[str, np.ndarray]]:
        """Returns a row of the context with this image and nothing else."""
        names = self.task.model.context_names
        absent = {name: self.task.modalities[name].absent() for name in names}
        return {**absent, "image": {"pixels": self.view(image), "present": np.array(True)}}

    def _with(self, name: str, item: Any) -> dict[str, dict[str, np.ndarray]]:
        """Returns a row of the context with an item of one modality and nothing else."""
        names = self.task.model.context_names
        absent = {each: self.task.modalities[each].absent() for each in names}
        found = self.task.modalities[name].prepare(Record(0, None, (), False, {name: item}), None)
        if not found["present"]:
            raise ValueError(f"{item!r} holds no {name}")
        return {**absent, name: found}

    def _batches(self, rows: list[dict]) -> Iterator[tuple[Any, int]]:
        """Yields batches of few sizes (the last one filled up), and how many rows are real."""
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            size = next(size for size in BATCHES if size >= len(part))
            full = part + [part[0]] * (size - len(part))
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *full), len(part)

    def _embed(self, embed: Any, rows: list[dict]) -> np.ndarray:
        if not rows:  # only the model knows the width
            return embed(self.task.example_batch(BATCH))[:0]
        return np.concatenate([embed(batch)[:count] for batch, count in self._batches(rows)])


def listed(values: Any, what: str) -> list[Any]:
    """Returns the values as a list.

    Raises:
      ValueError: one value alone, such as a single text or path.
    """
    alone = isinstance(values, (str, bytes, os.PathLike, Image.Image))
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        alone = values.ndim < 4  # stacked images have four axes
    if alone or not isinstance(values, Iterable):
        raise ValueError(f"give a list of {what}, not a {type(values).__name__} alone")
    return list(values)


def as_many(images: Any, texts: Any, what: str) -> tuple[list[Any], list[str]]:
    """Returns a list of images and a list of as many texts.

    Raises:
      ValueError: their numbers differ, or one of them is no list.
    """
    images, texts = listed(images, "images"), listed_texts(texts, what)
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} {what}: give as many")
    return images, texts


def listed_texts(values: Any, what: str) -> list[str]:
    """Returns the texts as a list.

    Raises:
      ValueError: no list, or an item that is no text; the message gives its index.
    """
    texts = listed(values, what)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{what}[{number}] is a {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what}[{number}], {text!r}, holds half of a surrogate pair, which is no text"
            ) from error
    return texts


def read_picture(
    path: str | os.PathLike[str], size: int, decoder: str
) -> UInt8[np.ndarray, "height width 3"]:
    """Reads the picture of a file.

    Raises:
      FileNotFoundError: there is no such file.
      ImageError: it cannot be read or decoded.
    """
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise pictures.ImageError(str(path), "is no file but a folder or a device")
        raise FileNotFoundError(f"there is no image {str(path)!r}")
    try:
        return pictures.decode(path, at_least=size, backend=decoder)
    except OSError as error:
        raise pictures.ImageError(str(path), f"unreadable: {error.strerror or error}") from error


def load(
    run: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    step: int | None = None,
    best: bool = False,
) -> LoadedModel:
    """Loads the newest whole checkpoint of a run, or that of a step, or its best state.

    Args:
      run: the run folder.
      mesh: the mesh that the parameters are laid out on; by default of one device.
      step: step of a checkpoint that the run still has.
      best: the state in `best/`, which had the best score on the way (`evaluation.best_by`).

    Raises:
      FileNotFoundError: no run there, or no best state of it.
      RunFolderError: a damaged config, or another tokenizer than the run was trained with.
      ValueError: imported weights of an image tower alone.
      CheckpointError: no whole checkpoint.
    """
    folder = RunFolder(run)
    if not folder.exists:
        raise FileNotFoundError(
            f"{folder.path} is no run (it has no config.json); give the folder of a training run"
        )
    config = Config(folder.read_config(defaults()))
    refuse_image_tower(config, folder)
    try:
        tokenizer = TextTokenizer.load(folder.tokenizer, **config.data.special_tokens)
        task = build_task(config, tokenizer)
    except MissingField as error:
        raise RunFolderError(
            f"{folder.config} was written by another version of code from outside this package: "
            f"{error.args[0]} Use that version"
        ) from error
    mesh = mesh or one_device_mesh()
    if best:
        refuse_without_best(folder)
    place, state = (folder.best, "best") if best else (folder.checkpoints, "last")
    with Checkpoints(place, read_only=True) as checkpoints:
        folder.check_tokenizer(checkpoints.readable_metadata())
        name = "average" if keeps_average(config.train) else "params"
        wanted = {name: abstract_params(task, mesh, config)}
        restored = checkpoints.restore(wanted, step=step, partial=True)
    params, saved = restored.state[name], folder.saved_config()
    return LoadedModel(task, params, mesh, config, restored.step, saved, state)


def refuse_without_best(folder: RunFolder) -> None:
    """Raises FileNotFoundError if a run has no best state, with how one comes to be."""
    if folder.best.is_dir():
        with Checkpoints(folder.best, read_only=True) as checkpoints:
            if checkpoints.steps():
                return
    raise FileNotFoundError(
        f"{folder.path} has no best state: a run that is scored on its way keeps one "
        "(--config.evaluation.every=N steps, and evaluation.best_by names the score); without "
        "--best its last state is taken"
    )


def refuse_image_tower(config: Config, folder: RunFolder) -> None:
    """Checks that a run is not an imported image tower alone.

    Raises:
      ValueError: it is.
    """
    if "imported" in config and config.imported.part == "image":
        raise ValueError(
            f"{folder.path} holds an image tower ({config.imported.family}) and no text model: it "
            "is one to start training from, and cannot be asked anything"
        )


def one_device_mesh() -> Mesh:
    """Returns a mesh of this process's first device alone, since requests are small."""
    return make_mesh({}, jax.local_devices()[:1])


def abstract_params(task: Task, mesh: Mesh, config: Config) -> Any:
    """Returns shapes, types and shardings of a run's parameters."""
    boxed = saved_shapes(task, config)
    shardings = shardings_of(boxed, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        without_names(boxed),
        shardings,
    )
