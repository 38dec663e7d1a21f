"""Collectives and memory traffic of compiled programs in which they are known."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.plan.costs import group_axes
from mla_moe.plan.hlo import HloModule, first_group


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def hlo_text(f: Callable[[jax.Array], jax.Array], mesh: Mesh, *specs: P) -> str:
    x = [jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
    return jax.jit(f).lower(*x).compile().as_text()


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(mesh: Mesh) -> None:
    def local(x: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x + jax.lax.psum(x, "b"), None

        return jax.lax.scan(body, x, None, length=7)[0]

    program = HloModule(
        hlo_text(jax.shard_map(local, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b")), mesh, P("a", "b"))
    )
    (found,) = program.collectives()
    assert (found.kind, found.runs, found.size) == ("all-reduce", 7, 4 * 4 * 4)
    assert group_axes(found.group, mesh) == "b"
    assert found.sent == 2 * 3 / 4 * found.size


def test_a_loop_without_a_known_trip_count_takes_the_expected_one(mesh: Mesh) -> None:
    def local(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(
            lambda x: jax.lax.psum(x.sum(), ("a", "b")) < 100, lambda x: jax.lax.pmax(x, "a") + 1, x
        )

    f = jax.shard_map(local, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False)
    program = HloModule(hlo_text(f, mesh, P("a", "b")), lambda scope: 3.0)
    (inside,) = [c for c in program.collectives() if group_axes(c.group, mesh) == "a"]
    assert inside.runs == 3


def test_bytes_of_all_gather_and_reduce_scatter(mesh: Mesh) -> None:
    def local(x: jax.Array) -> jax.Array:
        full = jax.lax.all_gather(x, "b", axis=1, tiled=True)
        return jax.lax.psum_scatter(full * full, "b", scatter_dimension=1, tiled=True)

    f = jax.shard_map(local, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False)
    sent = {c.kind: c.sent for c in HloModule(hlo_text(f, mesh, P("a", "b"))).collectives()}
    full = 4 * 16 * 4
    assert sent == {"all-gather": 3 / 4 * full, "reduce-scatter": 3 / 4 * full}


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", (0, 2, 4, 6)),
        ("source_target_pairs={{0,4},{4,0}}", (0, 4)),
        ("source_target_pairs={{0,0},{1,5},{5,1}}, metadata={}", (1, 5)),
    ],
)
def test_device_groups_in_every_notation(text: str, group: tuple[int, ...]) -> None:
    assert first_group(text) == group


NESTED_SLICE = """
%sliced (a: f32[64,8], i: s32[]) -> f32[2,8] {
  %a = f32[64,8] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[2,8] dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={2,8}
}

%outer (b: f32[64,8], j: s32[]) -> f32[2,8] {
  %b = f32[64,8] parameter(0)
  %j = s32[] parameter(1)
  %taken = f32[2,8] fusion(%b, %j), kind=kLoop, calls=%sliced
  ROOT %negated = f32[2,8] negate(%taken)
}

ENTRY %main (c: f32[64,8], k: s32[]) -> f32[2,8] {
  %c = f32[64,8] parameter(0)
  %k = s32[] parameter(1)
  ROOT %all = f32[2,8] fusion(%c, %k), kind=kLoop, calls=%outer
}
"""


def test_a_slice_in_a_nested_fusion_reads_only_the_slice() -> None:
    assert HloModule(NESTED_SLICE).memory_traffic() == 2 * (2 * 8 * 4) + 4


OTHER_LAYOUT = """
%layout (a: bf16[64,8,4]) -> bf16[64,8,4] {
  %a = bf16[64,8,4] parameter(0)
  ROOT %copied = bf16[64,8,4] copy(%a)
}

%saved (b: bf16[64,8,4], i: s32[], x: bf16[1,8,4]) -> bf16[64,8,4] {
  %b = bf16[64,8,4] parameter(0)
  %stack = bf16[64,8,4] fusion(%b), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%layout
  %i = s32[] parameter(1)
  %x = bf16[1,8,4] parameter(2)
  %zero = s32[] constant(0)
  ROOT %updated = bf16[64,8,4] dynamic-update-slice(%stack, %x, %i, %zero, %zero)
}

%read (c: bf16[64,8,4], j: s32[]) -> bf16[1,8,4] {
  %c = bf16[64,8,4] parameter(0)
  %stack = bf16[64,8,4] fusion(%c), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%layout
  %j = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,8,4] dynamic-slice(%stack, %j, %zero, %zero), dynamic_slice_sizes={1,8,4}
}

