"""What a frozen tower or stem makes of each view of each example: computed once, kept, and mapped.

A modality that counts its views draws each training view among so many of an example, all of them
known beforehand: `data.views` of a picture, or its texts. Where a phase trains nothing of what
looks at it, `data.keep_features` keeps the outcome in files, and training reads these in place of
pixels, and in place of running the reader of texts, or in late fusion the text's tower, but where
there are foils of them: to the same scores.

They lie in `features/` of the data's cache, under a digest of the examples, of how they are
prepared, and of the weights. A file that is damaged is found by its checksum and made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unified_mm.data.pipeline import evaluation_batches
from unified_mm.data.records import Record, Stored
from unified_mm.data.sources import cache_folder
from unified_mm.files import new_folder
from unified_mm.inference.predictor import Predictor
from unified_mm.modalities.text import READER_KEYS
from unified_mm.models.late import LateFusion, WithTowers
from unified_mm.models.reader import SENTENCE
from unified_mm.nn.attention.rules import View
from unified_mm.nn.options import TransformerOptions
from unified_mm.parallel.mesh import platform
from unified_mm.parallel.processes import first_before_others, is_first, wait_for_all
from unified_mm.parallel.sharding import batch_shards, path_of
from unified_mm.runs.seal import SEAL, broken_files, write_seal
from unified_mm.task import Task
from unified_mm.training.start_from import READS

FORMAT = 2  # raise it when what is kept changes: files of an older format are not found then
ROUNDED = 8  # tokens of a text that a reader reads, up to a multiple of these
BATCH = 64  # or the next number that the devices divide
ON_CPU = 16  # what 16 pictures become stays in a CPU's cache: a quarter faster than 64
# Keys of a batch under which a model finds what was kept: of a tower, of a stem, of a text's tower,
# of a reader of texts.
TOWER, STEM, READ, READER = "looked", "features", "read", SENTENCE
OF_TEXT = (READ, READER)
VALUES, VALID = "values.f32", "valid.bool"
Prepared = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kept:
    """A preparer of what a frozen part of a model makes of a modality's views.

    Attributes:
      modality: the modality.
      key: `TOWER`, `STEM`, `READ` or `READER`.
      shape: of the values of one view.
      first_of: the number of the first view of each example, by its id.
      count: of views of all examples.
      folder: where they are kept; '' until they are computed.
    """

    modality: Any
    key: str
    shape: tuple[int, ...]
    first_of: Mapping[int | str, int]
    count: int
    folder: str = ""

    def prepare(self, record: Record, rng: np.random.Generator | None) -> Prepared:
        if rng is None:
            raise ValueError("features are kept of training views alone")
        if not (record.texts if self.key in OF_TEXT else self.modality.name in record.parts):
            return self.absent()
        view = self.modality.draw_view(record, rng)
        number = self.first_of[record.id] + view
        values, valid = mapped(self.folder, self.count, self.shape)
        if not valid[number].any():
            raise ValueError(f"{self.modality.name} of {record.id!r} could not be read before")
        found = self.arrays(np.array(values[number]), np.array(valid[number]))
        return found | (self.words.prepare_view(record, view) if self.words else {})

    def absent(self) -> Prepared:
        found = self.arrays(np.zeros(self.shape, np.float32), np.zeros(self.tokens, bool))
        return found | (self.words.absent() if self.words else {})

    @cached_property
    def words(self) -> Any:
        """What prepares the words of a text, which are written too; None of other modalities."""
        if self.key == READER:  # which has read them
            return replace(self.modality, reader=None)
        return self.modality if self.key == READ else None

    @property
    def tokens(self) -> int:
        """How many tokens have a word in `valid`: each of a tower's, or one for a whole stem."""
        return 1 if self.key == STEM else self.shape[0]

    def arrays(self, values: np.ndarray, valid: np.ndarray) -> Prepared:
        found = {self.key: values, "present": np.asarray(valid.any())}
        return found | ({"looked_valid": valid} if self.key == TOWER else {})


