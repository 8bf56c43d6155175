"""Options: read from a group of a config, cast, filled and checked, with the field's name."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from unified_mm.config import Config, MissingField, build_options, defaults_of, option


@dataclass(frozen=True)
class Inner:
    """A group within a group."""

    rate: float = option(0.5, above=0, below=math.inf)


@dataclass(frozen=True)
class Outer:
    """A group."""

    inner: Inner
    free: Any
    count: int = option(2, least=1)
    share: float = option(0.0, least=0, most=1)
    kind: str = option("one", choices=("one", "two"))
    part: str = option("built_in", registry={"built_in": 1})
    pair: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    on: bool = True


def read(**changes: Any) -> Outer:
    fields = {"inner": {}, "free": None, **changes}
    return build_options(Outer, Config({"group": fields}).group, "group")


def test_options_are_cast_and_filled():
    found = read(share=1, pair=[1, 2], names=["a"], inner={"rate": 2}, part="math:pi")
    assert found == Outer(Inner(2.0), None, 2, 1.0, "one", "math:pi", (1.0, 2.0), ("a",), True)
    assert isinstance(found.share, float) and isinstance(found.inner.rate, float)
    assert defaults_of(Inner) == {"rate": 0.5} and "free" not in defaults_of(Outer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 0}, "group.count=0: must be at least 1"),
        ({"count": 1.5}, "group.count=1.5: must be a int"),
        ({"count": True}, "group.count=True: must be a int"),
        ({"on": 1}, "group.on=1: must be a bool"),
        ({"share": 1.1}, "group.share=1.1: must be at least 0 and at most 1"),
        ({"share": math.nan}, "group.share=nan: must be at least 0 and at most 1"),
        ({"kind": "three"}, "group.kind='three': must be one of one, two"),
        ({"part": "bilt_in"}, "unknown group.part 'bilt_in'. Did you mean 'built_in'"),
        ({"pair": (1.0,)}, "group.pair=.*: must be 2 values"),
        ({"pair": 1.0}, "group.pair=1.0: must be a tuple"),
        ({"names": [1]}, "group.names=1: must be a str"),
        ({"inner": {"rate": 0.0}}, "group.inner.rate=0.0: must be above 0 and finite"),
        ({"inner": {"rate": math.inf}}, "group.inner.rate=inf: must be above 0 and finite"),
    ],
)
def test_what_is_not_allowed_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        read(**changes)


def test_a_field_without_a_default_must_be_there():
    with pytest.raises(MissingField, match="no field group.free"):
        build_options(Outer, Config({"group": {"inner": {}}}).group, "group")


def test_what_is_read_is_noted_and_nothing_else():
    config = Config(
        {"group": {"inner": {"rate": 1.0, "other": 2}, "free": 0, "count": 3, "more": 4}}
    )
    build_options(Outer, config.group, "group")
    fields = ["group.count", "group.inner.rate", "group.free", "group.inner.other", "group.more"]
    assert config.unread(fields) == ["group.inner.other", "group.more"]
