"""Attention rules: who may attend to whom, as small static tables.

A rule says, for a query token and a key token, which of them sees which, by modality alone: text
(what is written) or context (everything else: what is looked at). A predicate refines it by
metadata. A pass over one sequence may hold several texts about the same context, each under a rule
of its own; texts never see one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from unified_mm.modalities.tokens import Group, TokenMetadata, spans

Predicate = Literal["none", "all", "causal"]

# Each predicate on metadata: (query [B, Q, 1], key [B, 1, K]) -> bool [B, Q, K].
PREDICATES: dict[str, Callable[..., Array]] = {
    "all": lambda query, key: jnp.ones((1, 1, 1), bool),
    "causal": lambda query, key: key["position"] <= query["position"],
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

    def treats_context_like(self, other: AttentionRule, contexts: int) -> bool:
        """Whether `contexts` context modalities come out the same under both rules.

        How two modalities see each other is no difference where there is but one.
        """
        return self.context_to_text == other.context_to_text == "none" and (
            self.context_to_context == other.context_to_context
            and (contexts < 2 or self.across_contexts == other.across_contexts)
        )


RULES: dict[str, AttentionRule] = {
    # Each modality sees itself alone: two towers in one transformer.
    "separate": AttentionRule("separate", "all", "none", "none", "none", "all"),
    # Text reads all of the context, and itself in order (prefix language model).
    "prefix": AttentionRule("prefix", "all", "all", "none", "all", "causal"),
    # Everything sees everything.
    "joint": AttentionRule("joint", "all", "all", "all", "all", "all"),
    # Everything in order, the context first (so it never sees the text).
    "causal": AttentionRule("causal", "causal", "causal", "none", "causal", "causal"),
}


@dataclass(frozen=True)
class Stream:
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
        if rule.context_to_text != "none" and rule.text_to_context != "none":
            raise ValueError(
                f"{self.name}: rule {self.rule!r} lets the context see the text and the text see "
                "the context, so a token would see the one it must predict; use 'prefix', "
                "'causal' or 'separate'"
            )
        return AttentionRule(
            rule.name,
            rule.context_to_context,
            rule.across_contexts,
            rule.context_to_text,
            rule.text_to_context,
            "causal",
        )


@dataclass(frozen=True)
class Visibility:
    """The table of one pass: (query group, key group) -> predicate; static and hashable."""

    streams: tuple[Stream, ...]

    def predicate(self, query: Group, key: Group) -> Predicate:
        by_name = {stream.name: stream for stream in self.streams}
        owners = [by_name[group.name] for group in (query, key) if group.name in by_name]
        if len(owners) == 2 and owners[0] != owners[1]:
            return "none"
        owner = owners[0] if owners else self.streams[0]
        return owner.resolved().predicate(query, key)


def plan_passes(streams: Sequence[Stream], contexts: Sequence[str]) -> list[tuple[Stream, ...]]:
    """Which texts share one pass over the context, so that it is encoded once.

    Texts share where the context does not see them and is treated alike by their rules; a text
    that the context sees gets a pass of its own.
    """

    def context_view(stream: Stream) -> tuple[str, ...]:
        rule = stream.resolved()
        if rule.context_to_text != "none":
            return ("sees", stream.name)
        across = rule.across_contexts if len(contexts) > 1 else "none"
        return ("blind", rule.context_to_context, across)

    passes: dict[tuple[str, ...], list[Stream]] = {}
    for stream in streams:
        passes.setdefault(context_view(stream), []).append(stream)
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
    visibility: Visibility, queries: Sequence[Group], keys: Sequence[Group]
) -> tuple[BlockCall, ...]:
    """A rule as a few attention calls: neighbours with equal rows share one."""
    key_spans = spans(keys)
    calls: list[BlockCall] = []
    start = 0
    for query in queries:
        row: list[tuple[int, int, Predicate]] = []
        for key in keys:
            predicate = visibility.predicate(query, key)
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
    visibility: Visibility, queries: TokenMetadata, keys: TokenMetadata
) -> Bool[Array, "B Q K"]:
    """The whole mask at once: the definition that block calls are tested against."""
    mask = np.zeros((queries.valid.shape[0], queries.valid.shape[1], keys.valid.shape[1]), bool)
    query_spans, key_spans = spans(queries.groups), spans(keys.groups)
    position_q, position_k = np.asarray(queries.position), np.asarray(keys.position)
    for query in queries.groups:
        for key in keys.groups:
            predicate = visibility.predicate(query, key)
            rows, columns = query_spans[query.name], key_spans[key.name]
            if predicate == "all":
                mask[:, rows, columns] = True
            elif predicate == "causal":
                mask[:, rows, columns] = (
                    position_k[:, None, columns] <= position_q[:, rows, None]
                )
    same = np.asarray(queries.document)[:, :, None] == np.asarray(keys.document)[:, None, :]
    return jnp.asarray(mask & same & np.asarray(keys.valid)[:, None, :])