ENTRY %main (d: bf16[64,8,4], k: s32[], y: bf16[1,8,4]) -> bf16[1,8,4] {
  %d = bf16[64,8,4] parameter(0)
  %k = s32[] parameter(1)
  %y = bf16[1,8,4] parameter(2)
  %written = bf16[64,8,4] fusion(%d, %k, %y), kind=kLoop, calls=%saved
  ROOT %taken = bf16[1,8,4] fusion(%written, %k), kind=kLoop, calls=%read
}
"""


def test_a_slice_of_a_stack_in_another_layout_moves_only_the_slice() -> None:
    """As XLA:TPU saves layer inputs on TPU7x, and reads them."""
    assert HloModule(OTHER_LAYOUT).memory_traffic() == 2 * (2 * 8 * 4 * 2 + 4)  # and the index


GROUPED = """
ENTRY %main (x: bf16[32,8], w: bf16[12,8,16]) -> bf16[32,16] {
  %x = bf16[32,8] parameter(0)
  %w = bf16[12,8,16] parameter(1)
  ROOT %gmm = bf16[32,16] custom-call(%x, %w), metadata={op_name="mlp/experts/gmm"}
}
"""


ASYNC_SLICE = """
%sliced (p0: f32[64,8,4], p1: s32[]) -> f32[1,4,8] {
  %p0 = f32[64,8,4]{1,2,0} parameter(0)
  %turned = f32[64,4,8]{2,1,0} bitcast(%p0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,4,8]{2,1,0} dynamic-slice(%turned, %p1, %zero, %zero), dynamic_slice_sizes={1,4,8}
}

ENTRY %main (a: f32[64,8,4], i: s32[]) -> f32[1,4,8] {
  %a = f32[64,8,4]{1,2,0} parameter(0)
  %i = s32[] parameter(1)
  %start = ((f32[64,8,4]{1,2,0}, s32[]), f32[1,4,8]{2,1,0}, u32[]) fusion-start(%a, %i), kind=kLoop, calls=%sliced
  ROOT %done = f32[1,4,8]{2,1,0} fusion-done(%start)
}
"""


def test_an_asynchronous_slice_reads_and_writes_only_the_slice() -> None:
    """As XLA:GPU takes a layer's weights out of their stack."""
    assert HloModule(ASYNC_SLICE).memory_traffic() == 2 * 4 * 8 * 4 + 4  # and the index


def test_a_grouped_matmul_reads_only_the_active_experts() -> None:
    rows = 2 * 32 * (8 + 16)
    assert HloModule(GROUPED).memory_traffic() == rows + 2 * 12 * 8 * 16
    assert HloModule(GROUPED, active_experts=3).memory_traffic() == rows + 2 * 3 * 8 * 16


def test_memory_traffic_is_operands_and_results() -> None:
    text = jax.jit(lambda x: jnp.tanh(x) + 1).lower(jax.ShapeDtypeStruct((1024, 8), jnp.float32)).compile().as_text()
    assert HloModule(text).memory_traffic() == 2 * 1024 * 8 * 4


def test_tuple_elements_as_operands() -> None:
    """In the notation of the TPU compiler of jax 0.12."""
    arrays = "(f32[4]{0}, (s32[]{:T(128)}, /*index=2*/bf16[8,2]{1,0:T(8,128)(2,1)S(1)}), bf16[16]{0})"
    lines = (
        "ENTRY %main (p: f32[4]) -> bf16[16] {",
        f"  %p = {arrays} parameter(0)",
        "  %near = bf16[8,2]{1,0} copy(%p#1#1)",
        "  ROOT %far = bf16[16]{0} copy(%p#2), metadata={}",
        "}",
    )
    program = HloModule("\n".join(lines))
    assert program.computations["main"].instructions["p#1#1"].type == "bf16[8,2]{1,0:T(8,128)(2,1)S(1)}"
    assert program.memory_traffic() == 2 * 16 + 2 * 2 * 16  # the first is read from another memory space


def test_asynchronous_collectives() -> None:
    """As the GPU compiler writes them: operands and results in one type, several arrays, and a called computation."""
    lines = (
        "%scattered (p: f32[64]) -> f32[16] {",
        "  %p = f32[64]{0} parameter(0)",
        "  ROOT %inside = f32[16]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}",
        "}",
        "ENTRY %main (a: f32[64], b: bf16[8]) -> f32[16] {",
        "  %a = f32[64]{0} parameter(0)",
        "  %b = bf16[8]{0} parameter(1)",
        "  %s = ((f32[64]{0}), f32[16]{0}) reduce-scatter-start(%a), replica_groups={{0,1,2,3}}, calls=%scattered",
        "  %g = ((bf16[8]{0}, f32[64]{0}), (bf16[32]{0}, f32[256]{0})) all-gather-start(%b, %a), "
        "replica_groups={{0,1,2,3}}",
        "  %r = (f32[64]{0}, bf16[8]{0}) all-reduce-start(%a, %b), replica_groups={{0,1,2,3}}",
        "  ROOT %done = f32[16]{0} reduce-scatter-done(%s)",
        "}",
    )
    sizes = {c.kind: c.size for c in HloModule("\n".join(lines)).collectives()}
    assert sizes == {"reduce-scatter": 64 * 4, "all-gather": 32 * 2 + 256 * 4, "all-reduce": 64 * 4 + 8 * 2}
    assert len(HloModule("\n".join(lines)).collectives()) == 3
