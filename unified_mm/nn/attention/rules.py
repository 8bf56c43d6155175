"""Attention rules: who may attend to whom, as small static tables.

A rule says, for a query token and a key token, which of them sees which, by modality alone: text
(what is written) or context (everything else: what is looked at). A predicate refines it by
metadata. A pass over one sequence may hold several texts about the same context, each under a rule
of its own; texts never see one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from unified_mm.nn.tokens import Group, TokenMetadata, spans

Fields = Mapping[str, Array]

Predicate = Literal["none", "all", "causal", "same_segment", "block_causal"]


def _causal(query: Fields, key: Fields) -> Array:
    return key["position"] <= query["position"]


def _same_segment(query: Fields, key: Fields) -> Array:
    return key["segment"] == query["segment"]


# Each predicate on metadata: (query [B, Q, 1], key [B, 1, K]) -> bool [B, Q, K]. A text token's
# segment is that of the latest image before it, so for it 'same_segment' is that image.
PREDICATES: dict[str, Callable[[Fields, Fields], Array]] = {
    "none": lambda query, key: jnp.zeros((1, 1, 1), bool),
    "all": lambda query, key: jnp.ones((1, 1, 1), bool),
    "causal": _causal,
    "same_segment": _same_segment,
    # Whole segments in order: all of its own, and all that came before.
    "block_causal": lambda query, key: _causal(query, key) | _same_segment(query, key),
}


@dataclass(frozen=True)
class AttentionRule:
    """Four predicates: from each of context and text (rows) to each of them (columns).

    `context_to_context` holds between tokens of one modality; `across_contexts` between two
    modalities that are both context.
    """

    name: str
    context_to_context: Predicate
    across_contexts: Predicate
    context_to_text: Predicate
    text_to_context: Predicate
    text_to_text: Predicate

    def predicate(self, query: Group, key: Group) -> Predicate:
        """Whether tokens of group `query` see those of group `key`."""
        if query.modality == "text":
            return self.text_to_text if key.modality == "text" else self.text_to_context
        if key.modality == "text":
            return self.context_to_text
        same = query.modality == key.modality
        return self.context_to_context if same else self.across_contexts

    def context_view(self, contexts: int) -> tuple[Predicate, Predicate] | None:
        """How `contexts` context modalities see each other; None where they see the text too.

        Texts whose rules give the same view can share one pass over the context. How two
        modalities see each other is no difference where there is but one.
        """
        if self.context_to_text != "none":
            return None
        return self.context_to_context, self.across_contexts if contexts > 1 else "none"


RULES: dict[str, AttentionRule] = {
    rule.name: rule
    for rule in (
        # Each modality sees itself alone: two towers in one transformer.
        AttentionRule(
            "separate",
            context_to_context="all",
            across_contexts="none",
            context_to_text="none",
            text_to_context="none",
            text_to_text="all",
        ),
        # The same with text in order, as language models read it.
        AttentionRule(
            "separate_causal",
            context_to_context="all",
            across_contexts="none",
            context_to_text="none",
            text_to_context="none",
            text_to_text="causal",
        ),
        # Text reads all of the context, and itself in order (prefix language model).
        AttentionRule(
            "prefix",
            context_to_context="all",
            across_contexts="all",
            context_to_text="none",
            text_to_context="all",
            text_to_text="causal",
        ),
        # Everything sees everything.
        AttentionRule(
            "joint",
            context_to_context="all",
            across_contexts="all",
            context_to_text="all",
            text_to_context="all",
            text_to_text="all",
        ),
        # Everything in order, the context first (so it never sees the text).
        AttentionRule(
            "causal",
            context_to_context="causal",
            across_contexts="causal",
            context_to_text="none",
            text_to_context="causal",
            text_to_text="causal",
        ),
        # Documents of images and text in any order: each image sees all of itself, and everything
        # sees what came before it.
        AttentionRule(
            "interleaved",
            context_to_context="block_causal",
            across_contexts="causal",
            context_to_text="causal",
            text_to_context="causal",
            text_to_text="causal",
        ),
        # The same, but text sees only the latest image before it (Alayrac et al. 2022, 3.1.3).
        AttentionRule(
            "interleaved_latest",
            context_to_context="block_causal",
            across_contexts="causal",
            context_to_text="causal",
            text_to_context="same_segment",
            text_to_text="causal",
        ),
    )
}


@dataclass(frozen=True)
class View:
    """A text about the context, as one objective wants it read.

    Attributes:
      name: the token group's name in the sequence.
      rule: the name of an attention rule.
      autoregressive: each token is predicted from those before it, so no token may see a later
        one, directly or through the context.
    """

    name: str
    rule: str
    autoregressive: bool = False

    def resolved(self) -> AttentionRule:
        """The rule with text made causal where it is scored token by token.

        Raises:
          ValueError: unknown rule, or one under which a token would see what it must predict.
        """
        if self.rule not in RULES:
            raise ValueError(f"unknown attention rule {self.rule!r}; there are {', '.join(RULES)}")
        rule = RULES[self.rule]
        if not self.autoregressive:
            return rule
        if rule.context_to_text == "all" and rule.text_to_context != "none":
            raise ValueError(
                f"{self.name}: rule {self.rule!r} lets the context see the text and the text see "
                "the context, so a token would see the one it must predict; use 'prefix', "
                "'causal' or 'separate'"
            )
        return replace(rule, text_to_text="causal")


@dataclass(frozen=True)
class MaskTable:
    """The table of one pass: (query group, key group) -> predicate; static and hashable."""

    views: tuple[View, ...]

    def predicate(self, query: Group, key: Group) -> Predicate:
        by_name = {view.name: view for view in self.views}
        owners = [by_name[group.name] for group in (query, key) if group.name in by_name]
        if len(owners) == 2 and owners[0] != owners[1]:
            return "none"
        owner = owners[0] if owners else self.views[0]
        return owner.resolved().predicate(query, key)


def plan_passes(views: Sequence[View], contexts: Sequence[str]) -> list[tuple[View, ...]]:
    """Which texts share one pass over the context, so that it is encoded once.

    Texts share where the context does not see them and is treated alike by their rules; a text
    that the context sees gets a pass of its own.
    """

    passes: dict[Any, list[View]] = {}
    for view in views:
        seen = view.resolved().context_view(len(contexts))
        passes.setdefault(seen or view.name, []).append(view)
    return [tuple(group) for group in passes.values()]


@dataclass(frozen=True)
class BlockCall:
    """Queries that share one row of the table, and the keys that they see; all static.

    Attributes:
      queries: a slice of the query sequence.
      keys: slices of the key sequence, each with its predicate.
    """

    queries: tuple[int, int]
    keys: tuple[tuple[int, int, Predicate], ...]


def block_calls(
    table: MaskTable, queries: Sequence[Group], keys: Sequence[Group]
) -> tuple[BlockCall, ...]:
    """A rule as a few attention calls: neighbours with equal rows share one.

    Queries that see nothing have a call without keys.
    """
    key_spans = spans(keys)
    calls: list[BlockCall] = []
    start = 0
    for query in queries:
        row: list[tuple[int, int, Predicate]] = []
        for key in keys:
            predicate = table.predicate(query, key)
            if predicate == "none":
                continue
            span = key_spans[key.name]
            if row and row[-1][1] == span.start and row[-1][2] == predicate:
                row[-1] = (row[-1][0], span.stop, predicate)
            else:
                row.append((span.start, span.stop, predicate))
        stop = start + query.length
        if calls and calls[-1].keys == tuple(row) and calls[-1].queries[1] == start:
            calls[-1] = BlockCall((calls[-1].queries[0], stop), tuple(row))
        else:
            calls.append(BlockCall((start, stop), tuple(row)))
        start = stop
    return tuple(calls)


def block_mask(
    call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> Bool[Array, "B Q K"]:
    """Who sees whom within one block call: valid keys of the same document, by predicate."""
    query_slice = slice(*call.queries)
    parts = []
    for start, stop, predicate in call.keys:
        query = {
            field: getattr(queries, field)[:, query_slice, None]
            for field in ("position", "segment", "document")
        }
        key = {
            field: getattr(keys, field)[:, None, start:stop]
            for field in ("position", "segment", "document", "valid")
        }
        allowed = key["valid"] & (key["document"] == query["document"])
        parts.append(allowed & PREDICATES[predicate](query, key))
    return jnp.concatenate(parts, axis=2)


def reference_mask(
    table: MaskTable, queries: TokenMetadata, keys: TokenMetadata
) -> Bool[Array, "B Q K"]:
    """The whole mask at once: the definition that block calls are tested against."""
    mask = np.zeros((queries.valid.shape[0], queries.valid.shape[1], keys.valid.shape[1]), bool)
    query_spans, key_spans = spans(queries.groups), spans(keys.groups)
    position = [np.asarray(each.position) for each in (queries, keys)]
    segment = [np.asarray(each.segment) for each in (queries, keys)]
    for query in queries.groups:
        for key in keys.groups:
            predicate = table.predicate(query, key)
            rows, columns = query_spans[query.name], key_spans[key.name]
            earlier = position[1][:, None, columns] <= position[0][:, rows, None]
            alike = segment[1][:, None, columns] == segment[0][:, rows, None]
            mask[:, rows, columns] = {
                "none": False,
                "all": True,
                "causal": earlier,
                "same_segment": alike,
                "block_causal": earlier | alike,
            }[predicate]
    same = np.asarray(queries.document)[:, :, None] == np.asarray(keys.document)[:, None, :]
    return jnp.asarray(mask & same & np.asarray(keys.valid)[:, None, :])
