"""Configs and checkpoints of other versions: an earlier one's are read, a later one's are named."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm import registry
from unified_mm.default_config import default_config, defaults, phase
from unified_mm.runs import saved
from unified_mm.runs.checkpoints import CheckpointError, Checkpoints
from unified_mm.runs.saved import UnknownField, refuse_unknown, todays_config


def config():
    """The default config, with a phase and with parts of an outsider's."""
    fields = default_config().to_dict()
    fields["train"]["phases"] = {"first": phase(3, train={"learning_rate": 0.1})}
    fields["model"]["modalities"]["sketch"] = dict(fields["model"]["modalities"]["image"])
    fields["model"]["modalities"]["tone"] = {"type": "toy:Tone", "bands": 3}
    fields["objectives"]["tones"] = {"type": "toy:Tones", "weight": 1.0}
    return fields


def paths(fields, before=()):
    """Every field and group of a config, by the names that lead to it."""
    for name, value in fields.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from paths(value, (*before, name))


def within(fields, path):
    for name in path:
        fields = fields[name]
    return fields


def test_what_this_version_writes_is_read_as_it_is():
    assert todays_config(config(), defaults()) == config()


def test_every_field_may_be_missing():
    whole, tried = config(), 0
    for *parents, name in paths(whole):
        path = (*parents, name)
        if (len(path) == 1 and name in saved.GROUPS) or "tone" in path or "tones" in path:
            continue
        if name == "type" or parents in (["model", "modalities"], ["train", "phases"]):
            continue  # a member that is not there is not there
        if "phases" in path and len(path) > 3:
            continue  # what a phase changes is its user's
        old = copy.deepcopy(whole)
        del within(old, parents)[name]
        found, expected = todays_config(old, defaults()), copy.deepcopy(whole)
        if path == ("model", "modalities"):
            expected["model"]["modalities"] = {}
        if parents == ["objectives"]:
            expected["objectives"][name]["weight"] = 0.0  # it counted for nothing then
        if name == "phases":
            expected["train"]["phases"] = {}
        if path == ("train", "phases", "first", "steps"):
            expected["train"]["phases"]["first"]["steps"] = 0
        if path == ("train", "phases", "first", "train"):
            expected["train"]["phases"]["first"]["train"] = {}
        assert found == expected, path
        tried += 1
    assert tried > 150


def test_a_field_of_a_later_version_is_named():
    for path in paths(config()):
        later = config()
        group = within(later, path)
        if not isinstance(group, dict) or {"tone", "tones"} & set(path) or path[-1] == "phases":
            continue
        if path[-1].endswith("_options") or path[-1] in (
            "towers",
            "start_from",
            "reader",
            "mixture",
            "sparse",
        ):
            continue  # these are a class's, a modality's or a source's own
        if "phases" in path and len(path) > 3:
            continue
        group["experts"] = 4
        dotted = ".".join((*path, "experts"))
        if path in (("model", "modalities"), ("objectives",)):
            group["experts"] = {"type": "experts"}
            dotted += ".type is 'experts'"
        for read in (todays_config, refuse_unknown):
            with pytest.raises(UnknownField, match=f"{dotted}$"):
                read(later, defaults())


def test_code_from_outside_has_fields_of_its_own():
    own = config()
    own["data"] |= {"source": "toy:open", "tones": "here"}
    own["model"] |= {"fusion": "toy:Fusion", "depth_of_it": 3}
    assert todays_config(own, defaults()) == own
    own["train"]["tones"] = 1
    with pytest.raises(UnknownField, match=r"train\.tones"):
        todays_config(own, defaults())


def test_a_group_is_no_single_value():
    for path, value in ((("model", "tower"), 3), (("train", "steps"), {"most": 3})):
        wrong = config()
        within(wrong, path[:-1])[path[-1]] = value
        with pytest.raises(UnknownField, match=r"\.".join(path)):
            todays_config(wrong, defaults())


def test_old_names_are_read(monkeypatch):
    renamed = {"model.modalities.*.spread": "std", "train.*_ratio": "final_rate"}
    monkeypatch.setattr(saved, "RENAMED_FIELDS", renamed)
    monkeypatch.setattr(registry, "MOVED", {"toy": "toys.tones"})
    old = config()
    for modality in ("image", "sketch"):
        options = old["model"]["modalities"][modality]
        options["spread"] = options.pop("std")
    old["train"]["end_ratio"] = old["train"].pop("final_rate")
    expected = config()
    expected["model"]["modalities"]["tone"]["type"] = "toys.tones:Tone"
    expected["objectives"]["tones"]["type"] = "toys.tones:Tones"
    assert todays_config(old, defaults()) == expected
    old["train"]["final_rate"] = 0.5
    with pytest.raises(ValueError, match=r"train\.end_ratio and train\.final_rate"):
        todays_config(old, defaults())
    with pytest.raises(ValueError, match=r"image\.spread is called model\.modalities\.image\.std"):
        refuse_unknown(old, defaults())
    with pytest.raises(ValueError, match="it is called 'toys.tones:Tone' now"):
        registry.resolve("modality", "toy:Tone", {})


def saved_state():
    moments = {"mu": {"up": {"kernel": jnp.arange(6.0).reshape(2, 3)}}}
    return {"params": {"up": {"kernel": jnp.ones((2, 3))}}, "optimizer": (None, (moments,))}


def asked_state(name="raise"):
    kernel = {name: {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
    return {"params": kernel, "optimizer": (None, ({"mu": kernel},))}


def test_leaves_are_found_by_their_old_names(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved_state(), {})
        with pytest.raises(CheckpointError, match=r"params/raise/kernel: saved nothing"):
            checkpoints.restore(asked_state())
        monkeypatch.setattr(saved, "RENAMED_LEAVES", ((r"(.*)/raise/(.*)", r"\1/up/\2"),))
        for partial in (False, True):
            found = checkpoints.restore(asked_state(), partial=partial).state
            leaves = jax.tree.leaves(found), jax.tree.leaves(saved_state())
            jax.tree.map(np.testing.assert_array_equal, *leaves)
            assert jax.tree.structure(found) == jax.tree.structure(asked_state())


def test_a_part_that_came_later_begins_with_its_first_value(tmp_path):
    asked = asked_state("up") | {"drawn": {"counts": jax.ShapeDtypeStruct((4,), jnp.int32)}}
    later = {"drawn": lambda step: {"counts": jnp.full((4,), step, jnp.int32)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, saved_state(), {})
        with pytest.raises(CheckpointError, match=r"drawn/counts: saved nothing, asked int32\[4\]"):
            checkpoints.restore(asked)
        restored = checkpoints.restore(asked, later=later)
        np.testing.assert_array_equal(restored.state["drawn"]["counts"], [3, 3, 3, 3])
        checkpoints.save(4, restored.state, {})
        again = checkpoints.restore(asked, later={"drawn": lambda step: 1 / 0})
        np.testing.assert_array_equal(again.state["drawn"]["counts"], [3, 3, 3, 3])
    # A part that is there, but not whole, is an error as before.
    asked["params"]["down"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="params/down: saved nothing"):
            checkpoints.restore(asked, later={"params": lambda step: 1 / 0})
