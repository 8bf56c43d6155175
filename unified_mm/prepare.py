"""Writes a COCO folder, or the embedded world, as a TFDS dataset in `array_record` format.

    python -m unified_mm.prepare --config=configs/coco.py --config.data.dir=FOLDER --out=DIR
    python -m unified_mm.prepare ... --resize=256

`--config.data.source=tfds --config.data.dir=DIR` trains on it: without `--resize` on the same
batches as from the folder, byte for byte. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from unified_mm.commands import disk_is_full, exit_code, say
from unified_mm.config import Config
from unified_mm.files import user_path
from unified_mm.recipes import DATA_FIELDS, outside, overridden, parse_flags, resolve

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/coco.py", "The recipe whose data is written."
)
OUT = flags.DEFINE_string("out", "", "A new folder for the dataset.")
RESIZE = flags.DEFINE_integer(
    "resize",
    0,
    "The shorter side of an image in pixels, at most: larger ones become JPEGs of --quality. "
    "0 keeps every file's bytes.",
    lower_bound=0,
)
QUALITY = flags.DEFINE_integer(
    "quality", 95, "Of resized images, on Pillow's scale.", lower_bound=1, upper_bound=100
)
SHARD = flags.DEFINE_float(
    "shard_megabytes", 128, "Of image files that one shard takes.", lower_bound=0.001
)

# Which fields say what is written; all others are the training's.
SETTABLE = (*DATA_FIELDS, "data.image_size")  # the last of the world


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise SystemExit(f"error: not a flag: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    again = "interrupted; the same command goes on from the last whole shard"
    raise SystemExit(exit_code(prepare, interrupted=again))


def prepare() -> int:
    """Reads, checks and writes all splits; running it again goes on."""
    from unified_mm.data.sources import AnnotatedFolder, open_source
    from unified_mm.data.tfds_examples import Options
    from unified_mm.data.tfds_writer import progress, write_dataset

    refuse_ignored()
    out = user_path(OUT.value, "--out").absolute()
    asked = overridden(flags.FLAGS["config"])
    config = Config(resolve(CONFIG.value, flags.FLAGS["config"], say).to_dict())
    source = open_source(config.data)
    if not isinstance(source, AnnotatedFolder):
        raise ValueError(
            f"data.source={config.data.source!r} is of your own making: what is written is a COCO "
            "folder, the embedded world, or another TFDS dataset"
        )
    if source.banner:
        say(source.banner)
    if unread := config.unread(asked):
        raise ValueError(f"{', '.join(unread)}: set on the command line, but nothing reads it here")
    options = Options(RESIZE.value, QUALITY.value, int(SHARD.value * 2**20))
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


def refuse_ignored() -> None:
    """Raises ValueError for what was given and is not read, and where --out is missing."""
    if not OUT.value:
        raise ValueError("--out=DIR is needed: a new folder for the dataset")
    if "://" in OUT.value:
        raise ValueError(f"--out={OUT.value}: write to this machine, then copy the folder there")
    if flags.FLAGS["quality"].present and not RESIZE.value:
        raise ValueError("--quality is read with --resize alone: otherwise files keep their bytes")
    for field in outside(overridden(flags.FLAGS["config"]), SETTABLE):
        raise ValueError(
            f"{field} cannot be set here, for it changes nothing of what is written: set it "
            f"where you train. Here are {', '.join(SETTABLE)}"
        )


def report(out: Path) -> str:
    """What there is, and how to train on it."""
    shards = list(out.glob("*.array_record-*"))
    size = sum(shard.stat().st_size for shard in shards)
    return (
        f"{len(shards)} shards, {size / 2**20:,.1f} MiB in {out}\n"
        f"train on it: --config.data.source=tfds --config.data.dir={out}"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
