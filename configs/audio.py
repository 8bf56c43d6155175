"""Classes of sounds, or what is said: one transformer over patches of a log-mel spectrogram.

    python -m unified_mm.main --config=configs/audio.py --workdir=runs/tones
    python -m unified_mm.main --config=configs/audio.py --config.data.dir=DIR --workdir=runs/sounds
    python -m unified_mm.main --config=configs/audio.py:speech --workdir=runs/strings
    python -m unified_mm.main --config=configs/audio.py:pictures --config.data.dir=DIR --workdir=...

Without data it learns a small set that it makes itself, of tones, sweeps, clicks and noises. A
folder has a folder a class, or a csv or JSON lines that name files and classes (ESC-50's is one);
what another field holds is said by `data.fields.label`, and what is held out by `data.val_rows`:

    --config.data.dir=fsdd --config.data.fields.label=digit --config.data.val_rows=take=5,6,7,8,9
    --config.data.dir=esc10 --config.data.val_rows=fold=4 --config.model.modalities.audio.seconds=5

It begins with Whisper's encoder, with AST or with a tower of pictures, as `python -m
unified_mm.import_weights` reads them, and hears as they did (in fewer seconds where that is asked):

    --config.model.fusion=late --config.model.start_from.audio=runs/whisper

| size | parameters | hardware | time | accuracy |
| --- | --- | --- | --- | --- |
| `tiny` | 0.48 M | 2 CPU cores | 600 steps, 3 CPU minutes | 0.981 (fsdd takes 5 to 9; chance 0.1) |
| `speech` | 0.51 M | 2 CPU cores | 600 steps, 5 CPU minutes | word error rate 0.012, 0.098 by CTC |
| `base` | not counted | one accelerator | not measured | not measured |

`tiny` is the mean of three seeds, with compiling and scoring; `speech` is one, on strings of tones.
Kernel ridge on the pooled spectrum, in four parts, reaches 0.924 on the same takes. New speakers
are harder: with each of five left out in turn the mean is 0.746 (0.720 to 0.776; kernel ridge 0.71)
where sounds are equalised at random and bands are fewer:

    --config.model.modalities.audio.equalise=12 --config.model.modalities.audio.mask_mels=8
    --config.model.modalities.audio.mels=32 '--config.model.modalities.audio.patch=(4,32)'

`speech` learns transcripts (LibriSpeech, tables and JSON lines of files and texts), by the
captioner, which writes them, and by CTC on the tokens of the sound, side by side: `caption/wer` and
`transcription/wer`. A weight of 0 leaves either out. Without data it learns strings of digits that
it makes of tones. A tenth of what it hears is made of silence and noise, with an empty text; of
yours too, where `--config.data.negatives_of='noises/*.wav'` names them.

`pictures` contrasts each two of picture, sound and text, of rows that need not have all: a table or
JSON lines that name them (`data.fields.image`, `.audio` and `.caption` say by which columns). Then
`python -m unified_mm.index` and `serve` find the picture for a sound (`experiments/stamps.py`).
"""

from ml_collections import ConfigDict

from unified_mm.config import defaults_of
from unified_mm.default_config import default_config
from unified_mm.modalities.audio import AudioModality

SIZES = ("tiny", "base", "speech", "pictures")


def get_config(size: str = "auto") -> ConfigDict:
    """The recipe at a size; 'auto' is resolved by the command once jax has its devices."""
    if size not in ("auto", *SIZES):
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}, or none for auto")
    config = default_config()
    config.size = size
    config.model.dtype = "auto"
    config.data.source = "sounds"
    seen = config.model.modalities
    config.model.modalities = {"audio": {"type": "audio", **defaults_of(AudioModality)}}
    for objective in config.objectives.values():
        objective.weight = 0.0
    config.model.start_from.audio = ""  # or a run with a tower, for fusions that have towers
    audio = config.model.modalities.audio
    if size == "speech":
        return speech(config, seen.text)
    if size == "pictures":
        return pictures(config, seen)
    config.objectives.classification.update({"weight": 1.0, "of": "audio"})
    if size == "base":
        config.model.update({"width": 768, "layers": 12, "heads": 12, "feed_forward": 3072})
        audio.update({"preset": "kaldi", "mels": 128, "mask_frames": 192, "mask_mels": 48})
        config.train.update({"steps": 20_000, "batch_size": 64, "learning_rate": 1e-4})
        return config
    config.model.update({"width": 96, "layers": 4, "heads": 4, "feed_forward": 384})
    audio.update({"seconds": 0.75, "mels": 64, "patch": (4, 64), "gain": 6.0, "speed": 1.2})
    audio.update({"mask_frames": 20, "mask_mels": 12})
    config.objectives.classification.smoothing = 0.1
    config.train.update({"optimizer": "muon", "learning_rate": 8e-3})
    config.train.update({"steps": 600, "batch_size": 48})
    config.checkpoint.every = 200
    return config


def speech(config: ConfigDict, text: ConfigDict) -> ConfigDict:
    """Makes the recipe one of transcripts, small enough for two CPU cores."""
    config.model.modalities.text = text
    config.model.update({"width": 96, "layers": 4, "heads": 4, "feed_forward": 384})
    text.update({"length": 16})
    audio = config.model.modalities.audio
    audio.update({"seconds": 2.0, "mels": 64, "patch": (4, 64), "gain": 6.0})
    audio.update({"mask_frames": 10, "mask_mels": 12, "longer": "leave_out"})
    config.objectives.captioning.weight = 1.0
    config.objectives.transcription.update({"weight": 1.0, "units": "characters", "slots": 2})
    config.data.update({"source": "speech", "vocabulary_size": 300, "negatives": 0.1})
    config.evaluation.update({"transcripts": "plain", "negatives": 40})
    config.train.update({"optimizer": "muon", "learning_rate": 8e-3})
    config.train.update({"steps": 600, "batch_size": 48})
    config.checkpoint.every = 200
    return config


def pictures(config: ConfigDict, seen: ConfigDict) -> ConfigDict:
    """Makes the recipe one contrast of pictures, sounds and texts, for two CPU cores."""
    config.model.modalities.update({"image": seen.image, "text": seen.text})
    config.model.update({"width": 96, "layers": 4, "heads": 4, "feed_forward": 384})
    config.model.modalities.image.patch = 16
    config.model.modalities.text.length = 24
    audio = config.model.modalities.audio
    audio.update({"seconds": 2.0, "mels": 64, "patch": (8, 64), "roll": True, "gain": 6.0})
    audio.update({"mask_frames": 20, "mask_mels": 12})
    config.objectives.contrastive.update({"weight": 1.0, "between": "image,audio,text"})
    config.data.update({"source": "auto", "image_size": 64, "vocabulary_size": 800})
    config.train.update({"optimizer": "muon", "learning_rate": 8e-3})
    config.train.update({"steps": 200, "batch_size": 64})
    config.checkpoint.every = 100
    return config
