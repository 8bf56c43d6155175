"""Several sources in one run, by share: which example a sample is follows from seed and position.

    config.data.source = "mixture"
    config.data.mixture = {
        "mine": {"dir": "photographs", "share": 0.7},
        "world": {"source": "world", "share": 0.3},
    }

Without shares they are by size to the power `data.mixture_alpha` (1: as many as there are; 0: all
alike). `balance`, 'text' or the name of a part, draws the values of that field equally often.
Beside `val` of them all there is `val_NAME` of each, scored where `evaluation.also` has it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from unified_mm.config import build_options, option
from unified_mm.data.records import Manifest, Record
from unified_mm.data.sources import Source, open_source

PERIOD = 1000  # samples, of which each source has its share to one
NONE = ""  # the value of an example that has not what is balanced


@dataclass(frozen=True)
class Member:
    """One source of a mixture.

    Attributes:
      source, dir: as in `config.data`.
      share: of the samples; 0 in all of them for shares by size.
      balance: the field of which each value is drawn equally often: 'text' for the first text, or
        the name of a part; '' for none.
    """

    source: str = "auto"
    dir: str = ""
    share: float = option(0.0, least=0)
    balance: str = ""


@dataclass(frozen=True)
class Mixture(Sequence):
    """Examples of several sources, and the order in which training takes them.

    In any 1,000 neighbouring samples each source has its share, to one. Within a source no example
    comes again before all have come; where values of a field are balanced, this holds for each.

    Attributes:
      records: of all sources.
      groups: by source, the places of its examples, a list for each value that is balanced.
      shares: by source.
    """

    records: Sequence[Record]
    groups: Mapping[str, tuple[np.ndarray, ...]]
    shares: Mapping[str, float]
    pattern: np.ndarray = field(init=False, repr=False)
    rank: np.ndarray = field(init=False, repr=False)
    counts: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = apportioned(self.shares)
        # Evenly spread: the i-th of n samples of a source stands at (i + 1/2) / n of the period.
        source = np.repeat(np.arange(len(counts)), counts)
        rank = np.concatenate([np.arange(count) for count in counts])
        order = np.lexsort((source, (rank + 0.5) / counts[source]))
        for name, value in (("pattern", source[order]), ("rank", rank[order]), ("counts", counts)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: Any) -> Any:
        return self.records[place]

    def place_of(self, sample: int, seed: int) -> int:
        """Returns the place of the example that a sample is."""
        period, position = divmod(sample, PERIOD)
        number = int(self.pattern[position])
        drawn = period * int(self.counts[number]) + int(self.rank[position])
        name = list(self.groups)[number]
        drawn, value = divmod(drawn, len(self.groups[name]))
        places = self.groups[name][value]
        epoch, position = divmod(drawn, len(places))
        return int(places[_order(seed, f"{name}/{value}", epoch, len(places))[position]])

    def epochs(self, samples: int) -> dict[str, float]:
        """Returns how often each source was gone through after so many samples."""
        sizes = {name: sum(map(len, groups)) for name, groups in self.groups.items()}
        shares = dict(zip(self.groups, self.counts / PERIOD, strict=True))
        return {name: samples * float(shares[name]) / size for name, size in sizes.items()}


@lru_cache(maxsize=64)  # neighbouring samples are of a few epochs
def _order(seed: int, stream: str, epoch: int, count: int) -> np.ndarray:
    """Returns the order of an epoch of one source."""
    key = np.array([seed, zlib.crc32(stream.encode())], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, epoch]))
    return rng.permutation(count)


def apportioned(shares: Mapping[str, float]) -> np.ndarray:
    """Returns the samples of each source in a period, by the largest remainders.

    Raises:
      ValueError: a share is too small to have one.
    """
    wanted = np.array(list(shares.values())) / sum(shares.values()) * PERIOD
    counts = np.floor(wanted).astype(int)
    left = PERIOD - counts.sum()
    counts[np.argsort(counts - wanted, kind="stable")[:left]] += 1
    for name, count in zip(shares, counts, strict=True):
        if not count:
            raise ValueError(f"data.mixture.{name}: its share is less than one in {PERIOD:,}")
    return counts


class MixedSource:
    """The sources of a mixture as one; an example's id begins with the name of its source.

    Their questions and foils are not scored.
    """

    name = "mixture"

    def __init__(self, sources: Mapping[str, Source], train_split: str = "train") -> None:
        self._sources, self._train_split = dict(sources), train_split
        self.folder = ", ".join(each.folder for each in self._sources.values())
        banners = [f"{name}: {each.banner}" for name, each in sources.items() if each.banner]
        self.banner = "\n".join(banners) or None
        # What each folder is taken for, and what of it is not read.
        described = [getattr(each, "described", "") for each in self._sources.values()]
        self.described = "\n".join(filter(None, described))

    def splits(self) -> Sequence[str]:
        """Returns the splits of all sources together, then those of each that are scored on."""
        of_each = {name: list(each.splits()) for name, each in self._sources.items()}
        together = list(dict.fromkeys(split for splits in of_each.values() for split in splits))
        apart = [
            f"{split}_{name}"
            for name, splits in of_each.items()
            for split in splits
            if split != self._train_split
        ]
        return [*together, *apart]

    def manifest(self, split: str) -> Manifest:
        """Returns the examples of a split of all sources, or of `SPLIT_NAME` of one.

        Raises:
          ValueError: no source has such a split.
        """
        asked = {
            name: own
            for name, source in self._sources.items()
            for own in source.splits()
            if split in (own, f"{own}_{name}")
        }
        if not asked:
            raise ValueError(f"no source of data.mixture has a split {split!r}: {self.splits()}")
        found = {name: self._sources[name].manifest(own) for name, own in asked.items()}
        records = tuple(
            replace(record, id=f"{name}/{record.id}")
            for name, manifest in found.items()
            for record in manifest.records
        )
        sealed = json.dumps([[name, each.fingerprint] for name, each in found.items()])
        return Manifest(
            split,
            records,
            self.name,
            self.folder,
            hashlib.sha256(sealed.encode()).hexdigest(),
            tuple(problem for each in found.values() for problem in each.problems),
            sum(each.unchecked for each in found.values()),
        )


def members(data: Any) -> dict[str, Member]:
    """Returns the sources that `data.mixture` names.

    Raises:
      ValueError: none, a name that ids could not begin with, or shares of some of them alone.
    """
    found = {
        name: build_options(Member, group, f"data.mixture.{name}")
        for name, group in data.mixture.items()
    }
    shared = [name for name, each in found.items() if each.share]
    if not found or any("/" in name for name in found):
        raise ValueError("data.mixture must name its sources, without a slash in a name")
    if shared and len(shared) < len(found):
        without = next(name for name in found if name not in shared)
        raise ValueError(f"data.mixture.{without} has no share, and {shared[0]} has: give all one")
    return found


def open_mixture(data: Any) -> MixedSource:
    """Returns the sources of `data.mixture` as one.

    Raises:
      ValueError: a folder is given beside them, or as `members` does.
    """
    if data.dir:
        raise ValueError(f"data.dir={data.dir!r}: each source of data.mixture has a dir of its own")
    apart: dict[str, Any] = {"mixture": {}}
    return MixedSource(
        {
            name: open_source(data.changed({**apart, "source": each.source, "dir": each.dir}))
            for name, each in members(data).items()
        },
        data.train_split,
    )


def mixture_of(data: Any, records: Sequence[Record]) -> Sequence[Record]:
    """Returns records in the order that training takes them: of a mixture, by its shares.

    Args:
      data: `config.data`.
      records: of its sources.

    Raises:
      ValueError: a source without examples, with a share that is too small, or in which nothing
        has the field that is to be balanced.
    """
    if data.source != MixedSource.name:
        return records
    found = members(data)
    groups: dict[str, dict[str, list[int]]] = {name: {} for name in found}
    for place, record in enumerate(records):
        name = str(record.id).partition("/")[0]
        groups[name].setdefault(value_of(record, found[name].balance), []).append(place)
    if empty := [name for name in found if not groups[name]]:
        raise ValueError(f"data.mixture.{empty[0]} has no examples to train on")
    blind = not any(record.parts for record in records)  # a phase of texts alone
    for name, each in groups.items():
        if (field := found[name].balance) and set(each) == {NONE} and not blind:
            raise ValueError(
                f"data.mixture.{name}.balance={field!r}: none of its examples has that; give "
                "'text', the name of a part such as 'image', or ''"
            )
    sizes = {name: sum(map(len, each.values())) for name, each in groups.items()}
    alpha = float(data.mixture_alpha)
    shares = {name: each.share or sizes[name] ** alpha for name, each in found.items()}
    places = {name: tuple(map(np.array, each.values())) for name, each in groups.items()}
    return Mixture(records, places, shares)


def value_of(record: Record, balance: str) -> str:
    """Returns the value of the field that is balanced, `NONE` where there is none."""
    if balance == "text" and record.texts:
        return record.texts[0].target
    if balance in record.parts:
        return json.dumps(record.parts[balance], default=str)
    return NONE
