"""Collectives as they stand in compiled programs: written ones, and a real one of eight devices."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.costs.collectives import Collective, collectives_of, totals_by_kind
from unified_mm.parallel.mesh import make_mesh

ADD = """
    %add (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %sum = f32[] add(%a, %b)
    }
"""


def module(entry, others=""):
    """A module of eight devices whose entry holds these lines after its parameter %x."""
    return textwrap.dedent(
        f"""\
    HloModule jit_f, is_scheduled=true, num_partitions=8
    {ADD}{others}
    ENTRY %main (x: f32[4,16]) -> f32[4,16] {{
      %x = f32[4,16]{{1,0:T(8,128)}} parameter(0)
    {textwrap.indent(textwrap.dedent(entry), "      ")}
    }}
    """
    )


@pytest.mark.parametrize(
    "groups, members",
    [
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups={{1,5},{0,4}}", (1, 5)),
        ("replica_groups={}", tuple(range(8))),
        ("source_target_pairs={{0,1},{3,7},{1,2}}", (3, 7)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
    ],
)
def test_who_takes_part(groups, members):
    kind = "collective-permute" if "pairs" in groups else "all-reduce"
    assert only(f"%c = f32[4,16] {kind}(%x), {groups}, to_apply=%add").members == members


@pytest.mark.parametrize(
    "line, asynchronous",
    [
        ("%c = f32[4,16] all-reduce(%x), replica_groups={}, to_apply=%add", False),
        ("%c = f32[4,16] all-reduce-start(%x), replica_groups={}, to_apply=%add", True),
        ("%c = f32[4,16] all-reduce-start(%x), replica_groups={}, to_apply=%add,"
         ' backend_config={"collective_backend_config":{"is_sync":true}}', False),
    ],
)  # fmt: skip
def test_what_goes_on_beside_other_work(line, asynchronous):
    assert only(line).asynchronous == asynchronous


def only(line):
    (found,) = collectives_of(module(line))
    return found


@pytest.mark.parametrize(
    "line, kind, size, group",
    [
        ("%c = f32[4,16] all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add",
         "all-reduce", 256, 4),
        ("%c = f32[8,16] all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
         "all-gather", 512, 2),
        ("%c = f32[1,16] reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
         "reduce-scatter", 256, 4),
        ("%c = f32[4,16] all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}",
         "all-to-all", 256, 4),
        ("%c = f32[4,16] all-reduce(%x), replica_groups=mesh['a'=4,'b'=2],"
         " device_ids=([2,4]T(1,0)) {'a','b'}, to_apply=%add", "all-reduce", 256, 8),
        ("%c = f32[4,16] all-reduce(%x), replica_groups=mesh['a'=8] {'a':(2)4}, to_apply=%add",
         "all-reduce", 256, 4),
        ("%c = f32[4,16] all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 256, 8),
        ("%c = f32[4,16] collective-permute(%x), source_target_pairs={{1,0},{2,1},{3,2}}",
         "collective-permute", 256, 4),
        ("%c = f32[4,16] collective-permute(%x), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}",
         "collective-permute", 256, 2),
        ("%c = (f32[4,16]{1,0:T(8,128)S(1)}, f32[32,16]{1,0}) all-gather-start(%x),"
         " replica_groups=[1,8]<=[8], dimensions={0}\n"
         "%d = f32[32,16] all-gather-done(%c)", "all-gather", 2048, 8),
        ("%c = (f32[4,16], f32[4,16], u32[], u32[]) collective-permute-start(%x),"
         " source_target_pairs={{0,1},{1,0}}\n"
         "%d = f32[4,16] collective-permute-done(%c)", "collective-permute", 256, 2),
        ("%y = bf16[3,5]{1,0} custom-call(), metadata={op_name=\"a\"}\n"
         "%c = (f32[4,16], /*index=1*/bf16[3,5]) all-reduce(%x, %y), replica_groups=[1,8]<=[8],"
         " to_apply=%add", "all-reduce", 256 + 30, 8),
    ],
)  # fmt: skip
def test_kind_bytes_and_group_of_one(line, kind, size, group):
    assert only(line) == Collective(kind, size, 1, group)


def test_where_a_collective_comes_from_is_told():
    line = "%c = f32[4,16] all-reduce(%x), replica_groups={}, to_apply=%add, metadata={op_name="
    assert only(line + '"jit(f)/dot_general" stack_frame_id=6}').source == "jit(f)/dot_general"


BODY = """
    %body (p: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
      %p = (s32[], f32[4,16]) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      %v = f32[4,16] get-tuple-element(%p), index=1
      %r = f32[4,16] all-reduce(%v), replica_groups={}, to_apply=%add
      ROOT %t = (s32[], f32[4,16]) tuple(%i, %r)
    }

    %until (q: (s32[], f32[4,16])) -> pred[] {
      %q = (s32[], f32[4,16]) parameter(0)
      %j = s32[] get-tuple-element(%q), index=0
      %n = s32[]{:T(128)} constant(5)
      ROOT %lt = pred[] compare(%j, %n), direction=LT
    }

    %outer (p: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
      %p = (s32[], f32[4,16]) parameter(0)
      ROOT %w = (s32[], f32[4,16]) while(%p), condition=%until, body=%body
    }
