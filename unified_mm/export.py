"""Writes a run's programs and parameters so that they run without this package.

    python -m unified_mm.export --run runs/first --out DIR
    python -m unified_mm.export --run runs/first --out DIR --platforms cpu,cuda,tpu

DIR gets the image encoder, the text encoder, the prefill and the decode step (those that the run's
model has) in the format of `jax.export`, for any batch size; parameters.npz; tokenizer.json; a
manifest.json with names, shapes and checksums of all files; and exported.py, which loads them and
needs only jax and numpy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unified_mm.cli.command import command
from unified_mm.cli.messages import say
from unified_mm.files import new_folder, refuse_existing, sha256, user_path, write_json
from unified_mm.inference import exported
from unified_mm.inference.loaded import LoadedModel
from unified_mm.inference.programs import IMAGE, Program, programs
from unified_mm.parallel.sharding import path_of

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PARAMETERS = "parameters.npz"


def export(
    model: LoadedModel,
    out: str | os.PathLike[str],
    *,
    platforms: Sequence[str] = (),
    prompt: int = 0,
    room: int = 0,
) -> dict[str, Any]:
    """Writes a model's programs and parameters, and returns the manifest.

    Args:
      model: the model.
      out: a new directory.
      platforms: the platforms to run on; empty for that of this machine.
      prompt: the most tokens of a prompt; 0 for as many as the model reads.
      room: the most tokens that are generated; 0 for as many as the model allows.

    Raises:
      ValueError: if `out` exists, a platform is unknown, the model does not allow the sizes or has
        nothing to export, or flatbuffers is not installed.
    """
    need_flatbuffers()
    chosen = tuple(platforms) or (jax.export.default_export_platform(),)
    for platform in chosen:
        if platform not in PLATFORMS:
            raise ValueError(f"--platforms: {platform!r} is none of {', '.join(PLATFORMS)}")
    length = model.task.modalities["text"].length
    for flag, value, most in (("prompt_tokens", prompt, length), ("tokens", room, length - 1)):
        if not 0 <= value <= most:
            raise ValueError(f"--{flag}={value}: this model's texts allow 1 to {most}, or 0 for it")
    prompt, room = prompt or length, room or length - 1
    with new_folder(user_path(out, "--out").absolute()) as half:
        return _write(model, half, chosen, prompt, room)


def need_flatbuffers() -> None:
    """Raises ValueError if flatbuffers is missing, which jax.export needs but does not install."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("jax writes programs by flatbuffers: pip install 'unified_mm[export]'")


def _write(
    model: LoadedModel, folder: Path, platforms: tuple[str, ...], prompt: int, room: int
) -> dict[str, Any]:
    tree = jax.device_get(model.predictor.params)
    leaves = [
        (path_of(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    # NumPy has no name for types such as bfloat16: their bits are kept.
    bits = {name: x.view(f"u{x.itemsize}") if x.dtype.kind == "V" else x for name, x in leaves}
    np.savez(folder / PARAMETERS, **bits)  # type: ignore[arg-type]
    written = {}
    params = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in leaves]
    for name, program in programs(model, prompt, room).items():
        lowered = program.exported(params, platforms)
        (folder / f"{name}.program").write_bytes(lowered.serialize())
        written[name] = _described(name, program, lowered.out_avals)
    model.task.tokenizer.save(folder / "tokenizer.json")
    manifest = {
        "format": exported.FORMAT,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "run": {"fusion": model.config.model.fusion, "step": model.step, "state": model.state},
        "programs": written,
        "parameters": [_shape(x, name=name) for name, x in leaves],
        "image": _preprocessing(model),
        "text": _text(model, prompt, room),
        "files": {
            path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in sorted(folder.iterdir())
        },
    }
    whole = {"manifest": manifest, "sha256": exported.digest(manifest)}
    write_json(folder / exported.MANIFEST, whole)
    _copy_loader(folder)
    return manifest


def _described(name: str, program: Program, outputs: Sequence[Any]) -> dict[str, Any]:
    return {
        "file": f"{name}.program",
        "inputs": {key: _shape(each) for key, each in program.inputs.items()},
        "state": [_shape(each) for each in program.state],
        "output": _shape(outputs[0]),
    }


def _shape(array: Any, **more: str) -> dict[str, Any]:
    """Returns the dtype and shape of an array for JSON; a symbolic size is given by its name."""
    sizes = [size if isinstance(size, int) else str(size) for size in array.shape]
    return {**more, "dtype": array.dtype.name, "shape": sizes}


def _preprocessing(model: LoadedModel) -> Mapping[str, Any] | None:
    """Returns how to preprocess an image, None for a model without images.

    The programs themselves normalise the pixels.
    """
    modality = model.task.modalities.get(IMAGE)
    if modality is None:
        return None
    return {
        "size": modality.size,
        "pixels": "uint8 RGB, upright (EXIF), transparency over white",
        "fit": modality.fit,
        "resampling": modality.resampling,
        "normalised_within": {
            "mean": list(modality.embedding.mean),
            "std": list(modality.embedding.std),
        },
    }


def _text(model: LoadedModel, prompt: int, room: int) -> dict[str, Any]:
    modality, tokenizer = model.task.modalities["text"], model.task.tokenizer
    return {
        "length": modality.length,
        "prompt": prompt,
        "room": room,
        "begin": tokenizer.bos_id,
        "end": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
        "end_when_cut": tokenizer.special_tokens["eos_when_cut"],
        "attend_padding": modality.attend_padding,
    }


def _copy_loader(folder: Path) -> None:
    """Copies the loader, and the package flatbuffers, which jax needs to read programs."""
    shutil.copy(exported.__file__, folder / "exported.py")
    found = importlib.util.find_spec("flatbuffers")
    assert found is not None and found.origin is not None
    package = Path(found.origin).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))


@command(
    "export",
    __doc__,
    needs=("run", "out"),
    takes=("best", "platforms", "prompt_tokens", "tokens"),
)
def main(options: argparse.Namespace) -> int:
    """Loads the run and exports it."""
    from unified_mm.inference.loaded import load

    need_flatbuffers()
    refuse_existing(Path(options.out))
    platforms = [name.strip() for name in options.platforms.split(",") if name.strip()]
    model = load(options.run, best=options.best)
    model.refuse_alone("exported")
    manifest = export(
        model,
        options.out,
        platforms=platforms,
        prompt=options.prompt_tokens,
        room=options.tokens or 0,
    )
    for name, program in manifest["programs"].items():
        taken = [f"{key} {each['dtype']}{each['shape']}" for key, each in program["inputs"].items()]
        say(f"{name}: {', '.join(taken)}")
    say(f"written: {options.out}")
    summary = {name: manifest[name] for name in ("platforms", "run", "files")}
    say(json.dumps({**summary, "programs": list(manifest["programs"])}))
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
