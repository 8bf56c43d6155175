"""Writes a folder of data, or what is made, as a TFDS dataset in `array_record` format.

    python -m unified_mm.prepare --config=configs/coco.py --config.data.dir=FOLDER --out=DIR
    python -m unified_mm.prepare ... --resize=256

`--config.data.source=tfds --config.data.dir=DIR` trains on it; without `--resize` the batches are
those of the folder, byte for byte. Pictures, sounds, clips and shapes are held as their files are,
with captions, transcripts and labels. The same command resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from unified_mm.cli.command import command
from unified_mm.cli.messages import disk_is_full, say
from unified_mm.cli.recipes import DATA_FIELDS, outside, resolve
from unified_mm.config import Config
from unified_mm.files import user_path

# Which fields say what is written; all others are the training's.
SETTABLE = (*DATA_FIELDS, "data.val_share", "data.image_size")  # the last of the world


@command(
    "prepare",
    __doc__,
    needs=("out",),
    takes=("config", "resize", "quality", "shard_megabytes"),
    recipe="coco",
    interrupted="interrupted; the same command goes on from the last whole shard",
)
def main(flags: argparse.Namespace) -> int:
    """Reads, checks and writes all splits; running it again resumes."""
    from unified_mm.data.sources import AnnotatedFolder, open_source
    from unified_mm.data.tfds_examples import Options
    from unified_mm.data.tfds_writer import progress, write_dataset

    refuse_ignored(flags)
    out = user_path(flags.out, "--out").absolute()
    config = Config(resolve(flags.recipe, say).to_dict())
    source = open_source(config.data)
    if not isinstance(source, AnnotatedFolder):
        raise ValueError(
            f"data.source={config.data.source!r} is a mixture or of your own making: what is "
            "written is a folder, what this package makes, or another TFDS dataset"
        )
    if source.banner:
        say(source.banner)
    if unread := config.unread(list(flags.recipe.overrides)):
        raise ValueError(f"{', '.join(unread)}: set on the command line, but nothing reads it here")
    options = Options(flags.resize, flags.quality, int(flags.shard_megabytes * 2**20))
    try:
        write_dataset(source, out, options, say)
    except Exception as error:
        if not disk_is_full(error):
            raise
        print(
            f"error: no space left on device for {out}; {progress(out)}. Make room, and the same "
            "command goes on from there",
            file=sys.stderr,
        )
        return 1
    say(report(out))
    return 0


def refuse_ignored(flags: argparse.Namespace) -> None:
    """Raises ValueError if a flag or field was given that is not read, or --out is wrong."""
    if not flags.out:
        raise ValueError("--out=DIR is needed: a new folder for the dataset")
    if "://" in flags.out:
        raise ValueError(f"--out={flags.out}: write to this machine, then copy the folder there")
    if "quality" in flags.given and not flags.resize:
        raise ValueError("--quality is read with --resize alone: otherwise files keep their bytes")
    for field in outside(flags.recipe.overrides, SETTABLE):
        raise ValueError(
            f"{field} cannot be set here, for it changes nothing of what is written: set it "
            f"where you train. Here are {', '.join(SETTABLE)}"
        )


def report(out: Path) -> str:
    """Returns how much was written, and the flags that train on it."""
    shards = list(out.glob("*.array_record-*"))
    size = sum(shard.stat().st_size for shard in shards)
    return (
        f"{len(shards)} shards, {size / 2**20:,.1f} MiB in {out}\n"
        f"train on it: --config.data.source=tfds --config.data.dir={out}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