@lru_cache(maxsize=16)
def mapped(folder: str, rows: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the files of a folder as arrays, of which only what is read comes into memory."""
    values = np.memmap(Path(folder) / VALUES, np.float32, "r", shape=(rows, *shape))
    valid = np.memmap(Path(folder) / VALID, bool, "r").reshape(rows, -1)
    return values, valid


@dataclass(frozen=True)
class OneView:
    """A preparer of one view, (record, number); of one that cannot be read it says nothing."""

    modality: Any
    tolerant: bool

    def prepare(self, record: Any, rng: np.random.Generator | None) -> Prepared:
        record, number = record
        try:
            found: Prepared = self.modality.prepare_view(record, number)
        except (ValueError, OSError):
            if not self.tolerant:
                raise
            return self.absent()
        return found

    def absent(self) -> Prepared:
        found: Prepared = self.modality.absent()
        return found


@dataclass(frozen=True)
class Views(Sequence):
    """Every view of every record, those of a record one after another.

    Attributes:
      records: the examples.
      ends: of each, the number of the view after its last.
    """

    records: Sequence[Record]
    ends: np.ndarray

    @classmethod
    def of(cls, modality: Any, records: Sequence[Record]) -> Views:
        """Returns the views of a modality of all records."""
        return cls(records, np.cumsum([modality.count_views(record) for record in records]))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: Any) -> Any:
        place = int(np.searchsorted(self.ends, number, side="right"))
        return self.records[place], number - (int(self.ends[place - 1]) if place else 0)

    def first_of(self) -> dict[int | str, int]:
        """Returns the number of the first view of each record, by its id."""
        firsts = [0, *self.ends[:-1].tolist()]
        return {record.id: first for record, first in zip(self.records, firsts, strict=True)}


def words_read(kept: Kept, views: Views) -> np.ndarray:
    """Returns how many tokens of each view a reader reads; 0 where nothing depends on that."""
    if kept.key != READER:
        return np.zeros(len(views), int)
    read = kept.modality.reader
    texts = (record.texts[number] for record, number in views)
    return np.array([read.encode("", text.target)["valid"].sum() for text in texts])


def without_padding(batch: Any, length: int) -> Any:
    """Returns a batch whose texts have for their reader as many tokens as the longest needs.

    Texts that are read in the order of their lengths have little padding; numbers of tokens are
    rounded up, so that few programs are compiled.
    """
    if not length:
        return batch
    end = -(-length // ROUNDED) * ROUNDED
    text = batch["text"] | {name: batch["text"][name][:, :end] for name in READER_KEYS.values()}
    return {**batch, "text": text}


def kept_in(preparer: Any) -> Kept | None:
    """Returns what a preparer reads features by, itself or where it adds labels; None for none."""
    inner = preparer if isinstance(preparer, Kept) else getattr(preparer, "modality", None)
    return inner if isinstance(inner, Kept) else None


def with_kept(preparer: Any, before: Any, kept: Kept) -> Any:
    """Returns a preparer that reads what is kept where it read what was before.

    Raises:
      ValueError: it is neither that nor adds labels to it.
    """
    if preparer is before:
        return kept
    if getattr(preparer, "modality", None) is not before:
        raise ValueError(
            f"data.keep_features=True, but {type(preparer).__name__} prepares "
            f"{kept.modality.name} in a way of its own: set it to False"
        )
    return replace(preparer, modality=kept)


def kept_preparers(
    task: Task, records: Sequence[Record], params: Any, trained: Any
) -> dict[str, Kept]:
    """Returns the preparers of all that can be computed once, by modality; nothing is computed yet.

    Args:
      task: of the phase.
      records: that it reads.
      params: shapes of the parameters.
      trained: for each parameter, whether the phase trains it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    frozen = {path_of(path): not leaf for path, leaf in leaves}
    found = {}
    for name, modality in task.modalities.items():
        if not hasattr(modality, "count_views") or not (key := frozen_part(task, name, frozen)):
            continue
        if not (views := Views.of(modality, records)):
            continue
        batch = {name: arrays_of_absent(modality)}
        values, _ = jax.eval_shape(looking(task, name, key), params, batch)
        found[name] = Kept(modality, key, values.shape[1:], views.first_of(), len(views))
    return found


def arrays_of_absent(modality: Any) -> Any:
    """Returns shapes of a batch of one example."""
    return jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.asarray(x)[None], modality.absent()))


