"""Pictures, texts and sounds in one contrast, of rows that have what they have.

    python -m unified_mm.main --config=experiments/stamps.py --config.data.dir=TUXPAINT \
        --workdir=runs/stamps
    python -m unified_mm.index --run=runs/stamps --images=TUXPAINT/images --out=runs/stamps-index
    python -m unified_mm.index --run=runs/stamps --index=runs/stamps-index --query_item=audio:SOUND

TUXPAINT is a folder of `images/`, `audio/` and `meta.jsonl` (image, text, sound), of whose 530 rows
96 have a sound. Each pair of the three is contrasted where a row has both.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from unified_mm.config import defaults_of
from unified_mm.default_config import default_config
from unified_mm.modalities.audio import AudioModality


def get_config() -> ConfigDict:
    """Returns the config of three modalities in early fusion."""
    config = default_config()
    config.data.fields.update({"image": "image", "caption": "text", "audio": "sound"})
    config.data.update({"image_size": 64, "mirror": False, "vocabulary_size": 800})
    config.model.update({"width": 96, "layers": 4, "heads": 4, "feed_forward": 384})
    config.model.modalities.image.patch = 16
    config.model.modalities.text.length = 24
    audio = {"type": "audio", **defaults_of(AudioModality), "seconds": 2.0, "mels": 64}
    audio |= {"patch": (8, 64), "roll": True, "gain": 6.0, "mask_frames": 20, "mask_mels": 12}
    config.model.modalities.audio = audio
    for objective in config.objectives.values():
        objective.weight = 0.0
    config.objectives.contrastive.update({"weight": 1.0, "between": "image,audio,text"})
    config.train.update({"optimizer": "muon", "learning_rate": 8e-3})
    config.train.update({"steps": 200, "batch_size": 64})
    config.checkpoint.every = 100
    return config
