"""Models with experts: training in parts, writing with a cache, int8, decay, sizes, upcycling."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.inference.programs import programs
from unified_mm.inference.quantized_params import dequantized, quantize_params, saved_shapes
from unified_mm.models.unified import UnifiedModel
from unified_mm.nn.attention.rules import View
from unified_mm.nn.pipeline import Pipeline
from unified_mm.nn.quantized import Quantized
from unified_mm.objectives.routing import balance, sown
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import axis_names, path_of, without_names
from unified_mm.task import build_task
from unified_mm.training.layout import in_training
from unified_mm.training.muon import matrix_axes
from unified_mm.training.optimizer import make_optimizer
from unified_mm.training.sizes import measure_sizes
from unified_mm.training.start_from import (
    config_from_run,
    load_params,
    news_of_start,
    weights_to_start_from,
)
from unified_mm.training.step import gradients

OWN = {"count": 4, "top_k": 2, "group": 2, "noise": 0.0, "capacity": 0.8, "bias_balance": True}
CHANGES = {
    "model__feed_forward_type": "experts",
    "model__feed_forward_options": OWN,
    "objectives__matching__weight": 0.0,
    "objectives__routing__weight": 1.0,
    "objectives__routing__global_entropy": 0.1,
    "objectives__routing__least_share": 1.0,
    "objectives__routing__local_entropy": 0.1,
    "objectives__routing__importance": 0.1,
}
KERNEL = "transformer/layers/block_0/feed_forward/experts_all/{}/kernel"


@pytest.fixture(scope="module")
def built():
    task = tiny.task(**CHANGES)
    return task, tiny.params(task), tiny.batch(task, 8)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Quantized))
    return {path_of(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("way", ["parts", pytest.param("stages", marks=pytest.mark.slow)])
def test_micro_batches_and_stages_keep_groups_together(way):
    """One loss and gradient, in two parts, or in two stages; each with its groups of two."""
    task = tiny.task(**CHANGES, objectives__contrastive__weight=0.0)
    params, batch = tiny.params(task), tiny.batch(task, 8)
    batch["image"]["present"] = batch["image"]["present"].at[1].set(False)
    optimizer = make_optimizer(Config(tiny.config_dict(**CHANGES).to_dict()).train, 10, params)
    staged = replace(task, model=task.model.pipelined(Pipeline(2, 2)))
    (loss, whole, metrics), (other, gradient, found) = (
        jax.jit(
            lambda p, task=task, n=n: gradients(task, optimizer, p, batch, jax.random.key(1), n)
        )(params)
        for task, n in ((task, 1), (task, 2) if way == "parts" else (staged, 1))
    )
    assert float(metrics["routing/dropped_text"][0]) > 0
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    for name in ("loss", "balance", "dropped_image", "experts_text"):
        name = f"routing/{name}"
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5, err_msg=name)
    for path, expected in flat(whole).items():
        np.testing.assert_allclose(
            flat(gradient)[path], expected, rtol=1e-3, atol=1e-5, err_msg=path
        )
    pull = flat(whole)["transformer/layers/block_0/feed_forward/balance_all"]
    np.testing.assert_allclose(pull.sum(-1), 0, atol=1e-6)
    assert np.abs(pull).max() > 1e-3


def test_losses_are_those_of_the_probabilities(built):
    task, params, batch = built
    found = jax.jit(lambda p: task.auxiliary(p, batch, jax.random.key(0), deterministic=True))(
        params
    )
    (pool,), modalities = sown(found)
    assert set(modalities) == {"image", "text"} and pool.load.shape == (2, 8, 4)
    np.testing.assert_allclose(pool.load.sum(-1), 2 * pool.tokens)
    np.testing.assert_allclose(pool.served, pool.tokens)  # where nothing is drawn
    np.testing.assert_array_equal(pool.load[:, ::2], pool.load[:, 1::2])  # groups of two
    f, p = (x / x.sum(-1, keepdims=True) for x in (pool.load, pool.probability))
    np.testing.assert_allclose(balance(pool), 4 * (f * p).sum(-1), rtol=1e-6)
    alike = pool.replace(probability=jnp.ones_like(pool.probability))
    np.testing.assert_allclose(balance(alike), 1, rtol=1e-6)


def test_routing_without_experts_is_refused():
    task = tiny.task(objectives__routing__weight=1.0, objectives__matching__weight=0.0)
    params, batch = tiny.params(task), tiny.batch(task, 2)
    with pytest.raises(ValueError, match="objectives.routing: no layer has experts; set model"):
        jax.eval_shape(
            lambda p: task.metrics(p, batch, jax.random.key(0), deterministic=True), params
        )


def test_a_bias_that_nothing_moves_is_refused():
    fields = CHANGES | {"objectives__routing__weight": 0.0}
    task, config = tiny.task(**fields), Config(tiny.config_dict(**fields).to_dict())
    with pytest.raises(ValueError, match="bias_balance=True: no objective moves the bias; set"):
        in_training(config, task, make_mesh({"data": -1}))


@pytest.mark.parametrize("order", ["place", "priority", "choice"])
def test_no_bit_of_a_caption_tells_of_words_to_come(order):
    """The pass holds the text of contrast too, which knows them; and other examples."""
    own = {"count": 4, "order": order, "noise": 0.0, "capacity": 0.6}
    task = tiny.task(**{**CHANGES, "model__feed_forward_options": own})
    params, batch = tiny.params(task), tiny.batch(task, 4)
    views = [view for each in task.objectives for view in each.views()]

    def encode(model, ids):
        text = batch["text"] | {"ids": ids}
        return model.encode({**batch, "text": text}, views, deterministic=False)["captioning"].text

    run = jax.jit(lambda ids: task.model.apply({"params": params}, ids, method=encode))
    ids = np.asarray(batch["text"]["ids"])
    before, known = run(jnp.asarray(ids)), 3
    for seed in range(6):
        others = np.random.default_rng(seed).integers(4, 200, ids.shape, dtype=np.int32)
        others[0, :known] = ids[0, :known]
        after = run(jnp.asarray(others))
        np.testing.assert_array_equal(after[0, :known], before[0, :known])
        assert (after[0, known:] != before[0, known:]).any()


def test_pictures_of_one_document_share_no_room():
    """Texts between them would depend on a later one, by what it leaves to the earlier."""
    built = tiny.task(
        model__fusion="gated_cross_attention",
        model__tower__feed_forward_type="experts",
        model__tower__feed_forward_options={"group": 2},
        objectives__captioning__rule="interleaved_latest",
        objectives__contrastive__weight=0.0,
        objectives__matching__weight=0.0,
    )
    given = without_names(built.abstract_params()), tiny.documents(built), jax.random.key(0)
    jax.eval_shape(partial(built.metrics, deterministic=True), *given)
    with pytest.raises(ValueError, match="group=2 of the tower of image: pictures of one document"):
        jax.eval_shape(partial(built.metrics, deterministic=False), *given)


def test_experts_are_not_exported():
    with pytest.raises(ValueError, match="a model with experts cannot be exported"):
        programs(tiny.loaded(**{k: v for k, v in CHANGES.items() if "matching" not in k}), 4, 4)


def read(model: UnifiedModel, batch, first: int):
    """The embeddings of a text whose first words are read at once, the others one by one."""
    view = View("captioning", "prefix", autoregressive=True)
    text = {key: batch["text"][key] for key in ("ids", "valid")}
    present = {"present": batch["text"]["present"]}
    begin = {key: value[:, :first] for key, value in text.items()}
    length = text["ids"].shape[1]
    x, cache = model.prefill({**batch, "text": begin | present}, view, length - first)
    parts = [x]
    for place in range(first, length):
        one = {key: value[:, place : place + 1] for key, value in text.items()}
        at = {"text_position": jnp.full(one["ids"].shape, place)}
        x, cache = model.extend(cache, one | at | present, view)
        parts.append(x)
    return jnp.concatenate(parts, axis=1)


def test_words_written_one_by_one_are_those_read_at_once(built):
    task, params, batch = built
    model = task.model.for_inference()
    run = jax.jit(
        lambda p, first: model.apply({"params": p}, batch, first, method=read), static_argnums=1
    )
    whole, parts = run(params, 12), run(params, 10)
    there = batch["text"]["valid"]
    np.testing.assert_allclose(parts[there], whole[there], atol=1e-5)


def test_experts_become_int8(built):
    task, params, batch = built
    small = quantize_params(task, params)
    for name in ("up", "down"):
        leaf, before = (flat(tree)[KERNEL.format(name)] for tree in (small, params))
        scale = np.abs(before).max(-2, keepdims=True) / 127.5  # of each layer, expert and channel
        np.testing.assert_allclose(leaf.scale, scale, rtol=1e-6)
    router = "transformer/layers/block_0/feed_forward/router_all/kernel"
    assert flat(small)[router] is flat(params)[router]  # what chooses stays as it is
    config = Config({"quantized": {"activations": ""}})  # as runs had it when it did not
    assert isinstance(flat(saved_shapes(task, config))[router], Quantized)
    model = replace(task, model=task.model.for_inference())
    score = jax.jit(lambda p: model.metrics(p, batch, jax.random.key(0), deterministic=True))
    ours, theirs = score(small), score(dequantized(small))
    np.testing.assert_allclose(ours["captioning/loss"], theirs["captioning/loss"], rtol=1e-4)


def test_muon_and_decay_know_the_experts_kernels(built):
    names = axis_names(built[0].abstract_params())
    for name, expected in (("up", ((2,), (3,))), ("down", ((2,), (3,)))):
        assert tuple(matrix_axes(KERNEL.format(name), names)) == expected
    path = KERNEL.format("up")
    assert names[path] == ("layers", "experts", "embed", "feed_forward")
    given = Config(
        tiny.config_dict(
            **CHANGES, train__learning_rate=0.1, train__warmup_steps=0, train__weight_decay=0.5
        ).to_dict()
    ).train
    params = built[1]
    optimizer = make_optimizer(given, 10, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    new, _ = jax.jit(lambda p: optimizer.update(zero, optimizer.init(p), p, 0))(params)
    moved = {path: flat(params)[path] - leaf for path, leaf in flat(new).items()}
    np.testing.assert_allclose(moved[path], 0.05 * flat(params)[path], rtol=1e-4, atol=1e-6)
    assert not moved[path.replace("kernel", "bias")].any()


def test_sizes_count_the_experts_of_a_token():
    dense = {key: CHANGES[key] for key in ("objectives__matching__weight",)}
    plain = measure_sizes(Config(tiny.config_dict(**dense).to_dict()))
    own = {**OWN, "bias_balance": False, "capacity": 2.0}
    sparse = measure_sizes(
        Config(tiny.config_dict(**{**CHANGES, "model__feed_forward_options": own}).to_dict())
    )
    layers, width, hidden = 2, 16, 32
    mlp, router = 2 * width * hidden + width + hidden, 4 * width
    assert sparse.total == plain.total + layers * (3 * mlp + router)
    assert sparse.active == plain.active + layers * (mlp + router)
    # Of a token: two experts in the place of one, and the router.
    more = layers * 2 * (2 * width * hidden + router)
    assert sparse.token_flops == plain.token_flops + more
    # Of an example: room for twice two experts a token, in groups of two examples.
    tokens = 4 + 12 + 12
    more = layers * 2 * tokens * (3 * 2 * width * hidden + router)
    assert sparse.training_flops == pytest.approx(plain.training_flops + 3 * more, rel=1e-3)


@pytest.mark.parametrize("by", ["all", "modality"])
def test_a_dense_run_becomes_each_expert(tmp_path, by):
    before = {"objectives__matching__weight": 0.0, "model__separate_feed_forward": by == "modality"}
    dense = tiny.task(**before)
    weights = tiny.params(dense)
    run = tiny.write_run(tmp_path / "dense", tiny.config_dict(**before), weights)
    own = {"by": by, "gate": "normalised", "every": 2, "count": 3, "top_k": 2, "noise": 0.0}
    own |= {"capacity": 3.0, "shared": True}  # room for all
    if by == "modality":
        own["every"] = 1
    config = config_from_run(
        tiny.config_dict(
            **{**CHANGES, "model__feed_forward_options": own}, model__start_from__whole=str(run)
        ),
        ("model.feed_forward_type",),
    )
    assert config.model.feed_forward_type == "experts"
    config = Config(config.to_dict())
    task = build_task(config, tiny.tokenizer())
    found = weights_to_start_from(config)
    params = load_params(tiny.params(task, 5), config, found)
    pools = ("all",) if by == "all" else ("image", "text")
    fresh = [f"transformer/layers/router_{pool}" for pool in pools]
    news = news_of_start(params, config, found)
    assert news.endswith(f"afresh: {', '.join([*fresh, 'transformer/layers/shared_expert'])}")
    assert "normalised" in news_of_start(params, with_gate(config, "scaled"), found)
    batch = tiny.batch(dense, 4)

    def loss(params, task):
        found = task.metrics(params, batch, jax.random.key(0), deterministic=False)
        return found["captioning/loss"][0] + found["contrastive/loss"][0], found

    (_, ours), slopes = jax.jit(jax.value_and_grad(lambda p: loss(p, task), has_aux=True))(params)
    theirs = jax.jit(lambda p: loss(p, dense)[1])(weights)
    for name in ("captioning/loss", "contrastive/loss"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    assert not any(value[0] for name, value in ours.items() if "dropped" in name)
    for path, slope in flat(slopes).items():
        if "router" in path or "shared_expert/down/kernel" in path:
            assert np.abs(slope).max() > 1e-6, path


def with_gate(config, gate):
    fields = config.as_dict()
    fields["model"]["feed_forward_options"]["gate"] = gate
    return Config(fields)
