"""Clips played backwards: does a run tell which way things move by their order in time?

    python -m unified_mm.main --config=configs/video.py --workdir=runs/clips
    python -m experiments.clips --run=runs/clips
    python -m unified_mm.main --config=configs/video.py --workdir=runs/one_frame \
        --config.model.modalities.video.frames=1 --config.model.modalities.video.tubelet=1 \
        --config.model.modalities.video.stem=linear

A clip is held against its caption and against the same with the direction made false, as it is and
with its frames in the other order. The last command is the control: of one frame nothing tells the
direction.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import unified_mm
from unified_mm.data import clips
from unified_mm.data.sources import open_source
from unified_mm.evaluation.splits import foils_of

KIND = "direction"


def main() -> None:
    """Prints the shares of verdicts that are right, and that turn with the clip."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True)
    given = parser.parse_args()
    model = unified_mm.load(given.run)
    source = open_source(model.config.data)
    files = {each.id: each.parts["video"] for each in source.manifest("val").records}
    foils = [foil for foil in foils_of(source, "val") if foil.kind == KIND]
    with TemporaryDirectory() as folder:
        turned = [backwards(files[foil.image_id], Path(folder)) for foil in foils]
        true, false = (
            model.embed_texts(texts)
            for texts in ([foil.caption for foil in foils], [foil.foil for foil in foils])
        )
        told = [
            np.einsum("IZ,IZ->I", model.embed(each, of="video"), true - false) > 0
            for each in ([files[foil.image_id] for foil in foils], turned)
        ]
    found = {"foils": len(foils), "right": told[0].mean(), "turned": (told[0] != told[1]).mean()}
    print(json.dumps({name: float(value) for name, value in found.items()}))


def backwards(file: str, folder: Path) -> Path:
    """Writes a clip with its frames in the other order."""
    with clips.opened(file) as clip:
        frames = np.stack(list(clips.frames_at(clip, clip.times)))
        fps = len(clip.times) / clip.seconds
    out = folder / f"{Path(file).stem}.npz"
    np.savez(out, frames=frames[::-1], fps=fps)
    return out


if __name__ == "__main__":
    main()
