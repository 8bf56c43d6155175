"""Memory traffic of compiled programs, against the compiler's own count where it has one."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from unified_mm.costs.hlo import Program
from unified_mm.costs.traffic import memory_traffic


def forward(w, v, x):
    probabilities = jax.nn.softmax(jnp.tanh(x @ w) @ v)
    return (probabilities[:, 2:9] ** 2).sum(), w.at[3:7].set(2.0), probabilities.T


def gradient(*args):
    return jax.grad(lambda *args: forward(*args)[0], argnums=(0, 1))(*args)


@pytest.mark.parametrize("function", [forward, gradient])
def test_without_loops_the_compiler_counts_the_same(function):
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 256), (256, 128), (512, 64))
    ]
    compiled = jax.jit(function).lower(*shapes).compile()
    told = compiled.cost_analysis()["bytes accessed"]
    assert memory_traffic(Program.parse(compiled.as_text())) == pytest.approx(told, rel=1e-3)


def sorts(count):
    """A function that sorts so many times; each sort reads and writes all."""

    def function(x):
        for number in range(count):
            x = jnp.sort(x, number % 2)
        return x

    return function


@pytest.mark.parametrize("counts", [(2, 4), (4, 2), (2, 4, 0)])
@pytest.mark.parametrize("times", [1, 100])
def test_a_conditional_counts_as_its_larger_branch(counts, times):
    """Of four sorts and no six, by itself or in each round of a loop, whose state may be copied."""
    branches = [sorts(count) for count in counts]

    def chosen(x, _):
        place = (x[0, 0] * 4).astype(jnp.int32)
        if len(branches) == 2:
            return jax.lax.cond(place > 1, branches[1], branches[0], x), None
        return jax.lax.switch(place, branches, x), None

    def loop(x):
        return jax.lax.scan(chosen, x, None, length=times)[0]

    compiled = jax.jit(loop).lower(jax.ShapeDtypeStruct((100, 64), jnp.float32)).compile()
    moved = memory_traffic(Program.parse(compiled.as_text()))
    once = 2 * 100 * 64 * 4
    assert 4 * times * once <= moved < 6 * times * once


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x):
        return jax.lax.scan(lambda c, _: (jnp.sort(c), None), x, None, length=50)[0]

    compiled = jax.jit(loop).lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile()
    moved = memory_traffic(Program.parse(compiled.as_text()))
    assert 50 * 2 * 4000 <= moved <= 50 * 6 * 4000  # sorted, and at most copied twice besides


def traffic(lines, others=""):
    text = f"HloModule jit_f, num_partitions=2\n{others}\nENTRY %main (x: f32[8,16]) -> f32[8,16]"
    body = textwrap.indent(textwrap.dedent(lines), "  ")
    return memory_traffic(Program.parse(f"{text} {{\n  %x = f32[8,16] parameter(0)\n{body}\n}}\n"))


WHOLE, ROW = 8 * 16 * 4, 16 * 4
KERNELS = """
%slice_of (p: f32[8,16], i: s32[]) -> f32[1,16] {
  %p = f32[8,16] parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,16] bitcast(%p)
  ROOT %s = f32[1,16] dynamic-slice(%b, %i, %i), dynamic_slice_sizes={1,16}
}

%row_of (p: f32[8,16], i: s32[]) -> bf16[1,16] {
  %i = s32[] parameter(1)
  %p = f32[8,16] parameter(0)
  %h = bf16[8,16] convert(%p)
  ROOT %s = bf16[1,16] dynamic-slice(%h, %i, %i), dynamic_slice_sizes={1,16}
}

%of_row (i: s32[], p: f32[8,16]) -> bf16[1,16] {
  %i = s32[] parameter(0)
  %p = f32[8,16] parameter(1)
  %f = bf16[1,16] fusion(%p, %i), kind=kLoop, calls=%row_of
  ROOT %n = bf16[1,16] negate(%f)
}

%within (p: f32[8,16], r: f32[1,16]) -> f32[8,16] {
  %p = f32[8,16] parameter(0)
  %r = f32[1,16] parameter(1)
  ROOT %f = f32[8,16] fusion(%p, %r), kind=kLoop, calls=%change_of
}

%same (p: f32[8,16]) -> f32[128] {
  %p = f32[8,16] parameter(0)
  ROOT %b = f32[128] bitcast(%p)
}

