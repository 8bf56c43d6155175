"""Losses at exits against those of the residual stream, which another channel hands out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.nn.sow import RESIDUAL, streams_by_layer
from unified_mm.objectives.captioning import score_text
from unified_mm.objectives.objective import all_losses

CHANGES = {"model__layers": 4, "objectives__matching__weight": 0.0}
EXITS = {"model__exits": (1, 3), "objectives__exits__weight": 0.5}


@pytest.fixture(scope="module")
def parts():
    task = tiny.task(**CHANGES, **EXITS, objectives__contrastive__weight=0.0)
    return task, tiny.params(task), tiny.batch(task)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_loss_is_that_of_the_states_by_the_shared_norm_and_head_weighed_by_layer(parts, remat):
    task, params, batch = parts
    computed = tiny.replace_model(task, remat=remat).metrics(
        params, batch, jax.random.key(0), deterministic=True
    )
    found = jax.tree.map(np.asarray, computed)
    captioning = next(each for each in task.objectives if each.name == "captioning")
    _, left = task.model.apply(
        {"params": params},
        batch,
        (captioning,),
        0,
        deterministic=True,
        method=all_losses,
        mutable=[RESIDUAL],
    )
    streams = streams_by_layer(left[RESIDUAL], "transformer", task.model.options)
    scale, bias = (np.asarray(params["transformer"]["norm"][name]) for name in ("scale", "bias"))
    total = 0.0
    for layer in (1, 3):
        x = np.asarray(streams[f"layer_{layer - 1}"])[:, -batch["text"]["ids"].shape[1] :]
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias

        def logits(x):
            return task.model.apply({"params": params}, x, method="logits")

        likelihood, right, scored = map(
            np.asarray, score_text(logits, jnp.asarray(x), batch["text"])
        )
        np.testing.assert_allclose(found[f"exits/loss_{layer}"][0], -likelihood[scored].sum(), 1e-4)
        np.testing.assert_allclose(found[f"exits/accuracy_{layer}"][0], right[scored].sum())
        total -= layer / 4 * likelihood[scored].sum()
    np.testing.assert_allclose(found["exits/loss"][0], total, 1e-4)
    assert found["exits/loss"][1] == scored.sum()


def test_other_losses_keep_their_bits_beside_exits(parts):
    task, params, batch = parts
    plain = tiny.task(**CHANGES, objectives__contrastive__weight=0.0)
    given = (params, batch, jax.random.key(0))
    found = task.metrics(*given, deterministic=True)
    for name, metric in plain.metrics(*given, deterministic=True).items():
        np.testing.assert_array_equal(found[name], metric)


def test_an_objective_without_exits_and_exits_without_an_objective_are_refused():
    alone = {name: EXITS[name] for name in ("objectives__exits__weight",)}
    with pytest.raises(ValueError, match=r"model.exits=\(\): objectives.exits has a weight"):
        tiny.task(**CHANGES, **alone)
    with pytest.raises(ValueError, match=r"model.exits=\(1, 3\): no objective trains them"):
        tiny.task(**CHANGES, model__exits=(1, 3))
    with pytest.raises(ValueError, match="of='contrastive': no objective of this name learns to w"):
        tiny.task(**CHANGES, **EXITS, objectives__exits__of="contrastive")


def test_the_states_are_found_where_another_objective_reads_the_text_first(parts):
    task, params, batch = parts
    captioning = next(each for each in task.objectives if each.name == "captioning")
    other = replace(task, objectives=(replace(captioning, name="answering"), *task.objectives))
    given = (params, batch, jax.random.key(0))
    expected = task.metrics(*given, deterministic=True)
    found = other.metrics(*given, deterministic=True)
    np.testing.assert_array_equal(found["exits/loss"], expected["exits/loss"])
