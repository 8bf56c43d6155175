"""Tokens that leave layers early, against a pass over the whole text without a cache."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.inference.decoding import Decoding
from unified_mm.inference.engine import Engine
from unified_mm.inference.generate import TextWriter, confidence
from unified_mm.inference.predictor import inputs_of
from unified_mm.inference.quantization import quantized
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import GateOptions, TransformerOptions
from unified_mm.nn.tokens import Group, single_document
from unified_mm.nn.transformer import LEFT, Block, Transformer
from unified_mm.nn.unstack import unstack_layers
from unified_mm.parallel.sharding import without_names

ROWS, TOKENS, WIDTH, LAYERS, EXITS = 3, 6, 16, 4, (1, 3)
VIEW = View("t", "causal", autoregressive=True)
GROUP = Group("t", "text", TOKENS)
ALWAYS, NEVER = -1.0, 2.0


@pytest.fixture(scope="module")
def stack():
    """An unstacked stack, its parameters, embeddings, and where each token leaves."""
    options = TransformerOptions(WIDTH, LAYERS, 2, 32, unstacked=True, exits=EXITS)
    x = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH))
    module = Transformer(options.changed({"unstacked": False}))
    params = module.init(jax.random.key(0), x, plan(options, TOKENS))["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    # Some tokens leave at the first exit, some at the second, some at none; at last all do.
    leaves = np.array([[0, 1, 2, 0, 1, 1], [2, 2, 1, 0, 0, 1], [1, 0, 1, 2, 0, 1]])
    return Transformer(options), unstack_layers(without_names(params)), x, leaves


def metadata(length, valid=True):
    return single_document(jnp.full((ROWS, length), valid), GROUP._replace(length=length))


def plan(options, length):
    return plan_attention(options, MaskTable((VIEW,)), metadata(length), metadata(length))


def token_by_token(stack, rows=slice(None)):
    """Outputs, and the cache after all, of tokens read one by one: row r leaves as `leaves[r]`."""
    module, params, x, leaves = stack
    x, leaves = x[rows], leaves[rows]
    options = module.options
    shape = (len(x), 2, TOKENS, WIDTH // 2)
    layers = {"block_0": tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in range(LAYERS))}
    empty = jax.tree.map(lambda leaf: leaf[rows], metadata(TOKENS, False))
    cache = Cache(layers, empty, jnp.array(0))

    @jax.jit
    def read(cache, token, wanted, place):
        own = single_document(jnp.ones((len(x), 1), bool), GROUP._replace(length=1))
        own = own.replace(position=jnp.full((len(x), 1), place))
        seen = cache.write_metadata(own)
        table = MaskTable((VIEW,))
        plan = plan_attention(options, table, own, seen, write_at=cache.length)
        asked = []  # exits are asked in their order

        def leave(_):
            asked.append(len(asked) + 1)
            return wanted == asked[-1]

        (y, layers), left = module.apply(
            {"params": params}, token, plan, cache.layers, leave=leave, mutable=[LEFT]
        )
        cache = cache.replace(layers=layers, metadata=seen, length=cache.length + 1)
        return y, cache, left[LEFT]["exits"][0]

    found, gone = [], []
    for place in range(TOKENS):
        y, cache, left = read(cache, x[:, place : place + 1], leaves[:, place], place)
        found.append(y)
        gone.append(left)
    return jnp.concatenate(found, 1), cache.layers["block_0"], jnp.stack(gone, 1)


def in_one_pass(stack):
    """The same without a cache: after its exit, a token's state goes on as it is."""
    module, params, x, leaves = stack
    options, kv = module.options, []
    for layer in range(LAYERS):
        whole = plan(options, TOKENS).replace(keep=(0, TOKENS))
        y, found = Block(options, True).apply(
            {"params": params[f"layers_{layer}"]["block_0"]}, x, whole, None
        )
        kv.append(found)
        gone = [(leaves == number + 1) & (layer >= exit) for number, exit in enumerate(EXITS)]
        x = jnp.where(np.any(gone, axis=0)[..., None], x, y)
    normed = Transformer(options).apply({"params": params}, x, method="normed")
    return normed, kv


def test_the_cache_holds_keys_and_values_of_the_state_that_each_token_left_with(stack):
    outputs, cache, left = token_by_token(stack)
    expected, kv = in_one_pass(stack)
    np.testing.assert_allclose(outputs, expected, atol=2e-5)
    for found, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(kv), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    after = np.array([[False, False], [True, True], [False, True]])  # both exits, by where it left
    np.testing.assert_array_equal(left, after[stack[3]])