%of_same (p: f32[8,16]) -> f32[128] {
  %p = f32[8,16] parameter(0)
  %f = f32[128] fusion(%p), kind=kLoop, calls=%same
  ROOT %n = f32[128] negate(%f)
}

%of_changed (p: f32[8,16], r: f32[1,16]) -> f32[8,16] {
  %p = f32[8,16] parameter(0)
  %r = f32[1,16] parameter(1)
  %f = f32[8,16] fusion(%p, %r), kind=kLoop, calls=%change_of
  ROOT %n = f32[8,16] negate(%f)
}

%change_of (p: f32[8,16], r: f32[1,16]) -> f32[8,16] {
  %p = f32[8,16] parameter(0)
  %r = f32[1,16] parameter(1)
  %i = s32[] constant(0)
  ROOT %u = f32[8,16] dynamic-update-slice(%p, %r, %i, %i)
}

%piece (p: f32[8,16], g: f32[16,16]) -> (f32[8,16], f32[16,16]) {
  %p = f32[8,16] parameter(0)
  %g = f32[16,16] parameter(1)
  %c = f32[16,16] all-gather(%p), channel_id=3, replica_groups=[1,2]<=[2], dimensions={0},\
 backend_config={"async_collective_fusion_config":{}}
  %n = f32[8,16] negate(%p)
  ROOT %t = (f32[8,16], f32[16,16]) tuple(%n, %g)
}
"""


@pytest.mark.parametrize(
    "lines, moved",
    [
        ("%y = f32[8,16] negate(%x)", 2 * WHOLE),
        ("%y = f32[8,16]{1,0:T(8,128)S(1)} negate(%x)", WHOLE),  # kept beside the units
        ("%y = (f32[8,16], f32[8,16]) tuple(%x, %x)\n%z = f32[8,16] bitcast(%x)", 0),
        ("%y = f32[1,16] slice(%x), slice={[0:1], [0:16]}", 2 * ROW),
        ("%y = f32[1,16]{1,0:S(1)} slice(%x), slice={[0:1], [0:16]}", ROW),
        ("%y = f32[1,16]{1,0:S(1)} negate(%x)\n"
         "%z = f32[8,16] dynamic-update-slice(%x, %y, %x, %x)", WHOLE + ROW),
        ("%y = f32[8,16] custom-call(), custom_call_target=\"AllocateBuffer\"", 0),
        ("%c = s32[] constant(2)\n"
         "%y = f32[1,16] fusion(%x, %c), kind=kLoop, calls=%slice_of", 2 * ROW + 4),
        ("%r = f32[1,16] constant(0)\n"
         "%y = f32[8,16] fusion(%x, %r), kind=kLoop, calls=%change_of", 2 * ROW),
        # A kernel within a kernel: of a stack of layers one is read, in half the bits.
        ("%c = s32[] constant(2)\n"
         "%y = bf16[1,16] fusion(%c, %x), kind=kOutput, calls=%of_row", ROW + 4 + ROW // 2),
        ("%r = f32[1,16] constant(0)\n"
         "%y = f32[8,16] fusion(%x, %r), kind=kLoop, calls=%within", 2 * ROW),
        # What is within hands on what it is given, changed or not, and the kernel reads that.
        ("%y = f32[128] fusion(%x), kind=kLoop, calls=%of_same", 2 * WHOLE),
        ("%r = f32[1,16] constant(0)\n"
         "%y = f32[8,16] fusion(%x, %r), kind=kLoop, calls=%of_changed", 2 * WHOLE + ROW),
        ("%y = f32[8,16] all-reduce(%x), replica_groups=[1,2]<=[2], to_apply=%add", 2 * WHOLE),
        ("%s = (f32[8,16]{1,0:S(1)}, f32[8,16], u32[]{:S(2)}) copy-start(%x)\n"
         "%y = f32[8,16]{1,0:S(1)} copy-done(%s)", WHOLE),
        ("%s = ((f32[8,16]), f32[1,16]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)\n"
         "%y = f32[1,16]{1,0:S(1)} slice-done(%s)", ROW + 4),
        # A kernel beside which a collective goes on: that counts once, what is handed on does not.
        ("%g = f32[16,16] custom-call(), custom_call_target=\"AllocateBuffer\"\n"
         "%y = (f32[8,16], f32[16,16]) fusion(%x, %g), kind=kOutput, calls=%piece",
         2 * WHOLE + 3 * WHOLE),
    ],
)  # fmt: skip
def test_what_each_kind_of_instruction_moves(lines, moved):
    assert traffic(lines, KERNELS) == moved
