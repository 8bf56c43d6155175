"""What the compiled program of a block, and of a step of writing, does between its products.

Everything elementwise stands in fusions. Of a profiled block's time (width 512, 8 x 128 tokens, two
shared x86 cores, jax 0.10.2) 87% were products and softmax 5%; norms, biases, activation and sums
took under 8%: nothing that a kernel of our own would win.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.costs.hlo import Program, array_bytes
from unified_mm.inference.generate import TextWriter
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, single_document
from unified_mm.nn.transformer import Block
from unified_mm.nn.unstack import unstack_layers
from unified_mm.parallel.sharding import without_names

ROWS, TOKENS, WIDTH = 2, 32, 64
# As programs are compiled for users; the tests' own are compiled in a hurry.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True
ELEMENTWISE = set(
    "abs add and compare convert divide erf exponential log logistic maximum minimum multiply "
    "negate or power rsqrt select sqrt subtract tanh reduce broadcast".split()
)
STREAM = View("captioning", "prefix", autoregressive=True)


def compiled(function, *args, donated=()):
    lowered = jax.jit(function, donate_argnums=donated).lower(*args)
    return lowered.compile(compiler_options=OPTIMISED)


def alone(program, least=16):
    """What is elementwise, of more than `least` bytes, and in no fusion."""
    return [
        (each.line.opcode, each.line.type)
        for each in program.runs()
        if not each.fused
        and each.line.opcode in ELEMENTWISE
        and array_bytes(each.line.type) > least
    ]


def by_scope(program, end):
    """The one kernel whose result was called so where it was written."""
    found = [
        each.line
        for each in program.runs()
        if not each.fused and each.line.attribute(r'op_name="([^"]*)"').endswith(end)
    ]
    (line,) = [line for line in found if line.opcode not in ("bitcast", "copy", "parameter")]
    return line


@pytest.fixture(scope="module", params=["gelu", "silu"])
def block(request):
    """The optimised program of a block."""
    options = TransformerOptions(WIDTH, 1, 4, 4 * WIDTH, activation=request.param)
    x = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH))
    metadata = single_document(jnp.ones((ROWS, TOKENS), bool), Group("t", "text", TOKENS))
    plan = plan_attention(options, MaskTable((View("t", "joint"),)), metadata, metadata)
    module = Block(options, True)
    params = without_names(module.init(jax.random.key(0), x, plan, None))

    def forward(params, x, plan):
        return module.apply(params, x, plan, None)[0]

    return Program.parse(compiled(forward, params, x, plan).as_text())


def test_nothing_elementwise_stands_alone_in_a_block(block):
    assert not alone(block)


def test_bias_and_activation_are_one_kernel(block):
    """Between the two products of the feed-forward, and one more for bias and residual after."""
    up, down = (by_scope(block, f"mlp/shared/{name}/dot_general") for name in ("up", "down"))
    lines = block.computations[block.entry]
    between = [lines[name] for name in down.operands if up.name in lines[name].operands]
    assert [line.opcode for line in between] == ["fusion"]
    after = [line for line in lines.values() if down.name in line.operands]
    assert [(line.opcode, line.root) for line in after] == [("fusion", True)]


def test_a_norm_is_five_kernels_at_most(block):
    """Two sums, what is left of the mean, the root, and one for all the rest."""
    fusions = [each.line for each in block.runs() if each.line.opcode == "fusion"]
    names = [line.attribute(r'op_name="([^"]*)"') for line in fusions]
    for norm in ("attention_norm", "feed_forward_norm"):
        assert 1 <= sum(f"Block/{norm}/" in name for name in names) <= 5


@pytest.mark.parametrize("unstacked", [False, True], ids=["stacked", "unstacked"])
def test_a_step_of_writing(unstacked):
    """Fused as well; and where layers are apart, no weights and no keys are copied."""
    task = tiny.replace_model(
        tiny.task(model__width=64, model__feed_forward=256), unstacked=unstacked
    )
    params = tiny.params(tiny.task(model__width=64, model__feed_forward=256))
    params = unstack_layers(params) if unstacked else params
    batch = tiny.batch(task, 1)

    writer = TextWriter(task.model, STREAM, padding=0, cache_room=11)

    def begin(params, batch):
        return writer.read_prompts(params, batch)[1]

    read_state = jax.eval_shape(begin, params, batch)
    token = jax.ShapeDtypeStruct((1,), np.int32)

    def step(params, read_state, token):
        return writer.read_token(params, read_state, token)

    program = compiled(step, params, read_state, token, donated=1)
    assert not alone(Program.parse(program.as_text()))
    held = program.memory_analysis().temp_size_in_bytes
    weights = 4 * 64 * 256  # bytes of one product's
    assert (held < weights) == unstacked, held
