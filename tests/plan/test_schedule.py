"""The simulated schedule of hand-made programs whose schedule is known."""

import math
import re

import jax
import pytest
from jax.sharding import Mesh

from mla_moe.parallel.accelerators import Accelerator
from mla_moe.plan.costs import collective_traffic
from mla_moe.plan.flops import ExpectedRouting
from mla_moe.plan.hlo import HloModule
from mla_moe.plan.instruction_flops import products
from mla_moe.plan.schedule import Simulation, simulate
from mla_moe.plan.topology import Topology

HEADER = """HloModule hand_made, is_scheduled=true

FileNames
1 "mine/model.py"
2 "site-packages/jax/lax.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=99 end_line=99 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

"""
AT = 'replica_groups={{0,1,2,3}}, metadata={op_name="f" stack_frame_id=2}'
DOT = "f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"  # 1,024 FLOPs, 768 bytes
GATHER = "(f32[16]{0}, f32[64]{0}) all-gather-start(%x), " + AT  # sends 192 bytes
ENTRY = """ENTRY %main (a: f32[8,16], b: f32[16,4], x: f32[16]) -> f32[64] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %x = f32[16]{0} parameter(2)
"""


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def device(*, flops: float = math.inf, memory: float = math.inf, link: float = math.inf) -> Topology:
    """Four GPUs of the given speeds; what is infinitely fast takes no time."""
    speeds = float(memory), float(link), float(link)
    return Topology("test", "cuda", jax.devices(), Accelerator((), float(flops), 1e9, *speeds))


def run(mesh: Mesh, topology: Topology, *lines: str, before: str = "") -> Simulation:
    text = HEADER + before + ENTRY + "\n".join(f"  {line}" for line in lines) + "\n}\n"
    return simulate(HloModule(text), mesh, topology, ExpectedRouting(), at_peak=True)


def test_without_overlap_it_is_the_sum_of_the_bounds(mesh: Mesh) -> None:
    lines = (f"%d = {DOT}", f"%g = f32[64]{{0}} all-gather(%x), {AT}", "%n = f32[64]{0} negate(%g)")
    module = HloModule(HEADER + ENTRY + "\n".join(f"  {line}" for line in lines) + "\n}\n")
    topology = device(flops=512, link=64)
    (traffic,) = collective_traffic(module.collectives(), mesh, topology, 1.0)
    found = run(mesh, topology, *lines)
    assert found.step_seconds == 1024 / 512 + traffic.seconds
    assert traffic.seconds == 192 / 64
    assert found.exposed_communication == {"total": 3, "by_kind": {"all-gather": 3}, "by_axes": {"b": 3}}
    assert found.stalls == [("all-gather", "b", "model.py:7", 3)]
    by_memory = run(mesh, device(memory=32), *lines)
    assert by_memory.step_seconds == by_memory.memory_seconds == module.memory_traffic() / 32


@pytest.mark.parametrize(("link", "exposed"), [(64, 1.0), (96, 0.0), (960, 0.0)])
def test_a_pair_overlaps_what_is_scheduled_between(mesh: Mesh, link: float, exposed: float) -> None:
    lines = f"%s = {GATHER}", f"%d = {DOT}", "%g = f32[64]{0} all-gather-done(%s)"
    found = run(mesh, device(flops=512, link=link), *lines)
    assert found.step_seconds == 2 + exposed
    assert found.exposed_communication["total"] == exposed


def test_transfers_queue_for_their_links(mesh: Mesh) -> None:
    second = GATHER.replace("(%x)", "(%x), channel_id=2")
    lines = f"%s = {GATHER}", f"%t = {second}", f"%d = {DOT}", "%u = f32[64]{0} all-gather-done(%t)"
    found = run(mesh, device(flops=512, link=64), *lines, "%g = f32[64]{0} all-gather-done(%s)")
    assert found.step_seconds == 2 * 3


