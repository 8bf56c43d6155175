"""How raw data becomes tokens: one file a modality."""

from unified_mm.modalities.modality import Modality, build_modalities
from unified_mm.modalities.tokens import Group, TokenMetadata, Tokens, concatenate

__all__ = ["Group", "Modality", "TokenMetadata", "Tokens", "build_modalities", "concatenate"]
