"""A trained run, ready for inference: `unified_mm.load("runs/first")`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from unified_mm.config import Config, MissingField
from unified_mm.data import images as pictures
from unified_mm.data.records import Image as ImageFile
from unified_mm.data.records import Problem, Record, Stored
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import defaults
from unified_mm.files import read_json
from unified_mm.inference.classes import class_embeddings, templates_of
from unified_mm.inference.decoding import GREEDY, Decoding, Written
from unified_mm.inference.imported import ALONE, PARTS, import_directory
from unified_mm.inference.predictor import Predictor, mean_directions
from unified_mm.inference.quantized_params import in_dtype, saved_shapes
from unified_mm.inference.streaming import stream
from unified_mm.inference.worth import PICTURE, Worth
from unified_mm.nn.unstack import stack_layers, unstack_layers
from unified_mm.objectives.transcription import Transcription
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import shardings_of, without_names
from unified_mm.pretrained.family import Part
from unified_mm.pretrained.hub import directory_of, is_name
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder, RunFolderError, keeps_average
from unified_mm.task import Task, build_task, load_tokenizer

Row = dict[str, dict[str, np.ndarray]]  # of a batch: by modality its arrays
Windows = list[Row]  # of an item that is read in several; one row of any other
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
        exits: Mapping[str, float] | None = None,
        worth: Worth | None = None,
    ) -> None:
        self.task = task
        self.config = config
        self.step = step
        self.state = state
        self.saved = config.as_dict() if saved is None else saved
        # A layer at a time: see `nn.unstack`.
        unstacked = replace(task, model=task.model.with_options(unstacked=True))
        self.predictor = Predictor(unstacked, unstack_layers(params), mesh, exits, worth)

    @property
    def params(self) -> Any:
        """The parameter tree as training has it, its layers stacked again."""
        return stack_layers(self.predictor.params)

    def embed(self, items: Iterable[Any], of: str, objective: str = "") -> Float[np.ndarray, "B Z"]:
        """Returns unit vectors, float32, of items of any modality that was trained by contrast.

        That of a sound longer than the model hears has the mean direction of its windows.

        Args:
          items: texts, or what `read` takes.
          of: the modality.
          objective: the contrastive objective in whose space they lie, where several embed the
            modality.

        Raises:
          ValueError: no list, an item that cannot be read, or as `Predictor.embed` does.
        """
        self.task.embedding(of, objective)  # what is wrong is said before anything is read
        if of == "text":
            items = listed_texts(items, "texts")
        items = listed(items, "images" if of == "image" else "items")
        return self.embed_rows([self.read_windows(each, of) for each in items], of, objective)

    def embed_rows(
        self, rows: Sequence[Windows], of: str, objective: str = ""
    ) -> Float[np.ndarray, "B Z"]:
        """Returns what `embed` does, of items that `read_windows` has read."""
        if not rows:  # only the model knows the width
            nothing = self.task.example_batch(BATCH, training=False)
            return self.predictor.embed(nothing, of, objective)[:0]
        parts = (
            self.predictor.embed(batch, of, objective)[:count]
            for batch, count in self._batches([window for each in rows for window in each])
        )
        return mean_directions(np.concatenate(list(parts)), [len(each) for each in rows])

    def embed_images(self, images: Iterable[Picture]) -> Float[np.ndarray, "B Z"]:
        """Returns unit vectors, float32, in the space that images share with texts.

        Args:
          images: paths, PIL images or uint8 [height, width, 3].

        Raises:
          ValueError: no list, or an image that `view` refuses.
        """
        return self.embed(images, "image", self.task.shared_space("image", "text"))

    def embed_files(
        self, paths: Iterable[ImageFile], of: str = "image"
    ) -> tuple[list[ImageFile], Float[np.ndarray, "B Z"], list[Problem]]:
        """Embeds the files of a modality that can be read, in the space that it shares with texts.

        Returns:
          The files that can be read, their embeddings, and what is wrong with the others.
        """
        files, space = listed(paths, "paths"), self.task.shared_space(of, "text")
        kept, problems, parts = [], [], [self.embed([], of, space)]
        parts_of_files = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
        for part, rows in zip(parts_of_files, self.read_ahead(parts_of_files, of), strict=True):
            good, vectors = self.embed_readable(rows, of, space)
            kept += [part[number] for number in good]
            parts.append(vectors)
            problems += problems_of(map(str, part), rows)
        return kept, np.concatenate(parts), problems

    def read_ahead(
        self, parts: Sequence[Sequence[ImageFile | Path]], of: str = "image"
    ) -> Iterator[list[Windows | str]]:
        """Yields the windows that threads read of each part's files; the next is read meanwhile.

        For a file that cannot be read it is a text that says what is wrong with it.
        """

        def read(file: Any) -> Windows | str:
            try:
                return self.read_windows(file, of)
            except pictures.ImageError as error:
                return error.what
            except FileNotFoundError:
                return "unreadable: no file"

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            coming: Iterable[Windows | str] = pool.map(read, parts[0]) if parts else ()
            for following in (*parts[1:], ()):
                current, coming = list(coming), pool.map(read, following)
                yield current

    def embed_readable(
        self, rows: Sequence[Windows | str], of: str = "image", objective: str = ""
    ) -> tuple[list[int], Float[np.ndarray, "readable Z"]]:
        """Returns the numbers of the rows that could be read, and their unit vectors."""
        good = {number: row for number, row in enumerate(rows) if not isinstance(row, str)}
        return list(good), self.embed_rows(list(good.values()), of, objective)

    def embed_texts(self, texts: Iterable[str]) -> Float[np.ndarray, "B Z"]:
        """Returns unit vectors, float32; a text's cosine with an image says how well it fits.

        A text is cut at the length that the model reads (`model.modalities.text.length` tokens).

        Raises:
          ValueError: no list, or an item that is no text; the message gives its index.
        """
        return self.embed(texts, "text", self.task.shared_space("image", "text"))

    def classify(
        self,
        images: Iterable[Picture],
        classes: Iterable[str],
        templates: Iterable[str] | None = None,
        of: str = "image",
    ) -> Float[np.ndarray, "B C"]:
        """Returns cosine similarities of images and named classes, float32: the largest fits best.

        Args:
          images: items of `of`, as `embed` takes them.
          classes: their names.
          templates: sentences with one `{}`; by default those of `templates_of`.
          of: the modality.

        Raises:
          ValueError: no lists, or as `class_embeddings` does.
        """
        if not self.predictor.can_retrieve(of):
            raise ValueError(f"{of}s and texts of this model have no common space")
        space = self.task.space_of(of).name
        names = listed_texts(classes, "classes")
        sentences = listed_texts(templates_of(of) if templates is None else templates, "templates")
        embedded = class_embeddings(lambda each: self.embed(each, "text", space), names, sentences)
        return self.embed(images, of, space) @ embedded.T

    def caption(self, images: Iterable[Picture], decoding: Decoding = GREEDY) -> list[str]:
        """Writes a text about each image: greedily, or as `decoding` says."""
        pictured = listed(images, "images")
        return self.answer(pictured, [""] * len(pictured), decoding)

    def transcribe(self, items: Iterable[Any], of: str = "audio") -> list[str]:
        """Returns what is said in each item: by `Transcription` where it was trained.

        Elsewhere it is what the model writes about them.

        Args:
          items: what `read` takes.
          of: the modality.

        Raises:
          ValueError: no list, an item that cannot be read, or the model writes nothing.
        """
        rows = [self.read(item, of) for item in listed(items, "items")]
        objectives = self.task.objectives
        able = [e for e in objectives if isinstance(e, Transcription) and e.of == of]
        if not able:
            return [texts[0].text for texts in self.generate_rows(rows, [""] * len(rows))]
        heard: list[str] = []
        for batch, count in self._batches(rows):
            heard += self.predictor.transcribe(batch, able[0])[:count]
        return heard

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
        return self.generate_rows(
            [self.read(image, self.told_about) for image in images], prompts, decoding
        )

    def generate_rows(
        self,
        rows: Sequence[Row],
        prompts: Sequence[str],
        decoding: Decoding = GREEDY,
        first: int = 0,
    ) -> list[list[Written]]:
        """Returns what `generate` does, of images that `read` has read.

        Args:
          rows: the images.
          prompts: as many.
          decoding: how texts are decoded.
          first: number of the first image, which is part of the seed of each draw.
        """
        written: list[list[Written]] = []
        for batch, count in self._batches(rows):
            asked = list(prompts[len(written) : len(written) + count])
            size = len(batch[self.told_about]["present"])
            asked += asked[:1] * (size - count)
            texts = self.predictor.generate(batch, asked, decoding, first=first + len(written))
            written += texts[:count]
        return written

    def stream(
        self, image: Picture, prompt: str = "", decoding: Decoding = GREEDY
    ) -> Iterator[str]:
        """Returns an iterator over the text for one image, in pieces as they are written.

        Raises:
          ValueError: as `generate` does, and for beams or several samples, which have no order.
        """
        batch = jax.tree.map(lambda leaf: leaf[None], self.read(image, self.told_about))
        return stream(self.predictor, batch, prompt, decoding)

    def refuse_alone(self, what: str) -> None:
        """Raises ValueError if this is an imported tower alone, of which `what` cannot be done."""
        if part := tower_alone(self.config):
            raise ValueError(
                f"this is a tower of {part} alone ({self.config.imported.family}): it embeds, and "
                f"cannot be {what}; train a model that begins with it (model.start_from.{part})"
            )

    @property
    def told_about(self) -> str:
        """The modality that texts are written about: images, or else the first one of files."""
        names = self.task.model.context_names
        in_files = [name for name in names if hasattr(self.task.modalities[name], "read")]
        return "image" if "image" in names or not in_files else in_files[0]

    def with_options(self, **changes: Any) -> LoadedModel:
        """Returns the same model with other `TransformerOptions`: `dtype`, `attention`, `cache`.

        Another `dtype` casts the parameters too, except those that are int8.

        Raises:
          ValueError: numbers would be computed otherwise than when exits were calibrated.
        """
        before = self.task.model.options
        if self.predictor.exits and replace(before, **changes) != before:
            raise ValueError(
                f"{', '.join(changes)}: exits were calibrated with the run's own; load it without"
            )
        task = replace(self.task, model=self.task.model.with_options(**changes))
        params = self.params
        if "dtype" in changes:
            params = in_dtype(params, changes["dtype"])
        told = (self.config, self.step, self.saved, self.state)
        own = self.predictor
        return LoadedModel(task, params, own.mesh, *told, own.exits, own.worth)

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
            there = " and ".join(self.task.modalities)
            raise ValueError(f"this model reads no images: it is of {there} alone")
        if isinstance(image, (str, os.PathLike)):
            view: np.ndarray = read_file(modality, image)[0]["pixels"]
            return view
        if isinstance(image, (bytes, Stored)):
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

    def read(self, item: Any, of: str) -> Row:
        """Returns a row of a batch with one item and nothing else.

        What is longer than the model hears at a time is warned of: its beginning alone is read.

        Args:
          item: a text; of another modality the path or the bytes of a file; an image also as `view`
            takes it, and of the others what a `Record` holds under their name.
          of: the modality.

        Raises:
          FileNotFoundError: a file that is not there.
          ValueError: a file that cannot be read (`ImageError`, naming it), or no item.
        """
        windows = self.read_windows(item, of)
        if len(windows) > 1:
            name = f"{of} of {len(item):,} bytes" if isinstance(item, bytes) else repr(str(item))
            warnings.warn(
                f"{name} is longer than the model hears at a time "
                f"(model.modalities.{of}.seconds={self.task.modalities[of].seconds:g}): what comes "
                "after that is left out",
                stacklevel=2,
            )
        return windows[0]

    def read_windows(self, item: Any, of: str) -> Windows:
        """Returns rows of the windows of a long item that embeddings average; one of any other.

        Args:
          item: as `read` takes it.
          of: the modality.

        Raises:
          FileNotFoundError, ValueError: as `read` does.
        """
        modality: Any = self.task.modalities.get(of)
        if of == "text":
            return [{"text": modality.encode("", item)}]
        if of == "image":
            found = [{"pixels": self.view(item), "present": np.array(True)}]
        elif isinstance(item, os.PathLike):
            found = read_file(modality, item)
        else:
            found = windows_of(modality, item)
        if not found[0]["present"]:
            raise ValueError(f"{item!r} holds no {of}")
        absent = {
            each: self.task.modalities[each].absent() for each in self.task.model.context_names
        }
        return [{**absent, of: arrays} for arrays in found]

    def in_files(self, of: str) -> Any:
        """Returns the modality of that name, whose items lie in files.

        Raises:
          ValueError: the model does not read it, or it reads no files.
        """
        modality = self.task.modalities.get(of)
        if hasattr(modality, "read"):
            return modality
        why = "its modality has no `read` (see unified_mm.modalities.Modality)"
        if modality is None:
            why = f"this model reads {', '.join(self.task.modalities)}"
        raise ValueError(f"no {of} can be read from a file here: {why}")

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[Any, int]]:
        """Yields batches of few sizes (the last one filled up), and how many rows are real."""
        for start in range(0, len(rows), BATCH):
            part = list(rows[start : start + BATCH])
            size = next(size for size in BATCHES if size >= len(part))
            full = part + [part[0]] * (size - len(part))
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *full), len(part)


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


def windows_of(modality: Any, item: Any) -> list[dict[str, np.ndarray]]:
    """Returns the arrays of the windows of an item; of one where its modality has none.

    Args:
      modality: of the item.
      item: what a file holds, or what a `Record` does under the modality's name.
    """
    if hasattr(modality, "read_windows"):
        windows: list[dict[str, np.ndarray]] = modality.read_windows(item)
        return windows
    if isinstance(item, bytes):
        return [modality.read(item)]
    return [modality.prepare(Record(0, {modality.name: item}, (), False), None)]


def read_file(modality: Any, path: str | os.PathLike[str]) -> list[dict[str, np.ndarray]]:
    """Returns the arrays of the windows of the one item in a file.

    Raises:
      FileNotFoundError: there is no such file.
      ImageError: it cannot be read or decoded.
    """
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise pictures.ImageError(str(path), "is no file but a folder or a device")
        raise FileNotFoundError(f"there is no {modality.name} {str(path)!r}")
    try:
        # What reads windows finds its own way in a file, of which it need not read all.
        named = hasattr(modality, "read_windows")
        return windows_of(modality, os.fspath(path) if named else Path(path).read_bytes())
    except OSError as error:
        raise pictures.ImageError(str(path), f"unreadable: {error.strerror or error}") from error
    except ValueError as error:
        raise pictures.ImageError(str(path), getattr(error, "what", str(error))) from error


def long_line(windows: Sequence[int], of: str) -> str:
    """Says how many items are heard in several windows, of which each has so many; '' for none."""
    long = [count for count in windows if count > 1]
    if not long:
        return ""
    return (
        f"{len(long):,} of {len(windows):,} {of}s are longer than the model hears: of these, "
        f"{sum(long):,} windows, evenly spread and at most {max(long)} of each, were heard and "
        "averaged"
    )


def problems_of(names: Iterable[str], rows: Sequence[Windows | str]) -> list[Problem]:
    """Returns a problem for each file that `LoadedModel.read_ahead` could not read."""
    return [
        Problem(name, row, "left out")
        for name, row in zip(names, rows, strict=True)
        if isinstance(row, str)
    ]


def load(
    run: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    step: int | None = None,
    best: bool = False,
    exits: bool = False,
) -> LoadedModel:
    """Loads the newest whole checkpoint of a run, or that of a step, or its best state.

    Args:
      run: the run folder, or the name of a published model on the Hugging Face Hub, ORG/MODEL,
        which is found or fetched as `pretrained.hub.directory_of` says.
      mesh: the mesh that the parameters are laid out on; by default of one device.
      step: step of a checkpoint that the run still has.
      best: the state in `best/`, which had the best score on the way (`evaluation.best_by`).
      exits: whether layers and pictures are left out, as `python -m unified_mm.calibrate` found.

    Raises:
      FileNotFoundError: no run there, nor a model of that name; no best state of the run, or no
        calibrated exits.
      RunFolderError: a damaged config, or another tokenizer than the run was trained with.
      ValueError: weights of an image tower alone; a step of a published model; or weights that
        cannot be read.
      CheckpointError: no whole checkpoint.
    """
    folder = RunFolder(run)
    if not folder.exists and is_name(run):
        if step is not None:
            raise ValueError(f"{run} is a published model, which has no step {step}")
        if exits:
            raise ValueError(f"{run} is a published model, which has no exits")
        return published(run, mesh or one_device_mesh())
    if not folder.exists:
        raise FileNotFoundError(
            f"{folder.path} is no run (it has no config.json); give the folder of a training run"
        )
    config = Config(folder.read_config(defaults()))
    refuse_image_tower(config, folder.path)
    try:
        if tower_alone(config):
            tokenizer = TextTokenizer.train([], 260)  # it has none, and reads no text
        else:
            tokenizer = load_tokenizer(folder.tokenizer, config)
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
    dtype = str(task.model.options.dtype)
    early = read_exits(folder, restored.step, state, dtype) if exits else ({}, None)
    whole = held(task, config)
    return LoadedModel(whole, params, mesh, config, restored.step, saved, state, *early)


def read_exits(
    folder: RunFolder, step: int, state: str, dtype: str
) -> tuple[dict[str, float], Worth | None]:
    """Returns `exits` and `worth` of a `Predictor`, as `python -m unified_mm.calibrate` found.

    Raises:
      FileNotFoundError: the run was not calibrated.
      ValueError: it was, at another step or state, or in another type of numbers.
    """
    if not folder.exits.exists():
        raise FileNotFoundError(
            f"{folder.path} has no calibrated exits: python -m unified_mm.calibrate finds them"
        )
    found = read_json(folder.exits)
    if (found["step"], found["state"]) != (step, state):
        raise ValueError(
            f"{folder.exits} is of the {found['state']} state at step {found['step']}, and this is "
            f"the {state} one at {step}: calibrate the run anew (--replace)"
        )
    if found.get("dtype", dtype) != dtype:  # which files had not at first
        raise ValueError(
            f"{folder.exits} is of a model in {found['dtype']}, and here it computes in {dtype}: "
            "calibrate the run anew here (--replace), or use it where it was calibrated"
        )
    texts = found["texts"]
    worth = Worth(**texts[PICTURE]["worth"]) if PICTURE in texts else None
    return {kind: each["threshold"] for kind, each in texts.items()}, worth


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


def published(name: str | os.PathLike[str], mesh: Mesh) -> LoadedModel:
    """Returns a published model by its name on the Hugging Face Hub, without a run.

    Raises:
      FileNotFoundError: it is not in the Hub's cache, and cannot be fetched.
      ValueError: weights that cannot be read, or of an image tower alone.
    """
    imported = import_directory(directory_of(name))
    config = Config(imported.config)
    refuse_image_tower(config, name)
    task = build_task(config, imported.tokenizer or TextTokenizer.train([], 260))
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(task, mesh, config))
    params = jax.tree.map(jax.device_put, imported.params, places)
    return LoadedModel(held(task, config), params, mesh, config, 0)


def refuse_image_tower(config: Config, where: object) -> None:
    """Checks that a run is not an imported image tower alone.

    Raises:
      ValueError: it is.
    """
    if "imported" in config and config.imported.part in ("image", "stem"):
        raise ValueError(
            f"{where} holds an image tower ({config.imported.family}) and no text model: it "
            "is one to start training from, and cannot be asked anything"
        )


def tower_alone(config: Config) -> Part | None:
    """Returns the modality of an imported tower that embeds by itself; None for all other runs."""
    part: Part = config.imported.part if "imported" in config else "both"
    return part if part in ALONE else None


def held(task: Task, config: Config) -> Task:
    """Returns the task with the modalities that weights are there for: of a tower, its own."""
    part = tower_alone(config)
    return replace(task, modalities={part: task.modalities[part]}) if part else task


def one_device_mesh() -> Mesh:
    """Returns a mesh of this process's first device alone, since requests are small."""
    return make_mesh({}, jax.local_devices()[:1])


def abstract_params(task: Task, mesh: Mesh, config: Config) -> Any:
    """Returns shapes, types and shardings of a run's parameters."""
    boxed = saved_shapes(task, config)
    if part := tower_alone(config):
        boxed = {name: each for name, each in boxed.items() if f"{name}/" in PARTS[part]}
    shardings = shardings_of(boxed, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        without_names(boxed),
        shardings,
    )
