"""Early fusion of features: a tower reads each context modality, and text reads on beside it.

Liu et al. 2023, "Visual instruction tuning" (LLaVA): an MLP takes a tower's features into the
width of one transformer, in which they are tokens like those of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.config import build_options, option
from unified_mm.models.early import EarlyFusion
from unified_mm.models.late import WithTowers
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.rules import View
from unified_mm.nn.feed_forward import ACTIVATIONS
from unified_mm.nn.layers import Dense
from unified_mm.nn.tokens import (
    POSITION_KEYS,
    Tokens,
    blank,
    single_document,
    unfold_items,
    with_positions,
)


@dataclass(frozen=True)
class ProjectorOptions:
    """The way from a tower's features to tokens.

    Attributes:
      skip: how many of the tower's first tokens are left out (1: a class token).
      activation: between the two dense maps; see `nn.feed_forward.ACTIVATIONS`.
      bias: whether these have biases.
    """

    skip: int = option(0, least=0)
    activation: str = option("gelu_exact", choices=tuple(ACTIVATIONS))
    bias: bool = True


class Projector(nn.Module):
    """Two dense maps of a width with an activation between: [..., features] -> [..., D]."""

    options: ProjectorOptions
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... D"]:
        dense = partial(Dense, (self.width,), use_bias=self.options.bias, dtype=self.dtype)
        hidden = dense((None,), ("feed_forward",), name="up")(x)
        hidden = ACTIVATIONS[self.options.activation](hidden)
        return dense(("feed_forward",), ("embed",), name="down")(hidden)


class EarlyFeatures(EarlyFusion, WithTowers):
    """Early fusion whose context tokens are projected features of towers.

    Where the tokenizer knows a token that stands for the picture, the picture is read at its place
    in the text, after what comes before it and before the rest. The picture's last token is then
    the text's own, so that the text goes on from there.

    Attributes:
      projector: from the features of each context modality to tokens.
    """

    projector: ProjectorOptions

    places_pictures: ClassVar[bool] = True

    @classmethod
    def from_config(cls, model: Any, modalities: Any, heads: Any, **more: Any) -> UnifiedModel:
        options = build_options(ProjectorOptions, model.projector, "model.projector")
        built = super().from_config(model, modalities, heads, projector=options, **more)
        if built.picture is not None and len(built.context_names) != 1:
            raise ValueError(
                f"data.special_tokens.image stands for one picture, and the model reads "
                f"{', '.join(built.context_names)}: set it to '', or read one modality beside text"
            )
        return built

    def setup(self) -> None:
        super().setup()
        o = self.options
        self.projectors = {
            name: Projector(self.projector, o.width, o.dtype) for name in self.context_names
        }

    @property
    def picture(self) -> int | None:
        """The id of the token that stands for the picture in a text; None if there is none."""
        found: int | None = self.modalities["text"].tokenizer.image_id
        return found

    def encode(
        self, batch: Batch, views: Sequence[View], *, deterministic: bool = True
    ) -> dict[str, Encoded]:
        looked = self.with_features(batch, deterministic=deterministic)
        return super().encode(looked, views, deterministic=deterministic)

    def read_context(self, batch: Batch, view: View) -> Encoded:
        return super().read_context(self.with_features(batch), view)

    def prefill(
        self, batch: Batch, view: View, cache_room: int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        return super().prefill(self.with_features(batch), view, cache_room)

    def prefix(self, batch: Batch, view: View) -> Cache:
        if self.picture is not None:
            raise ValueError(
                "this model's picture stands within the text and sees what comes before it: it "
                "cannot be read before the text is there, as serving does; write with "
                "`generate`, or from Python"
            )
        return super().prefix(batch, view)

    def with_features(self, batch: Batch, *, deterministic: bool = True) -> Batch:
        """Returns the batch with each context's features as `tokens`, at their places."""
        looked: dict[str, Any] = {
            name: {**batch[name], "tokens": self.project(name, tokens)}
            for name, tokens in self.look_at_all(batch, deterministic=deterministic).items()
        }
        if self.picture is None or "text" not in batch:
            return {**batch, **looked}
        if "position" in batch["text"]:
            raise ValueError(
                "documents place their pictures themselves: this model reads one picture, where "
                "its token (data.special_tokens.image) stands in the text"
            )
        ((name, arrays),) = looked.items()
        tokens, text = place_picture(arrays["tokens"], batch["text"], self.picture)
        return {name: {**arrays, "tokens": tokens}, "text": text}

    def project(self, name: str, features: Tokens) -> Tokens:
        """Returns a tower's features, an item a row, as tokens of the main transformer."""
        skip = self.projector.skip
        valid = features.metadata.valid[:, skip:]
        x = blank(self.projectors[name](features.embeddings[:, skip:]), valid)
        group = features.metadata.groups[0]._replace(length=x.shape[1])
        return Tokens(x, single_document(valid, group))

    def embed_context(self, batch: Batch) -> list[Tokens]:
        parts: list[Tokens] = []
        before = 0
        for name in self.context_names:
            arrays: Any = batch[name]
            tokens: Tokens = arrays["tokens"]
            if tokens.metadata.groups[0].start is not None:  # not placed by the text
                tokens = unfold_items(tokens.embeddings, tokens.metadata, arrays, before)
            parts.append(tokens)
            before += tokens.embeddings.shape[1]
        return parts

    def embed_text(self, text: Mapping[str, Array], name: str, after: int = 0) -> Tokens:
        tokens = super().embed_text(text, name, after)
        if self.picture is not None:  # it begins before the picture, or after none
            groups = tuple(each._replace(first=None) for each in tokens.metadata.groups)
            metadata = tokens.metadata.replace(groups=groups)  # type: ignore[attr-defined]
            tokens = tokens.replace(metadata=metadata)  # type: ignore[attr-defined]
        if "last" not in text:
            return tokens
        x = jnp.where(text["at_last"][..., None], text["last"][:, None], tokens.embeddings)
        return tokens.replace(embeddings=x)  # type: ignore[attr-defined]


