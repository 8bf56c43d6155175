"""Pictures, texts and sounds in one contrast, of rows that have what they have.

    python -m unified_mm.main --config=experiments/stamps.py --config.data.dir=TUXPAINT \
        --workdir=runs/stamps
    python -m unified_mm.index --run=runs/stamps --images=TUXPAINT/images --out=runs/stamps-index
    python -m unified_mm.index --run=runs/stamps --index=runs/stamps-index --query_item=audio:SOUND

TUXPAINT is a folder of `images/`, `audio/` and `meta.jsonl` (image, text, sound), of whose 530 rows
96 have a sound. Each pair of the three is contrasted where a row has both.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from unified_mm.cli.recipes import load_recipe

RECIPE = str(Path(__file__).parents[1] / "configs" / "audio.py")


def get_config() -> ConfigDict:
    """Returns the config of three modalities in early fusion."""
    config: ConfigDict = load_recipe(RECIPE).get_config("pictures")
    config.data.fields.update({"image": "image", "caption": "text", "audio": "sound"})
    config.data.mirror = False
    return config
