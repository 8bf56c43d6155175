"""The known families of pretrained weights, and the lookup of a directory's family."""

from __future__ import annotations

from unified_mm.pretrained.audio_towers import AST, WHISPER
from unified_mm.pretrained.bert import BERT
from unified_mm.pretrained.clip import CLIP, SIGLIP
from unified_mm.pretrained.clip_towers import CLIP_IMAGE_TOWER, CLIP_TEXT_TOWER
from unified_mm.pretrained.efficientnet import EFFICIENTNET_LITE
from unified_mm.pretrained.family import Family
from unified_mm.pretrained.gpt2 import GPT2
from unified_mm.pretrained.idefics import IDEFICS
from unified_mm.pretrained.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from unified_mm.pretrained.llava import LLAVA
from unified_mm.pretrained.open_clip import OPEN_CLIP
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.videomae import VIDEOMAE
from unified_mm.pretrained.vit import VIT

FAMILIES: tuple[Family, ...] = (
    CLIP,
    CLIP_IMAGE_TOWER,
    CLIP_TEXT_TOWER,
    OPEN_CLIP,
    SIGLIP,
    VIT,
    EFFICIENTNET_LITE,
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    BERT,
    IDEFICS,
    LLAVA,
    AST,
    WHISPER,
    VIDEOMAE,
)
# Near relatives that are something else, and why.
TILES = "it cuts pictures into tiles (anyres), and here a picture is one square; 'llava' is read"
OTHERS = {
    "siglip2": "it takes pictures of any shape (naflex); other SigLIP 2 weights say 'siglip'",
    "llava_next": TILES,
    "llava_onevision": TILES,
    "llava_next_video": "it reads videos; 'llava', of single pictures, is read",
    "video_llava": "it reads videos; 'llava', of single pictures, is read",
    "vipllava": "it joins the features of several layers; 'llava', of one layer, is read",
}


def family_of(source: Source) -> Family:
    """Returns the family that a directory's config.json names.

    Raises:
      ValueError: if the architecture is not known; the message lists those that are.
    """
    found = source.config.get("model_type")
    for family in FAMILIES:
        if found in family.types:
            return family
    why = f" ({OTHERS[found]})" if found in OTHERS else ""
    known = ", ".join(sorted(name for family in FAMILIES for name in family.types))
    raise ValueError(
        f"{source.config.where}: model_type={found!r} is no architecture that is known here{why}: "
        f"{known}"
    )