LOOP = """%body (p: (s32[], f32[8,16], f32[16,4], f32[16])) -> (s32[], f32[8,16], f32[16,4], f32[16]) {
  %p = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}, f32[16]{0}) parameter(0)
  %a = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %b = f32[16,4]{1,0} get-tuple-element(%p), index=2
  %x = f32[16]{0} get-tuple-element(%p), index=3
  %first = f32[64]{0} all-gather(%x), REPLICAS
  %s = GATHER
  %d = DOT
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}, f32[16]{0}) tuple(%p)
}

"""


def test_later_iterations_of_a_loop_meet_the_traffic_of_the_one_before(mesh: Mesh) -> None:
    """Each waits for 3 s; then a transfer of 3 s runs beside a product of 2 s, and the next iteration waits for it."""
    before = LOOP.replace("REPLICAS", AT).replace("GATHER", GATHER).replace("DOT", DOT)
    loop = 'while(%a), condition=%none, body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    found = run(mesh, device(flops=512, link=64), f"%w = (s32[], f32[8,16]{{1,0}}) {loop}", before=before)
    assert found.step_seconds == 5 * (3 + 2) + 4 * 1
    assert found.compute_seconds == 5 * 2


def test_copies_take_the_memory_bandwidth_that_is_left(mesh: Mesh) -> None:
    copy = "(f32[8,16]{1,0:S(1)}, f32[8,16]{1,0}, u32[]{:S(2)}) copy-start(%a)"  # 512 bytes
    lines = f"%s = {copy}", f"%d = {DOT}", "%c = f32[8,16]{1,0:S(1)} copy-done(%s)"
    # The product takes 4 s, and the memory for 2 of them (896 bytes), in which the copy does not advance.
    found = run(mesh, device(flops=256, memory=448), *lines)
    traffic = 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert traffic == 896
    assert found.step_seconds == 4
    slower = run(
        mesh, device(flops=256, memory=224), *lines
    )  # the product takes 4 s of memory, the copy all of its own
    assert slower.step_seconds == pytest.approx(4 + 512 / 224)
    assert slower.stalls == [("copy", "", "", pytest.approx(512 / 224))]
    assert slower.exposed_communication["total"] == 0


@pytest.mark.parametrize("copy", ["copy", "fusion"])  # the second is XLA:GPU's, of slices
def test_a_copy_is_waited_for_alone_even_if_the_next_one_is_alike(mesh: Mesh, copy: str) -> None:
    start = f"(f32[8,16]{{1,0:S(1)}}, f32[8,16]{{1,0}}, u32[]{{:S(2)}}) {copy}-start(%a), calls=%copied"  # 512 bytes
    before = "%copied (p: f32[8,16]) -> f32[8,16] {\n  %p = f32[8,16]{1,0} parameter(0)\n"
    before += "  ROOT %n = f32[8,16]{1,0:S(1)} negate(%p)\n}\n"
    done = "f32[8,16]{1,0:S(1)} " + copy + "-done"
    lines = f"%s = {start}", f"%t = {start}", f"%c = {done}(%s)", f"%d = {DOT}", f"%e = {done}(%t)"
    found = run(mesh, device(flops=512, memory=1024), *lines, before=before)
    assert found.step_seconds == 0.5 + 2  # the second copy runs beside the product, which needs the memory for 0.875 s


SPARSECORE = """%offloaded (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  ROOT %n = f32[16]{0} negate(%p)
}

"""


def test_a_computation_for_the_sparsecore_runs_beside_the_core(mesh: Mesh) -> None:
    start = '((f32[16]{0}), f32[16]{0}, u32[]) async-start(%x), async_execution_thread="sparsecore", calls=%offloaded'
    lines = f"%s = {start}", f"%d = {DOT}", "%o = f32[16]{0} async-done(%s)"
    found = run(mesh, device(flops=512, memory=32), *lines, before=SPARSECORE)
    assert found.step_seconds == 896 / 32  # of the product; the SparseCore's 4 s are hidden
    alone = run(mesh, device(memory=32), lines[0], lines[2], before=SPARSECORE)
    assert alone.step_seconds == 4
    assert alone.stalls == [("sparsecore", "", "", 4)]