"""


def loop(body, attributes="", others=BODY):
    return module(
        f"%s = (s32[], f32[4,16]) tuple(%x, %x)\n"
        f"%w = (s32[], f32[4,16]) while(%s), condition=%until, body=%{body}{attributes}",
        others,
    )


def test_a_loop_counts_as_often_as_it_runs():
    told = ', backend_config={"known_trip_count":{"n":"7"}}'
    assert [c.count for c in collectives_of(loop("body", told))] == [7]
    assert [c.count for c in collectives_of(loop("body"))] == [5]  # up to the bound
    assert [c.count for c in collectives_of(loop("outer", told))] == [35]
    unknown = BODY.replace("direction=LT", "direction=NE")
    assert [c.count for c in collectives_of(loop("body", others=unknown))] == [1]


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%none, %one, %two, %one}",
        "true_computation=%two, false_computation=%one",
        "true_computation=%one, false_computation=%two",
    ],
)
def test_of_a_condition_the_branch_counts_that_sends_the_most(branches):
    inner = """
    %none (v: f32[4,16]) -> f32[4,16] {
      ROOT %v = f32[4,16] parameter(0)
    }

    %one (v: f32[4,16]) -> f32[4,16] {
      %v = f32[4,16] parameter(0)
      ROOT %r = f32[4,16] all-to-all(%v), replica_groups=[2,4]<=[8], dimensions={0}
    }

    %two (v: f32[4,16]) -> f32[4,16] {
      %v = f32[4,16] parameter(0)
      ROOT %r = f32[4,16] all-reduce(%v), replica_groups=[2,4]<=[8], to_apply=%add
    }
    """
    both = module(f"%c = f32[4,16] conditional(%x, %x, %x), {branches}", inner)
    assert collectives_of(both) == [Collective("all-reduce", 256, 1, 4)]


def test_asynchronous_calls_count_once():
    inner = """
    %one (v: f32[4,16]) -> f32[4,16] {
      %v = f32[4,16] parameter(0)
      ROOT %r = f32[4,16] all-to-all(%v), replica_groups=[2,4]<=[8], dimensions={0}
    }
    """
    later = module(
        "%s = ((f32[4,16]), f32[4,16], u32[]) async-start(%x), calls=%one\n"
        "%d = f32[4,16] async-done(%s), calls=%one",
        inner,
    )
    assert collectives_of(later) == [Collective("all-to-all", 256, 1, 4)]


def test_fusions_of_a_tpu():
    """One collective in three fusions is one; a sum of which each keeps a slice is a scatter."""
    piece = """
    %%piece_%d (v: f32[4,16]) -> f32[8,16] {
      %%v = f32[4,16] parameter(0)
      ROOT %%g = f32[8,16] all-gather(%%v), channel_id=%d, replica_groups=[4,2]<=[8],\
 dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
    }
    """
    inner = "".join(piece % (number, channel) for number, channel in ((0, 4), (1, 4), (2, 9)))
    inner += """
    %all-reduce-scatter.1 (v: f32[4,16]) -> f32[2,16] {
      %v = f32[4,16] parameter(0)
      %s = f32[4,16] all-reduce(%v), channel_id=5, replica_groups=[4,2]<=[8], to_apply=%add
      ROOT %k = f32[2,16] slice(%s), slice={[0:2], [0:16]}
    }
    """
    lines = [f"%f{n} = f32[8,16] fusion(%x), kind=kCustom, calls=%piece_{n}" for n in range(3)]
    lines.append("%z = f32[2,16] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1")
    assert collectives_of(module("\n".join(lines), inner)) == [
        Collective("all-gather", 512, 1, 2),
        Collective("all-gather", 512, 1, 2),
        Collective("reduce-scatter", 256, 1, 2),
    ]


def test_what_is_sent_and_totals():
    found = [
        Collective("all-reduce", 1000, 3, 4),
        Collective("all-reduce", 80, 1, 8),
        Collective("all-gather", 1000, 1, 4),
        Collective("collective-permute", 64, 2, 8),
    ]
    assert [c.sent for c in found] == [4500, 140, 750, 128]
    assert totals_by_kind(found) == {
        "all-reduce": {"count": 4, "asynchronous": 0, "bytes": 3080, "sent": 4640},
        "all-gather": {"count": 1, "asynchronous": 0, "bytes": 1000, "sent": 750},
        "collective-permute": {"count": 2, "asynchronous": 0, "bytes": 128, "sent": 128},
    }


def test_no_hlo_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled HLO module"):
        collectives_of("module @jit_f {\n}\n")


def test_a_real_program_of_eight_devices():
    """x W1 W2 three times over: columns, then rows, on `tensor`, which need one sum a layer."""
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 4})

    def on(*axes):
        return NamedSharding(mesh, P(*axes))

    def step(first, second, x):
        def layer(x, weights):
            y = jnp.tanh(x @ weights[0]) @ weights[1]
            return jax.lax.with_sharding_constraint(y, on("data")), None

        return jax.lax.scan(layer, x, (first, second))[0]

    shapes = [
        jax.ShapeDtypeStruct((3, 16, 64), jnp.float32, sharding=on(None, None, "tensor")),
        jax.ShapeDtypeStruct((3, 64, 16), jnp.float32, sharding=on(None, "tensor")),
        jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=on("data")),
    ]
    compiled = jax.jit(step, out_shardings=on("data")).lower(*shapes).compile()
    assert collectives_of(compiled.as_text()) == [Collective("all-reduce", 4 * 16 * 4, 3, 4)]