def place_picture(
    looked: Tokens, text: Mapping[str, Array], picture: int
) -> tuple[Tokens, dict[str, Array]]:
    """Places a picture in each row where its text has the token that stands for it.

    Args:
      looked: the tokens of one picture a row; not valid where there is none.
      text: the texts, `ids` and `valid` [B, T].
      picture: the id of that token.

    Returns:
      All tokens of the picture but the last, and the text with that one in the token's place. In
      a row without a picture, the text is as if neither it nor its token were there. A picture
      that no token stands for becomes NaN, and so does the loss.
    """
    valid = looked.metadata.valid
    patches, there = valid.shape[1] - 1, valid[:, -1:]
    at = (text["ids"] == picture) & text["valid"]
    index = jnp.arange(at.shape[1], dtype=jnp.int32)
    begin = at.argmax(1).astype(jnp.int32)[:, None]
    before = index < begin
    # What follows is as far on as where a picture stands before the whole text.
    position = index + jnp.where(before, jnp.where(there, 0, patches + 1), patches)
    nothing = jnp.zeros(at.shape, jnp.int32)
    placed = {
        **text,
        "valid": text["valid"] & (there | ~at),
        "last": looked.embeddings[:, -1],
        "at_last": at & there,
        **dict(zip(POSITION_KEYS, (position, nothing, nothing), strict=True)),
    }
    # A picture that no token stands for would lose its last one.
    lost = there[:, 0] & text["valid"].any(1) & ~at.any(1)
    x = jnp.where(lost[:, None, None], jnp.nan, looked.embeddings[:, :-1])
    (group,) = looked.metadata.groups
    metadata = single_document(valid[:, :-1], group._replace(length=patches))
    where = begin + jnp.arange(patches, dtype=jnp.int32)
    return Tokens(x, with_positions(metadata, position=where)), placed