ASYNC_FUSION = """%start (p: f32[16]) -> (f32[16], f32[64], u32[]) {
  %p = f32[16]{0} parameter(0)
  %g = f32[64]{0} all-gather(%p), CHAIN{"flag_start":"-1","flag_end":"-1"}}
  ROOT %c = (f32[16]{0}, f32[64]{0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%step (p: f32[16], q: f32[64], a: f32[8,16], b: f32[16,4]) -> (f32[8,4], f32[64], f32[64]) {
  %p = f32[16]{0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %a = f32[8,16]{1,0} parameter(2)
  %b = f32[16,4]{1,0} parameter(3)
  %d = DOT
  %g = f32[64]{0} all-gather(%p), CHAIN{"flag_start":"2","flag_end":"8"}}
  ROOT %t = (f32[8,4]{1,0}, f32[64]{0}, f32[64]{0}) tuple(%d, %q, %g)
}
%done (p: f32[16], q: f32[64]) -> f32[64] {
  %p = f32[16]{0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %g = f32[64]{0} all-gather(%p), CHAIN{"flag_start":"2","flag_end":"8"}}
  ROOT %c = f32[64]{0} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}

"""
CHAIN = AT + ', channel_id=9, frontend_attributes={chain_id="6"}, backend_config={"async_collective_fusion_config":'


def test_async_collective_fusions_advance_in_the_fusions_that_carry_them(mesh: Mesh) -> None:
    before = ASYNC_FUSION.replace("CHAIN", CHAIN).replace("DOT", DOT)
    started = "%s = (f32[16]{0}, f32[64]{0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start"
    carrier = "%c = (f32[8,4]{1,0}, f32[64]{0}, f32[64]{0}) fusion(%x, %s, %a, %b), kind=kOutput, calls=%step"
    done = "%e = f32[64]{0} fusion(%x, %c), kind=kCustom, calls=%done"
    found = run(mesh, device(flops=512, link=64), started, f"%d = {DOT}", carrier, done, before=before)
    assert found.step_seconds == 2 + 2 + 1  # of the transfer's 3 s, 2 are hidden by the carrier, none by %d
    assert found.network_seconds == 3  # counted once
    # The arrays of the transfer count as memory traffic once; the carrier's own are those of its product.
    text = HEADER + before + ENTRY + f"  {started}\n  {carrier}\n  {done}\n}}\n"
    assert HloModule(text).memory_traffic() == 4 * (16 + 16 + 64) + 896


@pytest.mark.parametrize(
    ("attributes", "lhs", "rhs", "out", "flops"),
    [
        ("dim_labels=bf_io->bf", "[32,64]", "[64,8]", "[32,8]", 2 * 32 * 64 * 8),
        # Heads (128) as a spatial axis of a window as wide as the axis, which the padding lets slide over it.
        (
            "window={size=1x128 pad=0_0x127_127 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            "[4,64,512,1]", "[512,128,256,1]", "[4,64,128,256]", 2 * 4 * 64 * 512 * 128 * 256,
        ),
        # A contracted spatial axis.
        ("window={size=1x128}, dim_labels=0b1f_1io0->0bf1", "[4,64,128,32]", "[128,32,7168,1]", "[4,64,7168,1]",
         2 * 4 * 64 * 128 * 32 * 7168),
        # A batch axis: each output position meets one element of the dilated array.
        ("window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf", "[16,8,32]", "[16,32,4]", "[16,8,4]",
         2 * 16 * 8 * 32 * 4),
    ],
)  # fmt: skip
def test_flops_of_convolutions(attributes: str, lhs: str, rhs: str, out: str, flops: float) -> None:
    lines = (
        f"ENTRY %main (a: bf16{lhs}, b: bf16{rhs}) -> bf16{out} {{",
        f"  %a = bf16{lhs} parameter(0)",
        f"  %b = bf16{rhs} parameter(1)",
        f"  ROOT %c = bf16{out} convolution(%a, %b), {attributes}",
        "}",
    )
    module = HloModule("\n".join(lines))
    main = module.computations["main"]
    (product,) = products(module, main, main.root, ExpectedRouting(), 128)
    assert product.flops == flops
    assert 0 < product.tile_fraction <= 1