@pytest.mark.parametrize("row", range(ROWS))
def test_a_row_does_not_depend_on_when_others_leave(stack, row):
    together, alone = token_by_token(stack), token_by_token(stack, slice(row, row + 1))
    for both, own in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(both[row], own[0], atol=2e-6)
    module, params, x, leaves = stack
    others = np.roll(leaves, 1, axis=1)
    others[row] = leaves[row]
    again = token_by_token((module, params, x, others))
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one[row], other[row], atol=2e-6)


def test_layers_are_left_only_where_they_are_unstacked(stack):
    module, params, x, _ = stack
    stacked = Transformer(module.options.changed({"unstacked": False}))
    with pytest.raises(ValueError, match="where they are unstacked"):
        stacked.apply({"params": params}, x, plan(module.options, TOKENS), leave=lambda x: x)


@pytest.mark.parametrize(
    ("exits", "more"), [((3, 1), {}), ((0,), {}), ((4,), {}), ((1,), {"cross": GateOptions(2)})]
)
def test_exits_are_layers_in_order_before_the_last(exits, more):
    with pytest.raises(ValueError, match="must be layers in ascending order, of "):
        TransformerOptions(WIDTH, LAYERS, 2, 32, exits=exits, **more)


CHANGES = {"model__layers": 4}
WITH_EXITS = {**CHANGES, "model__exits": (1, 3), "objectives__exits__weight": 0.5}
PICTURES = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(
    scope="module",
    params=["early", pytest.param("gated_cross_attention", marks=pytest.mark.slow)],
)
def model(request):
    return tiny.loaded(model__fusion=request.param, model__cross__start=0.5, **WITH_EXITS)


def first_steps(model, threshold):
    """Logits and cache of two tokens after the first, of captions of four pictures."""
    predictor, rows = model.predictor, [model.read(each, "image") for each in PICTURES]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    writer: TextWriter = predictor.writer(8)
    text, used = predictor.prompts([""] * len(rows))
    inputs = inputs_of(Decoding(), {**batch, "text": text}, 9 - used, [5], 0, threshold)

    @jax.jit
    def steps(params, inputs):
        state = writer.begin(params, inputs)
        first, read = writer.read_token(params, state.read_state, state.token)
        second, read = writer.read_token(params, read, first.argmax(-1).astype(jnp.int32))
        return first, second, read.cache.layers

    return steps(predictor.params, inputs)


def test_without_thresholds_a_model_with_exits_computes_the_bits_of_one_without(model):
    fusion = type(model.task.model)
    name = "early" if fusion.__name__ == "EarlyFusion" else "gated_cross_attention"
    plain = tiny.loaded(model__fusion=name, model__cross__start=0.5, **CHANGES)
    found, expected = first_steps(model, None), first_steps(plain, None)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_where_no_token_leaves_the_logits_are_those_of_all_layers(model):
    whole = first_steps(model, None)
    never = first_steps(model, np.full(4, NEVER, np.float32))
    early = first_steps(model, np.full(4, ALWAYS, np.float32))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(never), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)  # of large weights
    assert not np.allclose(whole[0], early[0], atol=1e-2)


def early(model, exits):
    """The model with other thresholds, and what it has compiled."""
    other = copy.copy(model)
    other.predictor = model.predictor.leaving(exits)
    return other


def test_captions_and_answers_leave_by_thresholds_of_their_own(model):
    never, always, mixed = (
        early(model, {"caption": caption, "answer": answer})
        for caption, answer in ((NEVER, NEVER), (ALWAYS, ALWAYS), (NEVER, ALWAYS))
    )
    captions = never.caption(PICTURES)
    assert mixed.caption(PICTURES) == captions != always.caption(PICTURES)
    asked = ["a red", "", "a red", ""]
    late, soon = never.answer(PICTURES, asked), always.answer(PICTURES, asked)
    assert late[::2] != soon[::2]
    assert mixed.answer(PICTURES, asked) == [soon[0], late[1], soon[2], late[3]]
    assert "".join(always.stream(PICTURES[0])) == always.caption(PICTURES)[0]


def test_what_exits_were_not_calibrated_for_is_refused(model):
    leaving = early(model, {"caption": 0.5})
    with pytest.raises(ValueError, match="neither a temperature nor beams"):
        leaving.generate(PICTURES[:1], [""], Decoding(beams=2))
    with pytest.raises(ValueError, match="cache: exits were calibrated with the run's own"):
        leaving.with_options(cache="int8")
    assert leaving.with_options(cache="same").predictor.exits == {"caption": 0.5}
    with pytest.raises(ValueError, match="exits were calibrated with float weights"):
        quantized(leaving)
    with pytest.raises(ValueError, match="the engine runs all layers"):
        Engine(leaving)


def test_confidence_is_how_far_the_likeliest_token_is_ahead():
    logits = np.log([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(confidence(jnp.asarray(logits)), [0.2, 0.0, 0.7], atol=1e-6)
