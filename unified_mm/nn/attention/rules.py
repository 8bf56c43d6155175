"""Attention rules: which tokens may attend to which, as small static tables that can be extended.

A rule is an ordered table of patterns over pairs of token groups, (query, key) -> predicate; the
first pattern that matches applies. Each side of a pattern is a modality's name, a role (`written`:
the text of an objective; `read`: the context that it is about), `same` (of a key: the modality of
the query), or `*`. A predicate decides by metadata which tokens of two groups see each other; a
score term adds to their scores. A pass over one sequence may hold several texts about the same
context, each under a rule of its own; these texts never see one another.

| rule | context sees | text sees | made for |
| --- | --- | --- | --- |
| `separate` | its own modality | itself | contrast, retrieval |
| `separate_causal` | its own modality | itself so far | the same by a language model |
| `prefix` | the context | the context, and text so far | captioning, answering, matching |
| `prefix_separate` | its own modality | as `prefix` | the same, in one pass with `separate` |
| `joint` | everything | everything | matching |
| `causal` | what came before in it | what came before | captioning |
| `in_order` | what came before | what came before | pictures within a text (LLaVA) |
| `interleaved` | itself, and what came before | what came before | documents |
| `interleaved_latest` | as `interleaved` | the latest image, and text before | documents |

Tokens lie by group, [context | text | text ...], so a rule runs as a few attention calls on static
slices; and the context is encoded once for all objectives whose rules keep it blind to the text. A
text that several objectives read alike is read once; matching reads its mined negatives against the
keys and values saved from that pass, and generation uses the same cache. The first lines of a run
print the passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from unified_mm.nn.tokens import Group
from unified_mm.registry import resolve

# The metadata that predicates and score terms get, each broadcastable to [B, Q, K], and `coords` to
# [B, Q, K, 3]; `time` and `coords` where the tokens of the pass have them.
Fields = Mapping[str, Array]
FIELDS = ("position", "segment", "document", "time", "coords")


@dataclass(frozen=True)
class Predicate:
    """A test by metadata of whether a query may attend to a key; its fields are parameters.

    A predicate from outside the package is a frozen dataclass like those below. Attention kernels
    refuse it unless it overrides `in_order` or `static`; autoregressive views refuse it for what
    the context sees of the text unless it is `causal`.
    """

    # Whether it lets no token see a later one of its document.
    causal: ClassVar[bool] = False

    def __call__(self, query: Fields, key: Fields) -> Array:
        """Returns bool [B, Q, K], or broadcastable to it, for query [B, Q, 1] and key [B, 1, K]."""
        raise NotImplementedError

    def in_order(self, query: np.ndarray, key: np.ndarray) -> np.ndarray | None:
        """Returns the mask by positions alone, or None where these do not decide it.

        Args:
          query, key: positions [Q, 1] and [1, K] in one segment of one document.

        Returns:
          bool [Q, K]. Kernels that need a static mask refuse a predicate that has none.
        """
        return None

    def static(
        self, query: Mapping[str, np.ndarray], key: Mapping[str, np.ndarray]
    ) -> np.ndarray | None:
        """Returns the mask by metadata that are known beforehand, None where they do not decide it.

        Args:
          query, key: `position` [Q, 1] and [1, K], and `coords` [Q, 1, 3] and [1, K, 3] where the
            tokens lie on a grid, of one segment of one document.
        """
        return self.in_order(query["position"], key["position"])

    def by_slots(self, query: np.ndarray, key: np.ndarray) -> np.ndarray | None:
        """Returns where anything may be seen by slots alone, None for everywhere.

        Args:
          query, key: slots [Q, 1] and [1, K] of packed documents, in each of which a token's
            position is later than that of the slot before, by one or more.
        """
        return None


@dataclass(frozen=True)
class Nothing(Predicate):
    """The predicate under which no token sees any."""

    causal: ClassVar[bool] = True

    def __call__(self, query: Fields, key: Fields) -> Array:
        return jnp.zeros((1, 1, 1), bool)


@dataclass(frozen=True)
class Everything(Predicate):
    """The predicate under which every token sees every token."""

    def __call__(self, query: Fields, key: Fields) -> Array:
        return jnp.ones((1, 1, 1), bool)

    def in_order(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.ones((query.shape[0], key.shape[1]), bool)


@dataclass(frozen=True)
class Causal(Predicate):
    """The predicate under which a token sees those that are not later."""

    causal: ClassVar[bool] = True

    def __call__(self, query: Fields, key: Fields) -> Array:
        return key["position"] <= query["position"]

    def in_order(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return key <= query

    def by_slots(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return key <= query


@dataclass(frozen=True)
class SameSegment(Predicate):
    """The predicate under which a token sees its segment; text has that of the latest image."""

    def __call__(self, query: Fields, key: Fields) -> Array:
        return key["segment"] == query["segment"]

    def in_order(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.ones((query.shape[0], key.shape[1]), bool)


@dataclass(frozen=True)
class BlockCausal(Predicate):
    """The predicate under which a token sees all of its own segment and all earlier tokens."""

    def __call__(self, query: Fields, key: Fields) -> Array:
        earlier = key["position"] <= query["position"]
        return earlier | (key["segment"] == query["segment"])

    def in_order(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.ones((query.shape[0], key.shape[1]), bool)


@dataclass(frozen=True)
class Window(Predicate):
    """The predicate under which a token sees, of what another lets it see, what is near."""

    of: Predicate
    size: int

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether it lets no token see a later one, as the other predicate does not."""
        return self.of.causal

    def __call__(self, query: Fields, key: Fields) -> Array:
        near = jnp.abs(query["position"] - key["position"]) < self.size
        return near & self.of(query, key)

    def in_order(self, query: np.ndarray, key: np.ndarray) -> np.ndarray | None:
        seen = self.of.in_order(query, key)
        return None if seen is None else seen & (np.abs(query - key) < self.size)

    def static(
        self, query: Mapping[str, np.ndarray], key: Mapping[str, np.ndarray]
    ) -> np.ndarray | None:
        seen = self.of.static(query, key)
        near = np.abs(query["position"] - key["position"]) < self.size
        return None if seen is None else seen & near

    def by_slots(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        near = np.abs(query - key) < self.size
        seen = self.of.by_slots(query, key)
        return near if seen is None else near & seen


@dataclass(frozen=True)
class NearInTime(Predicate):
    """The predicate under which a token sees those at most `seconds` away, before or after."""

    seconds: float = 1.0

    def __call__(self, query: Fields, key: Fields) -> Array:
        return abs(_later_by(query, key)) <= self.seconds


@dataclass(frozen=True)
class Past(Predicate):
    """The predicate under which a token sees those that are not later by the clock."""

    def __call__(self, query: Fields, key: Fields) -> Array:
        return _later_by(query, key) <= 0


def _later_by(query: Fields, key: Fields) -> Array:
    """Returns how many seconds keys are later than queries."""
    if "time" not in query or "time" not in key:
        raise ValueError(
            "the attention rule compares times (near_in_time, past), but the tokens have none: "
            "name modalities in its patterns that have a time, such as audio"
        )
    return key["time"] - query["time"]


NONE, ALL, CAUSAL = Nothing(), Everything(), Causal()
PREDICATES: dict[str, Predicate] = {
    "none": NONE,
    "all": ALL,
    "causal": CAUSAL,
    "same_segment": SameSegment(),
    "block_causal": BlockCausal(),
    "near_in_time": NearInTime(),  # of one second; `NearInTime(seconds)` of others
    "past": Past(),
}


@dataclass(frozen=True)
class ScoreTerm:
    """A term that is added to the score of a query and a key, by metadata of both.

    A subclass is a frozen dataclass; its fields are parameters. The backends `xla` and `chunked`
    add it, kernels refuse it.
    """

    def __call__(self, query: Fields, key: Fields) -> Array:
        """Returns float32 [B, Q, K], or broadcastable to it, for the same fields as `Predicate`."""
        raise NotImplementedError


Pattern = tuple[str, str]  # of the query's group and of the key's


@dataclass(frozen=True)
class AttentionRule:
    """An ordered table, in which the first pattern that matches two groups gives their predicate.

    Attributes:
      name: of the rule.
      table: patterns with their predicates; a pair that none matches sees nothing.
      terms: patterns with their score terms; a pair that none matches has nothing added.
    """

    name: str
    table: tuple[tuple[Pattern, Predicate], ...]
    terms: tuple[tuple[Pattern, ScoreTerm], ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        table: Mapping[Pattern, str | Predicate],
        terms: Mapping[Pattern, ScoreTerm] | None = None,
    ) -> AttentionRule:
        """Returns the rule of a table whose predicates may be given by name.

        Raises:
          ValueError: a predicate is unknown.
        """
        rows = tuple((pattern, predicate_of(each)) for pattern, each in table.items())
        return cls(name, rows, tuple((terms or {}).items()))

    def between(
        self, query: Group, key: Group, written: tuple[bool, bool]
    ) -> tuple[Predicate, ScoreTerm | None]:
        """Returns the predicate and the score term of two groups.

        Args:
          query, key: the groups.
          written: for each of the two, whether its role is `written` rather than `read`.
        """
        roles = ["written" if each else "read" for each in written]
        same = ("same",) if query.modality == key.modality else ()
        asking, asked = {"*", query.modality, roles[0]}, {"*", key.modality, roles[1], *same}
        return (
            next((p for (q, k), p in self.table if q in asking and k in asked), NONE),
            next((t for (q, k), t in self.terms if q in asking and k in asked), None),
        )

    def to_context(self, context: str) -> Predicate:
        """Returns the predicate by which a text sees a context modality."""
        return self.between(TEXT, Group(context, context, 1), (True, False))[0]

    def from_context(self, context: str) -> Predicate:
        """Returns the predicate by which a context modality sees the text."""
        return self.between(Group(context, context, 1), TEXT, (False, True))[0]

    def context_view(self, contexts: Sequence[str]) -> tuple[Any, ...] | None:
        """Returns how context modalities see each other; None where they see the text too.

        Texts whose rules return the same value can share one pass over the context.
        """
        groups = [Group(name, name, 1) for name in contexts]
        if any(self.between(each, TEXT, (False, True))[0] != NONE for each in groups):
            return None
        return tuple(self.between(q, k, (False, False)) for q in groups for k in groups)

    def reading(self, contexts: Sequence[str]) -> tuple[Any, ...]:
        """Returns all entries of the rule for a text and these contexts, for comparing rules."""
        groups = [(Group(name, name, 1), False) for name in contexts] + [(TEXT, True)]
        return tuple(self.between(q, k, (a, b)) for q, a in groups for k, b in groups)

    def modalities(self) -> list[str]:
        """Returns the context modalities that its patterns name, and one that they do not."""
        words = {word for pattern, _ in self.table for word in pattern}
        return [*sorted(words - {"written", "read", "same", "*", "text"}), "any other"]

    @property
    def shows_the_future(self) -> bool:
        """Whether a text token could see a later one through the context.

        It could where the context sees the text, text sees the context, and any step on the way
        may lead forward. What is not known to lead backward alone is taken to lead forward.
        """
        contexts = self.modalities()
        to_text = [self.to_context(name) for name in contexts]
        from_text = [self.from_context(name) for name in contexts]
        if all(each == NONE for each in to_text) or all(each == NONE for each in from_text):
            return False
        groups = [Group(name, name, 1) for name in (*contexts, "one more")]
        among = {(a, b): self.between(a, b, (False, False))[0] for a in groups for b in groups}
        # The segment of a text token is an earlier image, and an image sees no text within its own.
        segments = PREDICATES["same_segment"], PREDICATES["block_causal"]
        return not (
            all(each.causal for each in from_text)
            and all(each.causal or each in segments for each in to_text)
            and all(each.causal or (a == b and each in segments) for (a, b), each in among.items())
        )

    @property
    def with_causal_text(self) -> AttentionRule:
        """The rule with text made causal, so that no token sees one that is written later."""
        own, _ = self.between(TEXT, TEXT, (True, True))
        in_order: tuple[Pattern, Predicate] = (("written", "written"), CAUSAL)
        return self if own.causal else replace(self, table=(in_order, *self.table))


TEXT = Group("text", "text", 1)  # any text, where a rule is asked about it


def predicate_of(name: str | Predicate) -> Predicate:
    """Returns a predicate by its name, or `package.module:NAME` of one from outside.

    Raises:
      ValueError: there is none of that name, or it is no `Predicate`.
    """
    found = resolve("attention predicate", name, PREDICATES) if isinstance(name, str) else name
    if not isinstance(found, Predicate):
        raise ValueError(f"attention predicate {name!r} is a {type(found).__name__}, no Predicate")
    return found


RULES: dict[str, AttentionRule] = {
    name: AttentionRule.of(name, table)
    for name, table in {
        # Each modality sees itself alone: two towers in one transformer.
        "separate": {
            ("written", "written"): "all",
            ("read", "written"): "none",
            ("read", "same"): "all",
        },
        # The same with text in order, as language models read it.
        "separate_causal": {
            ("written", "written"): "causal",
            ("read", "written"): "none",
            ("read", "same"): "all",
        },
        # Text reads all of the context, and itself in order (prefix language model).
        "prefix": {
            ("written", "written"): "causal",
            ("written", "read"): "all",
            ("read", "read"): "all",
        },
        # The same, but modalities of the context do not see each other: it shares its pass over
        # several of them with `separate`.
        "prefix_separate": {
            ("written", "written"): "causal",
            ("written", "read"): "all",
            ("read", "written"): "none",
            ("read", "same"): "all",
        },
        # Everything sees everything.
        "joint": {("*", "*"): "all"},
        # Everything in order, the context first (so it never sees the text).
        "causal": {("read", "written"): "none", ("*", "*"): "causal"},
        # Everything in order, wherever it stands.
        "in_order": {("*", "*"): "causal"},
        # Documents of images and text in any order: each image sees all of itself, and everything
        # sees what came before it.
        "interleaved": {
            ("written", "*"): "causal",
            ("read", "written"): "causal",
            ("read", "same"): "block_causal",
            ("read", "read"): "causal",
        },
        # The same, but text sees only the latest image before it (Alayrac et al. 2022, 3.1.3).
        "interleaved_latest": {
            ("written", "written"): "causal",
            ("written", "read"): "same_segment",
            ("read", "written"): "causal",
            ("read", "same"): "block_causal",
            ("read", "read"): "causal",
        },
    }.items()
}


@dataclass(frozen=True)
class View:
    """A way to read a text and its context, as one objective needs it.

    Attributes:
      name: the token group's name in the sequence.
      rule: the name of an attention rule, or `package.module:NAME` of one from outside.
      autoregressive: whether each token is predicted from those before it, so that no token may see
        a later one, directly or through the context.
      alone: whether it is read on its own (with dropout of its own) even where another view is read
        in the same way.
      with_text: whether there is a text; else the context alone is read.
      resolved: the rule, with text made causal if the view is autoregressive.

    Raises:
      ValueError: the rule is unknown, or lets a token see the one it must predict.
    """

    name: str
    rule: str
    autoregressive: bool = False
    alone: bool = False
    with_text: bool = True

    resolved: AttentionRule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rule = resolve("attention rule", self.rule, RULES)
        if not isinstance(rule, AttentionRule):
            raise ValueError(f"attention rule {self.rule!r} is a {type(rule).__name__}")
        if self.autoregressive and rule.shows_the_future:
            raise ValueError(
                f"{self.name}: rule {self.rule!r} lets the context see the text and the text see "
                "the context, so a token would see the one it must predict; use 'prefix', "
                "'causal' or 'separate'"
            )
        object.__setattr__(self, "resolved", rule.with_causal_text if self.autoregressive else rule)


@dataclass(frozen=True)
class MaskTable:
    """The table of one pass: (query group, key group) -> predicate; static and hashable.

    Attributes:
      views: of the pass.
    """

    views: tuple[View, ...]

    def between(self, query: Group, key: Group) -> tuple[Predicate, ScoreTerm | None]:
        """Returns the predicate and the score term of two groups; texts do not see each other."""
        by_name = {view.name: view for view in self.views}
        owners = [by_name.get(group.name) for group in (query, key)]
        if None not in owners and owners[0] != owners[1]:
            return NONE, None
        owner = owners[0] or owners[1] or self.views[0]
        written = owners[0] is not None, owners[1] is not None
        return owner.resolved.between(query, key, written)


def plan_passes(views: Sequence[View], contexts: Sequence[str]) -> list[tuple[View, ...]]:
    """Returns the views grouped into passes, so that a shared context is encoded once.

    Views share a pass where the context does not see their texts and their rules treat it alike; a
    text that the context sees gets a pass of its own.
    """
    passes: dict[Any, list[View]] = {}
    for view in views:
        seen = view.resolved.context_view(contexts)
        passes.setdefault(view.name if seen is None else seen, []).append(view)
    return [tuple(group) for group in passes.values()]


def share_readings(views: Sequence[View], contexts: Sequence[str]) -> dict[str, View]:
    """Returns for each view, by name, the first view that is read in the same way."""
    first: dict[Any, View] = {}
    return {
        view.name: first.setdefault(
            view.name if view.alone else (view.with_text, view.resolved.reading(contexts)),
            view,
        )
        for view in views
    }