def frozen_part(task: Task, name: str, frozen: Mapping[str, bool]) -> str:
    """Returns the key of the largest part that looks at a modality and is frozen whole, or ''."""

    def whole(key: str) -> bool:
        held = [x for path, x in frozen.items() if path.startswith(read_by(name, key))]
        return bool(held) and all(held)

    def known(stack: TransformerOptions) -> bool:
        # Experts have room for some of the tokens of examples that are read together.
        return not stack.dropout and stack.feed_forward_type != "experts"

    if name == "text" and any(each.reader for each in task.contrasts()):
        return READER if whole(READER) and not task.foiled else ""
    if name == "text":
        held = whole(READ) and known(task.model.options)
        return READ if held and isinstance(task.model, LateFusion) and read_once(task) else ""
    if isinstance(task.model, WithTowers) and whole(TOWER) and known(task.model.tower_of(name)):
        return TOWER
    return STEM if whole(STEM) else ""


def read_by(name: str, key: str) -> tuple[str, ...]:
    """Returns how the paths of the parameters begin by which a part looks at a modality."""
    return {
        TOWER: (f"embedders_{name}/", f"towers_{name}/", "places/"),
        STEM: (f"embedders_{name}/stem/",),
        READ: ("embedders_text/", "transformer/"),
        READER: (READS,),
    }[key]


def read_once(task: Task) -> View | None:
    """Returns the one view in which texts are read; None where there are several, or none.

    Foils are read beside the texts, and drawn anew in every step.
    """
    if task.foiled:
        return None
    views = [view for each in task.objectives for view in each.views() if view.with_text]
    return views[0] if len(views) == 1 else None


