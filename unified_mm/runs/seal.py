"""A seal: one file with the SHA-256 of every file of a folder, in the format of `sha256sum`.

It notices what the values alone cannot: a byte changed in a file that happens not to matter now.
`cd <folder> && sha256sum --check SHA256SUMS` verifies it without this package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from unified_mm.files import write_atomically

SEAL = "SHA256SUMS"


def write_seal(folder: Path) -> None:
    """Seals the folder as it is. Atomic; reads every byte once."""
    write_atomically(folder / SEAL, _seal_text(folder).encode())


def is_sealed(folder: Path) -> bool:
    return (folder / SEAL).exists()


def broken_files(folder: Path) -> tuple[str, ...]:
    """Names, within the folder, of the files that are not as sealed; () where all is whole.

    A file that changed, that is missing or that was added is named, and the seal itself where it
    is the damaged one. Reads every byte once.
    """
    sealed = (folder / SEAL).read_bytes()
    found = _seal_text(folder).encode()
    if sealed == found:
        return ()
    changed = set(sealed.splitlines()) ^ set(found.splitlines())
    names = {line.partition(b"  ")[2].decode(errors="replace") for line in changed}
    files = set(_file_names(folder))
    # A line of the seal may name what never was, because the damage lies in the seal itself.
    listed = {line.partition(b"  ")[2].decode(errors="replace") for line in sealed.splitlines()}
    return tuple(sorted(names & (files | listed))) or (SEAL,)


def _seal_text(folder: Path) -> str:
    return "".join(f"{_sha256(folder / name)}  {name}\n" for name in _file_names(folder))


def _file_names(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != SEAL and not name.startswith(f".{SEAL}."))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
