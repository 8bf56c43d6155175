"""AdamW, clipping, warm-up, cosine, rules and freezing against NumPy written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.parallel.sharding import without_names
from unified_mm.training.optimizer import learning_rate_schedule, make_optimizer

STEPS = 6
RULES = {
    "train__learning_rate": 0.1,
    "train__warmup_steps": 2,
    "train__weight_decay": 0.3,
    "train__clip_norm": 0.7,
    "train__final_rate": 0.1,
    # Whole numbers and floats mean the same.
    "train__learning_rate_rules": (("head/.*", 0.5), ("body/kernel", 1), (".*", 1.0)),
    "train__freeze_rules": (("frozen/.*", True), (".*", False)),
}


def options(**changes):
    return Config(tiny.config_dict(**(RULES | changes)).to_dict()).train


def start():
    rng = np.random.default_rng(0)
    shapes = {
        "body": {"kernel": (3, 4), "bias": (4,)},
        "other": {"kernel": (4,)},
        "head": {"kernel": (4, 2), "scale": (2,)},
        "frozen": {"kernel": (2, 2)},
    }
    return {
        part: {n: rng.normal(size=s).astype(np.float32) for n, s in of.items()}
        for part, of in shapes.items()
    }


def rate_by_hand(step):
    """Up in a line over 2 steps, then half a cosine over 4 to a tenth."""
    if step < 2:
        return 0.1 * step / 2
    return 0.1 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))))


def adamw_by_hand(params, gradients):
    """Loshchilov & Hutter 2019, algorithm 2, on flat dicts; matrices alone decay."""
    b1, b2, epsilon, decay = 0.9, 0.98, 1e-8, 0.3
    params = {k: v.astype(np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for step, gradient in enumerate(gradients):
        trained = {k: g for k, g in gradient.items() if not k.startswith("frozen")}
        norm = math.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in trained.values()))
        for name, g in trained.items():
            g = g * min(1, 0.7 / norm)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            update = (m[name] / (1 - b1 ** (step + 1))) / (
                np.sqrt(v[name] / (1 - b2 ** (step + 1))) + epsilon
            )
            if name.endswith("kernel"):
                update = update + decay * params[name]
            factor = 0.5 if name.startswith("head") else 1.0
            params[name] = params[name] - factor * rate_by_hand(step) * update
    return params


def flat(tree):
    return {f"{part}/{name}": x for part, of in tree.items() for name, x in of.items()}


def test_a_few_steps_written_out():
    params = start()
    optimizer = make_optimizer(options(), STEPS, params)
    rng = np.random.default_rng(1)
    # Small gradients too, which the clip must leave alone.
    gradients = [
        jax.tree.map(lambda p, s=size: s * rng.normal(size=p.shape).astype(np.float32), params)
        for size in (1.0, 0.01, 3.0, 0.02)
    ]
    for gradient in gradients:
        gradient["frozen"]["kernel"] *= 1e6  # a frozen gradient takes no part in the clip
    state = optimizer.init(params)
    now = params
    for step, gradient in enumerate(gradients):
        now, state = jax.jit(optimizer.update)(optimizer.part(gradient), state, now, step)
    expected = adamw_by_hand(flat(params), [flat(g) for g in gradients])
    for name, found in flat(now).items():
        np.testing.assert_allclose(found, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)
    np.testing.assert_array_equal(now["frozen"]["kernel"], params["frozen"]["kernel"])
    # No moment is kept of what is frozen.
    trained = sum(x.size for name, x in flat(params).items() if not name.startswith("frozen"))
    kept = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32]
    assert sum(leaf.size for leaf in kept) == 2 * trained


def test_the_schedule_by_hand():
    schedule = learning_rate_schedule(options(), STEPS)
    found = [float(schedule(step)) for step in range(STEPS + 1)]
    np.testing.assert_allclose(found, [rate_by_hand(s) for s in range(STEPS + 1)], rtol=1e-5)
    assert found[-1] == pytest.approx(0.01)
    flat_start = learning_rate_schedule(options(train__warmup_steps=0), STEPS)
    assert float(flat_start(0)) == pytest.approx(0.1)
    one = learning_rate_schedule(options(train__warmup_steps=50), 1)  # warm-up longer than the run
    assert float(one(0)) == pytest.approx(0.1)


def test_default_rules_decay_matrices_alone():
    """Over the whole model: no bias, norm, embedding, position or temperature decays."""
    shapes = without_names(jax.eval_shape(tiny.task().init, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    optimizer = make_optimizer(
        options(
            train__learning_rate_rules=((".*", 1.0),),
            train__freeze_rules=((".*", False),),
            train__warmup_steps=0,
        ),
        STEPS,
        params,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    new, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params, 0)
    for path, value in jax.tree_util.tree_leaves_with_path(new):
        name = jax.tree_util.keystr(path)
        moved = bool((np.asarray(value) != 1).any())
        assert moved == ("'kernel'" in name), name


def test_idle_and_missing_rules_are_refused_by_field():
    with pytest.raises(ValueError, match="train.freeze_rules: no parameter is left for"):
        make_optimizer(
            options(train__freeze_rules=(("nothing/.*", True), (".*", False))), 4, start()
        )
    with pytest.raises(ValueError, match="train.weight_decay_rules: no rule covers parameter"):
        make_optimizer(options(train__weight_decay_rules=((".*/kernel", 1.0),)), 4, start())


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", -0.1), ("learning_rate", 0.0), ("learning_rate", math.inf),
     ("learning_rate", math.nan), ("b2", 1.0), ("clip_norm", 0.0), ("warmup_steps", -1)],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"train.{field}="):
        make_optimizer(options(**{f"train__{field}": value}), 4, start())
