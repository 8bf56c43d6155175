"""Records to batches of arrays, where the global batch depends on seed and step alone."""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from unified_mm.files import uncollected, without_interrupts

Arrays = dict[str, np.ndarray]
Batch = dict[str, Arrays]  # modality -> key -> array [B, ...]
Rows = Sequence[int] | np.ndarray  # of a batch
# The key under which each modality's arrays hold the number of the record, where it is asked for.
RECORD = "record"


@runtime_checkable
class Preparer(Protocol):
    """A modality's conversion of records to arrays, with equal keys, shapes and dtypes for each."""

    def prepare(self, record: Any, rng: np.random.Generator | None) -> Arrays:
        """Returns the arrays of one example, in the evaluation view if `rng` is None."""
        ...

    def absent(self) -> Arrays:
        """Returns the arrays of an example that lacks the modality: `present` is False."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """Examples that are not taken in epochs of them all, such as a mixture of sources."""

    def place_of(self, sample: int, seed: int) -> int:
        """Returns the place of the example that a sample is, counted from step 0."""
        ...


@dataclass(frozen=True)
class Unreadable:
    """What to do with an example's part that cannot be read: it counts as absent, and is named.

    Attributes:
      log: a file to which every process of the reader appends, a line for each part that is met.
    """

    log: str

    def add(self, name: str, error: Exception) -> None:
        """Notes a part that could not be read; a line is written whole or not at all."""
        line = f"{name}\t{error}".replace("\n", " ") + "\n"
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line.encode(errors="backslashreplace"))
        finally:
            os.close(file)

    def lines(self) -> list[str]:
        """Returns what was noted, each part as often as it was met."""
        if not os.path.isfile(self.log):
            return []
        with open(self.log, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()


@dataclass(frozen=True)
class _Rows:
    """The rows of the global batches that one process reads, by the element numbers of its reader.

    Grain gives worker w of W the elements w, w + W, ... and takes whole batches from the workers in
    turn, so the elements are numbered such that worker w makes batches w, w + W, ...

    Attributes:
      batch_size: rows of a global batch.
      start_step: the step of the first batch.
      own: the rows of each global batch that this process reads.
      workers: worker processes, 0 for none.
    """

    batch_size: int
    start_step: int
    own: tuple[int, ...]
    workers: int

    @classmethod
    def of(cls, batch_size: int, start_step: int, own: Rows | None, workers: int) -> "_Rows":
        rows = tuple(range(batch_size)) if own is None else tuple(map(int, own))
        if not rows or not 0 <= min(rows) <= max(rows) < batch_size:
            raise ValueError(f"a batch of {batch_size} has no rows {list(rows)}")
        return cls(batch_size, start_step, rows, workers)

    @property
    def rows(self) -> int:
        return len(self.own)

    def sample(self, element: int) -> int:
        """Returns the number of the sample since step 0, over all processes."""
        workers = max(self.workers, 1)
        position, worker = divmod(element, workers)
        batch, row = divmod(position, self.rows)
        step = self.start_step + batch * workers + worker
        return step * self.batch_size + self.own[row]


class _TrainingRows:
    """Grain's random-access source of the endless training rows."""

    def __init__(
        self,
        records: Sequence[Any],
        preparers: Mapping[str, Preparer],
        seed: int,
        rows: _Rows,
        unreadable: Unreadable | None,
        numbered: bool,
    ):
        self._records = records
        self._preparers = {name: (p, zlib.crc32(name.encode())) for name, p in preparers.items()}
        self._seed = seed
        self._rows = rows
        self._unreadable = unreadable
        self._numbered = numbered
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return 2**48  # endless for all purposes, and still an index that Grain can count with

    def __getitem__(self, element: int) -> Batch:
        sample = self._rows.sample(element)
        place = self._place(sample)
        record = self._records[place]
        numbers = {RECORD: np.array(place, np.int32)} if self._numbered else {}
        return {
            name: self._prepared(name, preparer, record, _generator(self._seed, stream, sample))
            | numbers
            for name, (preparer, stream) in self._preparers.items()
        }

    def _prepared(self, name: str, preparer: Preparer, record: Any, rng: Any) -> Arrays:
        try:
            return preparer.prepare(record, rng)
        except (ValueError, OSError) as error:  # an image that cannot be decoded, or is gone
            if self._unreadable is None:
                raise
            self._unreadable.add(name, error)
            return preparer.absent()

    def _place(self, sample: int) -> int:
        if isinstance(self._records, Ordered):
            return self._records.place_of(sample, self._seed)
        epoch, position = divmod(sample, len(self._records))
        return int(self._epoch_order(epoch)[position])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        # One tuple is read and replaced whole, so threads at the turn of an epoch may both
        # compute an order but never mix two.
        known, order = self._order
        if known != epoch:
            rng = _generator(self._seed, zlib.crc32(b"epoch order"), epoch)
            order = rng.permutation(len(self._records))
            self._order = (epoch, order)
        return order


