"""Muon and schedule-free AdamW against NumPy written out, and schedules by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.parallel.sharding import axis_names, path_of, without_names
from unified_mm.runs.folder import keeps_average
from unified_mm.training.muon import RMS, matrix_axes
from unified_mm.training.optimizer import learning_rate_schedule, make_optimizer

STEPS = 6
PLAIN = {
    "train__learning_rate": 0.1,
    "train__warmup_steps": 0,
    "train__schedule": "constant",
    "train__clip_norm": 1e9,
    "train__weight_decay": 0.3,
}
BLOCK = "transformer/layers/block_0"
SHAPES = {
    f"{BLOCK}/attention/query/shared/kernel": (2, 4, 2, 3),  # two layers: D, heads, A
    f"{BLOCK}/attention/output/shared/kernel": (2, 2, 3, 4),
    f"{BLOCK}/feed_forward/shared/up/kernel": (2, 4, 8),
    f"{BLOCK}/feed_forward/shared/up/bias": (2, 8),
    "embedders_text/tokens": (5, 4),
    "head/kernel": (4, 5),
}


NAMES = {
    f"{BLOCK}/attention/query/shared/kernel": ("layers", "embed", "heads", None),
    f"{BLOCK}/attention/output/shared/kernel": ("layers", "heads", None, "embed"),
    f"{BLOCK}/feed_forward/shared/up/kernel": ("layers", "embed", "feed_forward"),
}


def options(**changes):
    return Config(tiny.config_dict(**(PLAIN | changes)).to_dict()).train


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = jnp.asarray(value)
    return tree


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def values(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def as_matrices(path, value):
    """[layers, in, out]."""
    if "query" in path:
        return value.reshape(2, 4, 6)
    return value.reshape(2, 6, 4) if "output" in path else value


def test_muon_makes_updates_of_matrices_orthogonal():
    params, gradient = values(0), values(1)
    optimizer = make_optimizer(options(train__optimizer="muon"), STEPS, nested(params), 0, NAMES)
    state = optimizer.init(nested(params))
    new, _ = optimizer.update(nested(gradient), state, nested(params), 0)
    for path, after in flat(new).items():
        decayed = 0.3 * params[path] if path.endswith("kernel") else 0.0
        update = (params[path] - after) / 0.1 - decayed
        if not path.startswith(BLOCK) or path.endswith("bias"):
            # Adam's first step is the gradient's sign.
            np.testing.assert_allclose(update, np.sign(gradient[path]), atol=1e-4, err_msg=path)
            continue
        both = zip(*(as_matrices(path, x) for x in (update, gradient[path])), strict=True)
        for matrix, slope in both:
            u, _, v = np.linalg.svd(slope, full_matrices=False)
            stretched = u.T @ matrix @ v.T / (RMS * max(matrix.shape) ** 0.5)
            # Five Newton-Schulz steps bring singular values near 1, no nearer.
            assert np.diag(stretched).min() > 0.5 and np.diag(stretched).max() < 1.4, path
            np.testing.assert_allclose(stretched, np.diag(np.diag(stretched)), atol=2e-3)


def test_muon_takes_each_experts_matrix_by_the_names_of_its_axes():
    """Kernels [periods, E, D, F] and [periods, E, F, D], as a layer from outside may have them."""
    path = f"{BLOCK}/feed_forward/experts"
    shapes = {f"{path}/up/kernel": (2, 3, 4, 8), f"{path}/down/kernel": (2, 3, 8, 4)}
    names = {
        f"{path}/up/kernel": ("layers", None, "embed", "feed_forward"),
        f"{path}/down/kernel": ("layers", None, "feed_forward", "embed"),
    }
    rng = np.random.default_rng(0)
    params, gradient = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )
    given = options(train__optimizer="muon", train__weight_decay=0.0)
    optimizer = make_optimizer(given, STEPS, nested(params), 0, names)
    state = optimizer.init(nested(params))
    new, _ = optimizer.update(nested(gradient), state, nested(params), 0)
    for name, after in flat(new).items():
        update = ((params[name] - after) / 0.1).reshape(6, *shapes[name][2:])
        for matrix, slope in zip(update, gradient[name].reshape(update.shape), strict=True):
            u, _, v = np.linalg.svd(slope, full_matrices=False)
            stretched = u.T @ matrix @ v.T / (RMS * 8**0.5)
            assert np.diag(stretched).min() > 0.5 and np.diag(stretched).max() < 1.4, name
    for axes in ((), ("layers", None, None, None), ("layers", "embed", None, "feed_forward")):
        with pytest.raises(ValueError, match="up/kernel are named .*which does not tell"):
            make_optimizer(given, STEPS, nested(params), 0, {**names, f"{path}/up/kernel": axes})


@pytest.mark.parametrize("fusion", ["early", "gated_cross_attention", "late"])
def test_muon_knows_the_axes_of_every_matrix_of_a_model(fusion):
    abstract = tiny.task(
        model__fusion=fusion,
        model__key_value_heads=1,
        objectives__matching__weight=0.0,
        objectives__captioning__weight=0.0,
    ).abstract_params()
    names = axis_names(abstract)
    sizes = jax.tree_util.tree_leaves_with_path(without_names(abstract))
    kinds = {path_of(path): matrix_axes(path_of(path), names) for path, _ in sizes}
    found = {path.split("/")[-2 if "/mlp/" in path else -3] for path, axes in kinds.items() if axes}
    assert found >= {"query", "key", "value", "output"}
    for path, leaf in sizes:
        axes = kinds[path_of(path)]
        if axes is not None:  # all but the layers
            assert sum(map(len, axes)) == leaf.ndim - 1 and names[path_of(path)][0] == "layers"


def schedule_free_by_hand(params, gradients, b1=0.9, b2=0.98, decay=0.3, rate=0.1):
    """Defazio et al. 2024, algorithm 1, one rate for all steps; returns y and x."""
    z = {path: value.astype(np.float64) for path, value in params.items()}
    x = dict(z)
    v = {path: np.zeros_like(value) for path, value in z.items()}
    y = dict(z)
    for t, gradient in enumerate(gradients, start=1):
        for path, g in gradient.items():
            v[path] = b2 * v[path] + (1 - b2) * np.square(g, dtype=np.float64)
            update = g / (np.sqrt(v[path] / (1 - b2**t)) + 1e-8)
            if path.endswith("kernel"):
                update = update + decay * y[path]
            z[path] = z[path] - rate * update
            x[path] = (1 - 1 / t) * x[path] + z[path] / t
            y[path] = (1 - b1) * z[path] + b1 * x[path]
    return y, x


def test_schedule_free_is_the_papers():
    params, gradients = values(0), [values(seed) for seed in range(1, 1 + STEPS)]
    given = options(train__optimizer="schedule_free")
    optimizer = make_optimizer(given, STEPS, nested(params))
    state, now = optimizer.init(nested(params)), nested(params)
    for step, gradient in enumerate(gradients):
        now, state = optimizer.update(nested(gradient), state, now, step)
    y, x = schedule_free_by_hand(params, gradients)
    averaged = flat(optimizer.averaged(None, now, state, 0.0))
    for path, value in flat(now).items():
        np.testing.assert_allclose(value, y[path], rtol=1e-4, atol=1e-5, err_msg=path)
        np.testing.assert_allclose(averaged[path], x[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_schedule_free_warms_up_as_optax_does():
    """Steps of the warm-up weigh by the square of their rate."""
    params = values(0)
    changes = {"train__optimizer": "schedule_free", "train__warmup_steps": 3}
    given = options(**changes, train__weight_decay=0.0)
    optimizer = make_optimizer(given, STEPS, nested(params))
    rate = learning_rate_schedule(given, STEPS)
    # Optax asks for the rate of step 1 first.
    other = optax.contrib.schedule_free(
        optax.adam(rate, b1=0.0, b2=0.98), lambda count: rate(count - 1), b1=0.9
    )
    ours, theirs = nested(params), nested(params)
    state, their_state = optimizer.init(ours), other.init(theirs)
    for step in range(STEPS):
        gradient = nested(values(step + 1))
        ours, state = optimizer.update(gradient, state, ours, step)
        updates, their_state = other.update(gradient, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for path, value in flat(theirs).items():
        np.testing.assert_allclose(flat(ours)[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


def test_what_is_frozen_keeps_its_bits_and_is_averaged_as_it_is():
    params = values(0)
    frozen = ((".*tokens", True), (".*", False))
    given = options(train__optimizer="schedule_free", train__freeze_rules=frozen)
    optimizer = make_optimizer(given, STEPS, nested(params))
    state = optimizer.init(nested(params))
    gradient = optimizer.part(nested(values(1)))
    new, state = optimizer.update(gradient, state, nested(params), 0)
    for tree in (new, optimizer.averaged(None, new, state, 0.0)):
        kept = flat(tree)["embedders_text/tokens"]
        np.testing.assert_array_equal(kept, params["embedders_text/tokens"])


BY_HAND = {
    "linear": [0.0, 0.5, 1.0, 0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19, 0.1],
    "constant": [0.0, 0.5] + [1.0] * 11,
    "constant_then_linear": [0.0, 0.5] + [1.0] * 9 + [0.55, 0.1],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_schedules(name):
    """Two steps up, ten more to a tenth; the last fifth of ten are two."""
    given = options(
        train__schedule=name,
        train__learning_rate=1.0,
        train__warmup_steps=2,
        train__final_rate=0.1,
    )
    rate = learning_rate_schedule(given, 12)
    found = [float(rate(step)) for step in range(13)]
    np.testing.assert_allclose(found, BY_HAND[name], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": "sgd"},
            "unknown train.optimizer 'sgd'. Built in: adamw, muon, sch",
        ),
        (
            {"schedule": "step"},
            "unknown train.schedule 'step'. Built in: constant, con",
        ),
        ({"optimizer": "muon", "moments_dtype": "bfloat16"}, "is for train.optimizer='adamw'"),
        ({"optimizer": "schedule_free", "ema_decay": 0.9}, "an average of its own"),
        ({"optimizer": "schedule_free", "b1": 0.0}, "train.b1 above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    given = options(**{f"train__{name}": value for name, value in changes.items()})
    with pytest.raises(ValueError, match=message):
        make_optimizer(given, STEPS, nested(values(0)))


def test_muon_without_matrices_is_refused():
    with pytest.raises(ValueError, match="no parameter is a matrix within a layer"):
        make_optimizer(
            options(train__optimizer="muon"), STEPS, {"head": {"kernel": jnp.ones((2, 2))}}
        )


def test_which_runs_keep_an_average():
    assert not keeps_average({"ema_decay": 0.0, "optimizer": "adamw"})
    assert keeps_average({"ema_decay": 0.0, "optimizer": "schedule_free"})
    assert keeps_average({"ema_decay": 0.9, "optimizer": "adamw"})