def looking(task: Task, name: str, key: str) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Returns the function of parameters and a batch that gives values, and which are valid."""

    def of_tower(params: Any, batch: Any) -> tuple[Any, Any]:
        tokens: Any = task.model.apply(
            {"params": params}, batch, method=lambda model, arrays: model.look(name, arrays)
        )
        return tokens.embeddings.astype(jnp.float32), tokens.metadata.valid

    def of_stem(params: Any, batch: Any) -> tuple[Any, Any]:
        arrays, dtype = batch[name], task.model.options.dtype
        own = params[f"embedders_{name}"]["stem"]
        values = task.modalities[name].before_head(own, arrays, dtype)
        return values.astype(jnp.float32), arrays["present"][:, None]

    def of_text(params: Any, batch: Any) -> tuple[Any, Any]:
        view = read_once(task)
        x: Any = task.model.apply(
            {"params": params}, batch, method=lambda model, all: model.read_text(all[name], view)
        )
        return x.astype(jnp.float32), batch[name]["valid"]

    def of_reader(params: Any, batch: Any) -> tuple[Any, Any]:
        found: Any = task.model.apply(
            {"params": params}, batch, method=lambda model, all: model.head["reader"](all[name])
        )
        return found

    return {TOWER: of_tower, STEM: of_stem, READ: of_text, READER: of_reader}[key]


def digest_of(kept: Kept, task: Task, fingerprint: str, records: Sequence[Record], own: Any) -> str:
    """Returns a digest of all that features depend on.

    Args:
      kept: what is computed.
      task: of the phase.
      fingerprint: of the data, for parts that are no files of their own.
      records: the examples, of whose files size and time of change are taken. Of texts that are not
        read there is nothing: a picture is the same under another caption.
      own: the parameters that look at them, by path.
    """
    name = kept.modality.name
    tower: Any = ""
    if kept.key == TOWER:
        tower = repr(task.model.tower_of(name)) + task.model.options.places
    if kept.key == READ:
        tower = repr([task.model.options, read_once(task)])
    if kept.key == READER:
        reader: Any = task.model.heads["reader"]
        tower = repr([reader.options, reader.text, reader.rule, reader.pool])
    prepared = kept.modality.reader if kept.key == READER else kept.modality
    known = [FORMAT, kept.key, kept.shape, repr(prepared), tower]
    digest = hashlib.sha256(json.dumps([*known, str(task.model.options.dtype)]).encode())
    alone = True
    for record in records:
        part = record.texts if kept.key in OF_TEXT else record.parts.get(name)
        file = os.stat(part) if isinstance(part, str) and os.path.isfile(part) else None
        # A folder is the same however it is given.
        if isinstance(part, Stored):
            place: Any = [os.path.abspath(str(part)), part.size]
        else:
            place = repr(os.path.abspath(str(part)) if file else part)
        alone = alone and (part is None or kept.key in OF_TEXT or file is not None)
        changed = file and (file.st_size, file.st_mtime_ns)
        mirrorable = record.mirrorable and getattr(kept.modality, "mirror", True)
        digest.update(repr([record.id, mirrorable, place, changed]).encode())
    if not alone:
        digest.update(fingerprint.encode())
    for path, leaf in sorted(own.items()):
        digest.update(path.encode() + np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def computed(
    phase: Any,
    params: Any,
    predictor: Predictor,
    data: Any,
    tolerant: bool,
    say: Callable[[str], None],
    leave: Callable[[], None] = lambda: None,
) -> Any:
    """Returns the phase with the features of what it freezes, computed now or found.

    Args:
      phase: a `Phase`, whose preparers may be `Kept`.
      params: the parameters that it begins with.
      predictor: of the run's task.
      data: `config.data`.
      tolerant: whether examples that cannot be read count as absent.
      say: prints a line.
      leave: is called after each batch, and raises where the run is to end; nothing is left then.
    """
    rows, found = phase.rows, dict(phase.rows.preparers)
    for name, preparer in found.items():
        if (kept := kept_in(preparer)) is None:
            continue
        leaves = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
        parts = read_by(name, kept.key)
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(parts)}
        digest = digest_of(kept, phase.task, rows.fingerprint, rows.examples, own)
        folder = cache_folder(data) / "features" / digest[:32]
        own_predictor = predictor.at(params)
        make = write_features(kept, rows.examples, phase.task, own_predictor, tolerant, leave)
        with first_before_others("features"):
            there = is_whole(folder, say)
        if not there:
            size = kept.count * math.prod(kept.shape) * 4 / 1e6
            say(f"features of {kept.count:,} views of {name}: computed once ({size:,.0f} MB)")
            make(folder)
        found[name] = with_kept(preparer, kept, replace(kept, folder=str(folder)))
    return replace(phase, rows=replace(rows, preparers=found))


def is_whole(folder: Path, say: Callable[[str], None]) -> bool:
    """Returns whether a folder of features is there; a damaged one is named and removed."""
    if not folder.is_dir():
        return False
    bad = broken_files(folder) if (folder / SEAL).is_file() else (SEAL,)
    if not bad:
        return True
    say(f"{folder} is damaged ({', '.join(bad)}): it is made again")
    mapped.cache_clear()
    if is_first():
        shutil.rmtree(folder)
    return False


def write_features(
    kept: Kept,
    records: Sequence[Record],
    task: Task,
    predictor: Predictor,
    tolerant: bool,
    leave: Callable[[], None] = lambda: None,
) -> Callable[[Path], None]:
    """Returns the function that computes features batch by batch into a folder.

    All processes compute together; the first one writes.
    """
    name, views = kept.modality.name, Views.of(kept.modality, records)
    look = looking(task, name, kept.key)
    read = {name: OneView(kept.modality, tolerant)}

    def outcomes() -> Any:
        shards = batch_shards(predictor.mesh)
        size = -(-(ON_CPU if platform() == "cpu" else BATCH) // shards) * shards
        own = predictor.rows(size)
        lengths = words_read(kept, views)
        order = np.argsort(lengths, kind="stable")
        batches = evaluation_batches(
            [views[number] for number in order.tolist()], read, batch_size=size, rows=own, threads=4
        )
        with closing(batches):  # type: ignore[type-var]
            for start, batch in zip(range(0, len(views), size), batches, strict=True):
                numbers = order[start : start + size]
                inputs = predictor.to_device(without_padding(batch, int(lengths[numbers].max())))
                found = jax.device_get(predictor.call(f"{kept.key} {name}", look, inputs))
                yield (numbers, *found)
                leave()

    def write(folder: Path) -> None:
        if not is_first():
            for _ in outcomes():
                pass
            wait_for_all("features are written")
            return
        try:
            with new_folder(folder, "data.cache_dir") as half:
                with open(half / VALUES, "wb") as values, open(half / VALID, "wb") as valid:
                    for numbers, *outcome in outcomes():
                        for file, rows in zip((values, valid), outcome, strict=True):
                            for number, row in zip(numbers, rows, strict=False):  # then filling
                                file.seek(int(number) * row.nbytes)
                                file.write(row.tobytes())
                write_seal(half)
        except (OSError, ValueError):
            if not (folder / SEAL).is_file():  # else another run was faster
                raise
        wait_for_all("features are written")

    return write