class _EvaluationRows:
    """Grain's random-access source of every record once, then absent rows to fill the batch."""

    def __init__(self, records: Sequence[Any], preparers: Mapping[str, Preparer], rows: _Rows):
        self._records = records
        self._preparers = preparers
        self._rows = rows
        self._absent = {name: preparer.absent() for name, preparer in preparers.items()}

    def __len__(self) -> int:
        return -(-len(self._records) // self._rows.batch_size) * self._rows.rows

    def __getitem__(self, element: int) -> Batch:
        sample = self._rows.sample(element)
        if sample >= len(self._records):
            return self._absent
        record = self._records[sample]
        return {name: p.prepare(record, None) for name, p in self._preparers.items()}


def training_batches(
    records: Sequence[Any],
    preparers: Mapping[str, Preparer],
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    rows: Rows | None = None,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 2,
    unreadable: Unreadable | None = None,
    numbered: bool = False,
) -> Iterator[Batch]:
    """Returns the endless training batches from `start_step` on; call `.close()` when done.

    Every epoch is a permutation of the records that depends on (seed, epoch); the generator with
    which a modality prepares sample i depends on (seed, i, the modality's name). So neither
    threads, workers, processes, a restart nor a further modality changes any array. Iterating
    raises what a preparer raises.

    Args:
      records: the examples; those that are `Ordered` say themselves which one a sample is.
      preparers: by modality.
      seed: in [0, 2**64).
      batch_size: rows of a batch over all processes.
      start_step: the step of the first batch.
      rows: those of each batch that this process gets, all by default.
      threads: threads that prepare examples.
      workers: processes that prepare examples; 0 for none beside this one.
      prefetch: batches that are prepared ahead.
      unreadable: where parts that cannot be read are named; None raises what is wrong with them.
      numbered: whether each modality's arrays hold the record's number, int32 [B], as `RECORD`.

    Raises:
      ValueError: there are no records or no preparers, no batch has such `rows`, or the seed is
        out of range.
    """
    _require(records, preparers)
    read = _Rows.of(batch_size, start_step, rows, workers)
    source = _TrainingRows(records, preparers, _checked_seed(seed), read, unreadable, numbered)
    return _read(source, read, threads, workers, prefetch)


def evaluation_batches(
    records: Sequence[Any],
    preparers: Mapping[str, Preparer],
    *,
    batch_size: int,
    rows: Rows | None = None,
    threads: int = 2,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Returns batches of every record once, in order, in evaluation views.

    Call `.close()` when done. The last batch is filled up with rows in which every modality is
    absent. Arguments and errors are as in `training_batches`.
    """
    _require(records, preparers)
    read = _Rows.of(batch_size, 0, rows, 0)
    return _read(_EvaluationRows(records, preparers, read), read, threads, 0, prefetch)


def _read(source: Any, rows: _Rows, threads: int, workers: int, prefetch: int) -> Iterator[Batch]:
    with uncollected():
        import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch * rows.rows)
    batches = (
        grain.MapDataset.source(source)
        .to_iter_dataset(options)
        .batch(rows.rows, drop_remainder=True)
    )
    if workers:
        _mark_flags_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        )
    iterator = iter(batches)
    if workers:
        with without_interrupts():  # `close` ends the workers
            iterator.start_prefetch()
        return _Copied(iterator)
    return iterator


class _Copied:
    """Batches copied out of the memory that worker processes share, which is then free.

    What is still held where a process ends would be reported as leaked.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return {
            name: {key: np.array(each) for key, each in arrays.items()}
            for name, arrays in next(self._batches).items()
        }

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches.close()


def _mark_flags_parsed() -> None:
    # Grain's workers copy absl's flags, which a program without absl.app never parsed.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    # Philox (Salmon et al. 2011) maps a key and a counter to bits. The highest word of the
    # counter is never reached by drawing, so streams cannot overlap.
    key = np.array([seed, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is not in [0, 2**64)")
    return seed


def _require(records: Sequence[Any], preparers: Mapping[str, Preparer]) -> None:
    if not records:
        raise ValueError("there are no records to make batches of: the split is empty")
    if not preparers:
        raise ValueError("there are no modalities to make batches of: preparers is empty")