KERNELS = """ENTRY %main (q: bf16[2,512,4,192], v: bf16[2,512,4,128], x: bf16[64,8], w: bf16[4,8,16]) -> bf16[64,16] {
  %q = bf16[2,512,4,192] parameter(0)
  %v = bf16[2,512,4,128] parameter(1)
  %x = bf16[64,8] parameter(2)
  %w = bf16[4,8,16] parameter(3)
  %y = (bf16[2,512,4,128], f32[2,4,512], f32[2,4,512]) custom-call(%q, %q, %v), SCOPE(_flash_attention)/kernel"}
  %gq = bf16[2,512,4,192] custom-call(%q, %q, %v, %v), SCOPE(_flash_attention_gradient)/kernel"}
  %gkv = (bf16[2,512,4,192], bf16[2,512,4,128]) custom-call(%q, %q, %v), SCOPE(_flash_attention_gradient)/kernel"}
  ROOT %g = bf16[64,16] custom-call(%x, %w), SCOPE(_ragged_dot)/jit(_where)/kernel"}
}
"""


def test_flops_of_kernels_for_gpus() -> None:
    """They are custom calls, recognised by the jitted functions of `ops.tokamax_kernels` in their scope."""
    text = KERNELS.replace("SCOPE", 'custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/jit')
    module, expected = HloModule(text), ExpectedRouting(expert_rows=32)
    main = module.computations["main"]
    found = [(p.kind, p.flops) for i in main.instructions.values() for p in products(module, main, i, expected, 128)]
    pairs, A, V = 2 * 4 * 512 * (512 + 128) / 2, 192, 128
    depths = A + V, 2 * A + V, 2 * A + 2 * V
    assert found == [*(("attention", 2 * pairs * depth) for depth in depths), ("experts", 2 * 32 * 8 * 16)]


@pytest.mark.parametrize("estimate", ['"flops":"256","bytes_accessed":"9"', '"bytes_accessed":"9","flops":"256"'])
def test_flops_of_a_kernel_for_tpus_by_its_own_estimate(estimate: str) -> None:
    """The order of its fields is that of the compiler's version."""
    call = f'custom_call_target="tpu_custom_call", backend_config={{"cost_estimate":{{{estimate}}}}}'
    text = "ENTRY %main (x: bf16[64,8]) -> bf16[64,16] {\n  %x = bf16[64,8] parameter(0)\n"
    text += f"  ROOT %gmm.6 = bf16[64,16] custom-call(%x), {call}\n}}"
    module = HloModule(text)
    main = module.computations["main"]
    (product,) = products(module, main, main.root, ExpectedRouting(expert_rows=32), 128)
    assert (product.kind, product.flops) == ("experts", 256 * 32 / 64)


def test_small_products_leave_a_part_of_the_matrix_unit_unused(mesh: Mesh) -> None:
    text = HEADER + ENTRY + f"  %d = {DOT}\n}}\n"
    topology = device(flops=512)
    forecast = simulate(HloModule(text), mesh, topology, ExpectedRouting())
    # Its depth of 16 and its 8 rows fill a 128 x 128 unit by 1/8 and 1/16.
    assert forecast.step_seconds == pytest.approx(1024 / (512 * 0.85 * (16 / 128) * (8 / 128)))
    assert forecast.flops == 1024


def test_source_lines_skip_installed_packages() -> None:
    module = HloModule(HEADER + ENTRY + f"  %g = f32[64]{{0}} all-gather(%x), {AT}\n}}\n")
    instruction = module.computations["main"].instructions["g"]
    assert re.fullmatch(r"model\.py:7", module.source(instruction))
