"""Checkpoints that are verified before use: Orbax's manager, with checksums and a way back.

A step's folder holds the items `state`, `metadata` (the caller's, JSON), `checksums` (JSON: the
checksum, shape and dtype of each leaf, and a digest of those and the metadata) and a seal.

    1. save    Checksums are taken on the device, and all items are written to a temporary folder.
    2. commit  Orbax renames that folder to the step's name: from here on the step exists.
    3. read    A thread reads the first one that an object of `Checkpoints` saves back, and compares
               it with its checksums: a disk that keeps nothing is known before hours are lost.
    4. seal    The thread then writes the SHA-256 of every file.

Several processes save and restore one checkpoint together: each its own shards, and process 0 the
checksums, the commit and the seal.

A process killed before 2 leaves a temporary folder, which the next save removes, and after 2 a
complete checkpoint; between 2 and 4 it has no seal, and is judged by its checksums alone.

`restore` verifies the seal, then the checksums of the arrays as they lie on the mesh. A step that
fails is named in a warning, and the next older one is tried.

Cost, beyond Orbax's: a save waits for the step that computes the state (to read 8 bytes a leaf),
and its files are read once in the background, the first one's twice; a restore reads them once
more, about a second a gigabyte on a CPU with SHA instructions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from unified_mm.parallel.processes import first_decides, is_first, refuse_unequal, wait_for_all
from unified_mm.runs.saved import saved_name
from unified_mm.runs.seal import (
    broken_files,
    host_checksum,
    is_sealed,
    tree_checksums,
    write_seal,
)

_POLL_SECONDS = 0.02
_UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax names the folder of a save under way
_READ_AT_ONCE = 2**28  # bytes of leaves, beside a larger one alone
# TensorStore takes `\` for `/`, and Orbax `gs:` for a bucket and a pattern for an error ...
_UNREADABLE = re.compile(r"\\|\*\*|gs:(?=/|$)")
# ... or, where it gathers what it has written, for none of its files, or for those of other runs.
_UNWRITABLE = re.compile(rf"{_UNREADABLE.pattern}|[*?\[]")


class CheckpointError(RuntimeError):
    """The error that no checkpoint could be used, or one holds another state than asked for."""


class DamagedCheckpointWarning(UserWarning):
    """The warning that a checkpoint failed its checks and was passed over."""


class _Damaged(Exception):
    """The reason why the checkpoint of one step is damaged."""


def refuse_name(folder: str | os.PathLike[str], *, read_only: bool = False) -> None:
    """Raises ValueError if checkpoints in the folder would be lost, because of letters of its path.

    Args:
      folder: where they are, or are to be.
      read_only: whether they are only read, which fewer letters prevent.
    """
    path = str(Path(folder).absolute())
    found = (_UNREADABLE if read_only else _UNWRITABLE).search(path)
    if found:
        done = "read" if read_only else "written"
        raise ValueError(
            f"weights cannot be {done} in {path}: its path has {found.group()!r}, which has a "
            "meaning of its own to what stores arrays. Rename that folder, or choose another, "
            "without any of [ * ? \\ and no part that ends in gs:"
        )


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint: its step, the state on the mesh asked for, the saved metadata."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one folder.

    Nothing that is damaged is deleted. Since training goes on from an older step and reaches the
    damaged one's number again, the first save after a restore that passed over damaged steps
    renames them to `<step>.damaged`.

    Args:
      folder: made where it is missing.
      keep: how many of the newest steps stay.
      asynchronous: write in the background; `save` returns once the state is copied.
      read_only: for looking at a run that may be training: nothing is made or moved, and `save`
        raises ValueError.

    Raises:
      ValueError: the path has letters that would lose the weights (`refuse_name`).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 2,
        asynchronous: bool = True,
        read_only: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to stay")
        refuse_name(folder, read_only=read_only)
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"there are no checkpoints: {self.folder} does not exist")
        self._read_only = read_only
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=not read_only,
                enable_async_checkpointing=asynchronous,
                lightweight_initialize=True,  # one unreadable step must not hide the others
            ),
        )
        self._damaged: list[int] = []  # passed over by `restore`, not yet moved aside
        self._sealing: _Sealing | None = None
        self._read_back = True  # the next one saved

    def steps(self) -> tuple[int, ...]:
        """Returns the steps saved, oldest first, with damaged ones and one still being written."""
        return tuple(sorted(self._manager.all_steps()))

    def save(self, step: int, state: PyTree[Any], metadata: Mapping[str, Any]) -> None:
        """Saves the state and the caller's JSON metadata; waits for the save before it.

        The state may be donated as soon as this returns.

        Raises:
          ValueError: the step is not newer than all others, or the state cannot be saved.
          CheckpointError: the first one saved is not what was read back.
          Exception: what the save before it failed with.
        """
        self._refuse_unsavable(step, state)
        self._wait_and_seal()
        self._clear_the_way()
        plain = json.loads(json.dumps(metadata, allow_nan=False))
        leaves = _describe_arrays(state)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            metadata=ocp.args.JsonSave(plain),
            checksums=ocp.args.JsonSave({"leaves": leaves, "digest": _digest(leaves, plain)}),
        )
        if not self._manager.save(step, args=args, force=True):
            raise CheckpointError(f"{self.folder}: Orbax did not save step {step}")
        if is_first():
            self._sealing = _Sealing(self.folder / str(step), leaves if self._read_back else None)
            self._read_back = False

    def restore(
        self,
        abstract_state: PyTree[jax.ShapeDtypeStruct] | Callable[[int], PyTree[Any]],
        *,
        step: int | None = None,
        partial: bool = False,
        later: Mapping[str, Callable[[int], PyTree[jax.Array]]] | None = None,
    ) -> Restored:
        """Restores the newest undamaged checkpoint, or just `step`, onto the shardings asked for.

        Leaves that were called otherwise (`saved.RENAMED_LEAVES`) are found by their old names.
        Warns with `DamagedCheckpointWarning` for each step passed over. Nothing is ever cast.

        Args:
          abstract_state: shape, dtype and sharding of each leaf, or a function of the step that
            returns them; where no leaf has a sharding, all go to the first device.
          step: the only one to try; None for all, newest first.
          partial: `abstract_state` holds some of the saved leaves (a model without its optimizer),
            and these alone are read and checked.
          later: parts of the state, by name, that checkpoints of earlier versions do not have, each
            with a function of the step that returns its first value.

        Raises:
          CheckpointError: every step tried is damaged (the message lists them), or an undamaged one
            holds other leaves, shapes or dtypes, which ends the search at once.
        """
        self._wait_and_seal()
        refuse_unequal(f"the list of checkpoints in {self.folder}", str(self.steps()))
        tried: dict[int, str] = {}
        for candidate in reversed(self.steps()) if step is None else [step]:
            wanted = abstract_state(candidate) if callable(abstract_state) else abstract_state
            placed = _with_shardings(wanted)
            try:
                restored = self._restore_step(candidate, placed, partial, later or {})
            except _Damaged as damage:
                tried[candidate] = f"step {candidate} in {self.folder / str(candidate)}: {damage}"
                continue
            self._pass_over(tried)
            return restored
        listed = "\n  ".join(tried.values()) or "the folder holds none"
        raise CheckpointError(
            f"no whole checkpoint in {self.folder}:\n  {listed}\n"
            "Put a whole copy back, or remove the folder to start anew."
        )

    def metadata(self) -> dict[str, Any]:
        """Returns the metadata of the newest step.

        Raises:
          CheckpointError: there is no step, or its metadata cannot be read.
        """
        if not self.steps():
            raise CheckpointError(f"no checkpoint in {self.folder}")
        try:
            return self._read_json_items(self.steps()[-1])[1]
        except _Damaged as damage:
            raise CheckpointError(f"step {self.steps()[-1]} in {self.folder}: {damage}") from damage

    def readable_metadata(self) -> dict[str, Any]:
        """Returns the newest metadata that can be read; {} where there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(_Damaged):
                return self._read_json_items(step)[1]
        return {}

    @property
    def saving(self) -> bool:
        """Returns whether a save is under way."""
        return bool(self._manager.is_saving_in_progress())

    def check(self) -> None:
        """Checks what is known by now of the checkpoint saved last; it waits for nothing.

        Raises:
          CheckpointError: it was read back, and is not what was saved.
          Exception: what sealing it raised.
        """
        if self._sealing is not None:
            self._sealing.check()

    def wait(self) -> None:
        """Waits until all that was saved is written, read back and sealed.

        Raises:
          CheckpointError: what was read back is not what was saved.
          Exception: what writing raised.
        """
        self._wait_and_seal()

    def close(self) -> None:
        """Waits as `wait` does, then frees what Orbax holds.

        Raises:
          Exception: what writing raised.
        """
        try:
            self._wait_and_seal()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_and_seal(self) -> None:
        sealing, self._sealing = self._sealing, None
        try:
            self._manager.wait_until_finished()
        finally:
            if sealing is not None:
                sealing.finish()

    def _refuse_unsavable(self, step: int, state: PyTree[Any]) -> None:
        if self._read_only:
            raise ValueError(f"{self.folder} was opened read-only: step {step} cannot be saved")
        newest = max(set(self.steps()) - set(self._damaged), default=-1)
        if step <= newest:
            raise ValueError(f"{self.folder}: cannot save step {step}, step {newest} is there")
        for name, leaf in _named_leaves(state).items():
            if not isinstance(leaf, jax.Array):
                raise ValueError(f"state leaf {name} is a {type(leaf).__name__}, not a jax.Array")
            if leaf.size == 0:
                raise ValueError(f"state leaf {name} has shape {leaf.shape}: Orbax saves no empty")

    def _pass_over(self, damaged: Mapping[int, str]) -> None:
        self._damaged = list(damaged)
        for reason in damaged.values():
            warnings.warn(
                f"damaged checkpoint passed over: {reason}", DamagedCheckpointWarning, stacklevel=3
            )

    def _clear_the_way(self) -> None:
        """Renames damaged steps, and removes what a process killed during a save has left."""
        if is_first():
            for step in self._damaged:
                os.rename(self.folder / str(step), _free_name(self.folder / f"{step}.damaged"))
            for leftover in self.folder.glob(f"*{_UNFINISHED}"):
                shutil.rmtree(leftover)
        if self._damaged:
            wait_for_all("damaged steps renamed")
            self._damaged = []
            self._manager.reload()

    def _restore_step(
        self,
        step: int,
        abstract_state: PyTree[Any],
        partial: bool,
        later: Mapping[str, Callable[[int], PyTree[jax.Array]]],
    ) -> Restored:
        folder = self.folder / str(step)
        if not folder.is_dir():
            raise _Damaged("there is no such folder")
        # Its files are read once more for this, which one process does for all.
        broken = broken_files(folder) if is_first() and is_sealed(folder) else ()
        if not first_decides(not broken):
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            named = ", ".join(broken[:3]) or "process 0 names them"
            raise _Damaged(f"files differ from its seal: {named}{more}")
        leaves, metadata = self._read_json_items(step)
        asked = _named_leaves(abstract_state)
        there = {name.partition("/")[0] for name in leaves}
        made = {
            name: leaf
            for slot, first in later.items()
            if slot not in there and any(name.partition("/")[0] == slot for name in asked)
            for name, leaf in _named_leaves({slot: first(step)}).items()
        }
        names = {name: saved_name(name, leaves) or name for name in asked if name not in made}
        if partial:
            leaves = {name: leaves[name] for name in names.values() if name in leaves}
        wanted = {before: asked[name] for name, before in names.items()}
        _check_same_leaves(step, leaves, wanted)
        found = self._read_leaves(step, wanted)
        sums = _describe_arrays(found)
        wrong = [name for name, leaf in leaves.items() if sums.get(name) != leaf]
        if wrong:
            raise _Damaged(f"leaves differ from their checksums: {', '.join(wrong)}")
        state = [made[name] if name in made else found[names[name]] for name in asked]
        structure = jax.tree.structure(abstract_state)
        return Restored(step, jax.tree.unflatten(structure, state), metadata)

    def _read_leaves(self, step: int, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Reads some leaves by their names in the checkpoint, onto the shardings asked for."""
        try:
            there = ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / "state").tree
        except Exception as error:  # as in `_read`
            raise _unreadable("state", error) from error
        item = jax.tree_util.tree_map_with_path(
            lambda path, _: wanted.get(_name(path), ocp.PLACEHOLDER), there
        )
        how = jax.tree.map(
            lambda leaf: (
                ocp.RestoreArgs()
                if leaf is ocp.PLACEHOLDER
                else ocp.checkpoint_utils.construct_restore_args(leaf)
            ),
            item,
        )
        state = self._read(step, state=ocp.args.PyTreeRestore(item, restore_args=how))["state"]
        return {name: leaf for name, leaf in _named_leaves(state).items() if name in wanted}

    def _read_json_items(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        read = self._read(step, checksums=ocp.args.JsonRestore(), metadata=ocp.args.JsonRestore())
        checksums, metadata = read["checksums"], read["metadata"]
        if not isinstance(checksums, dict) or checksums.keys() != {"leaves", "digest"}:
            raise _Damaged("item checksums: not the checksums of a state")
        if checksums["digest"] != _digest(checksums["leaves"], metadata):
            raise _Damaged("item checksums or metadata: they differ from their digest")
        return checksums["leaves"], metadata

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds; all mean: unreadable
            raise _unreadable(" or ".join(items), error) from error


class _Sealing:
    """A thread that seals a checkpoint as soon as it is committed, while training goes on.

    Args:
      folder: of the step.
      leaves: shape, dtype and checksum of each leaf, which is read back first; None reads nothing.
    """

    def __init__(self, folder: Path, leaves: Mapping[str, Any] | None):
        self._folder = folder
        self._leaves = leaves
        self._error: Exception | None = None
        self._written = threading.Event()
        # A daemon: where Orbax fails to commit, this thread must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="seal", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._folder.exists():
            if self._written.wait(_POLL_SECONDS):
                return
        try:
            self._seal()
        except Exception as error:  # for whoever waits
            self._error = error

    def _seal(self) -> None:
        if self._leaves is not None:
            _refuse_unlike(self._folder, self._leaves)
        write_seal(self._folder)

    def check(self) -> None:
        """Raises what reading back or sealing has raised by now."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Ends the thread, and seals a committed checkpoint that has no seal.

        To be called when Orbax is done with the step, whether it succeeded or not.

        Raises:
          CheckpointError: what was read back is not what was saved.
          OSError: the seal cannot be written.
        """
        self._written.set()
        self._thread.join()
        self.check()
        if self._folder.exists() and not is_sealed(self._folder):
            self._seal()


def _refuse_unlike(folder: Path, leaves: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a step's files do not hold the leaves that were saved."""
    try:
        found = dict(_read_back(folder / "state", leaves))
        wrong = [name for name, leaf in leaves.items() if found.get(name) != leaf["checksum"]]
        fault = f"leaves differ from what was saved: {', '.join(wrong[:3])}" if wrong else ""
    except Exception as error:  # as in `Checkpoints._read`
        fault = str(_unreadable("state", error))
    if fault:
        raise CheckpointError(
            f"the checkpoint that was just written to {folder} is damaged: {fault}. Its disk does "
            "not keep what is written to it: see that it has room and no errors, or write "
            "somewhere else; a run goes on from its last whole checkpoint"
        )


def _read_back(folder: Path, leaves: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the checksums of leaves as their files have them, a few at a time.

    It works on the host: devices may be full, and other processes take no part.
    """
    handler = ocp.PyTreeCheckpointHandler()
    there = handler.metadata(folder).tree
    paths, structure = jax.tree_util.tree_flatten_with_path(there)
    to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)
    for names in _parts(leaves):
        chosen = [leaf if _name(path) in names else ocp.PLACEHOLDER for path, leaf in paths]
        wanted = jax.tree.unflatten(structure, chosen)
        arrays = handler.restore(folder, args=ocp.args.PyTreeRestore(wanted, to_host))
        for name, array in _named_leaves(arrays).items():
            if name in names:
                yield name, _hex(host_checksum(np.asarray(array)))


def _parts(leaves: Mapping[str, Any]) -> Iterator[set[str]]:
    """Yields the names of leaves that are read at once."""
    names: set[str] = set()
    size = 0
    for name, leaf in leaves.items():
        names.add(name)
        size += 8 * math.prod(leaf["shape"])  # no element takes more
        if size >= _READ_AT_ONCE:
            yield names
            names, size = set(), 0
    if names:
        yield names


def _unreadable(item: str, error: Exception) -> _Damaged:
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return _Damaged(f"item {item} cannot be read: {reason}")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named_leaves(tree: PyTree[Any]) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _describe_arrays(state: PyTree[jax.Array]) -> dict[str, dict[str, Any]]:
    arrays = _named_leaves(state)
    sums = tree_checksums(arrays)
    return {name: _describe(leaf) | {"checksum": _hex(sums[name])} for name, leaf in arrays.items()}


def _hex(checksum: Any) -> str:
    return "".join(f"{each:08x}" for each in checksum)


def _check_same_leaves(step: int, saved: dict[str, Any], abstract_state: PyTree[Any]) -> None:
    asked = {name: _describe(leaf) for name, leaf in _named_leaves(abstract_state).items()}
    found = {name: {k: leaf[k] for k in ("shape", "dtype")} for name, leaf in saved.items()}
    different = sorted(n for n in asked.keys() | found.keys() if asked.get(n) != found.get(n))
    if different:
        lines = "\n  ".join(
            f"{name}: saved {_text(found.get(name))}, asked {_text(asked.get(name))}"
            for name in different
        )
        raise CheckpointError(
            f"the checkpoint of step {step} holds another state than asked for:\n  {lines}\n"
            "Build the state from the run's own config."
        )


def _text(leaf: dict[str, Any] | None) -> str:
    return "nothing" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"


def _with_shardings(abstract_state: PyTree[Any]) -> PyTree[Any]:
    leaves = _named_leaves(abstract_state)
    bare = [name for name, leaf in leaves.items() if leaf.sharding is None]
    if not bare:
        return abstract_state
    if len(bare) < len(leaves):
        raise ValueError(f"give every leaf a sharding or none: {', '.join(bare)} have none")
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first), abstract_state
    )


def _digest(leaves: Any, metadata: Any) -> str:
    text = json.dumps([leaves, metadata], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 1000))]
    return next(name for name in names if not name.exists())
