"""Print a plan in the terminal."""

from collections.abc import Sequence

from mla_moe.config import Recipe
from mla_moe.plan.plan import Plan
from mla_moe.plan.search import flags_of
from mla_moe.plan.stages import TEMPORARIES
from mla_moe.training.console import Console, duration, si


def print_plan(plan: Plan, console: Console) -> None:
    axes = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    title = f"{plan.stage} on {plan.topology}: {plan.devices} devices, {axes}"
    console.startup_table(title, _memory_rows(plan) + _step_rows(plan))
    rows = [
        (f"{t.axes}, {t.kind}", f"{t.count:,.0f} × {gb(t.bytes / t.count)} = {gb(t.bytes)}, {t.seconds * 1e3:,.3g} ms")
        for t in plan.collectives
        if t.bytes > 1e-3 * plan.collectives[0].bytes
    ]
    if rows:
        console.result_table("collectives: bytes sent per device", rows)
    waits = [(f"{s.source or 'unknown line'}, {s.kind}", f"{s.axes} {milliseconds(s.seconds)}") for s in plan.stalls]
    if waits:
        console.result_table("largest waits of the simulated schedule", waits)


def print_ranking(ranked: Sequence[tuple[Recipe, Plan]], console: Console) -> None:
    """One line per variant: its flags for `train.py`, step time, MFU and memory."""
    rows = []
    for recipe, plan in ranked:
        seconds, mfu = plan.simulated_step_seconds, plan.simulated_mfu
        step = f"{seconds:.3g} s, MFU {mfu:.1%}, " if seconds and mfu else ""
        rows.append((flags_of(recipe), f"{step}{gb(plan.bytes)}" + ("" if plan.fits else ": does not fit")))
    console.result_table("best first", rows)


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    verdict = f"{gb(plan.bytes)}; the capacity of a CPU is not known"
    if plan.capacity_bytes is not None:
        verdict = f"{'fits' if plan.fits else 'does NOT fit'}: {gb(plan.bytes)} of {gb(plan.capacity_bytes)}"
    rows = [("HBM per device", verdict), ("  arguments", gb(plan.argument_bytes))]
    rows += [(f"    {kind}", gb(size)) for kind, size in plan.memory.items() if kind not in TEMPORARIES]
    rows += [("  temporaries", gb(plan.temp_bytes))]
    rows += [(f"    {kind}", gb(size)) for kind, size in plan.memory.items() if kind in TEMPORARIES]
    rows += [(f"  {kind}, resident", gb(size)) for kind, size in plan.resident.items()]
    if plan.sampling_bytes:
        rows.append(("  while sampling", gb(plan.sampling_bytes)))
    return rows + ([("compiler", plan.refusal)] if plan.refusal else [])


def _step_rows(plan: Plan) -> list[tuple[str, str]]:
    fraction, with_remat = plan.useful_flops_share, plan.useful_or_recomputed_flops_share
    repeated = f"; {with_remat:.1%} including rematerialisation" if with_remat > fraction else ""
    kinds = ", ".join(f"{kind} {flops / plan.flops:.0%}" for kind, flops in plan.flops_by_kind.items())
    rows = [("FLOPs per device", f"{si(plan.flops)} ({kinds})"), ("  useful", f"{fraction:.1%}{repeated}")]
    if plan.bubble_fraction:
        rows.append(
            ("  pipeline bubble", f"{plan.bubble_fraction:.1%} of the ticks of its {plan.mesh['pipeline']} stages")
        )
    if plan.step_seconds is not None and (mfu := plan.mfu) is not None:
        rows += _simulated_rows(plan)
        terms = [term or 0.0 for term in (plan.compute_seconds, plan.memory_seconds, plan.network_seconds)]
        compute, memory, network = (f"{term * 1e3:,.3g} ms" for term in terms)
        step = f"{plan.step_seconds * 1e3:,.4g} ms = max(compute {compute}, memory {memory}, network {network})"
        total, rate = sum(terms), plan.tokens / plan.step_seconds
        rows += [
            ("step time, full overlap", step),
            ("  without overlap", f"{total * 1e3:,.4g} ms, the sum"),
            ("  tokens/s", f"{si(rate)}, {rate / plan.devices:,.0f} per device"),
            ("  MFU", f"{mfu:.1%}; {mfu * plan.step_seconds / total:.1%} without overlap"),
        ]
    return [*rows, ("compiled in", f"{duration(plan.compile_seconds)}, {gb(plan.compile_memory_bytes)}")]


def _simulated_rows(plan: Plan) -> list[tuple[str, str]]:
    """The forecast from the compiled schedule."""
    seconds, mfu, at_peak = plan.simulated_step_seconds, plan.simulated_mfu, plan.simulated_mfu_at_peak
    if seconds is None or mfu is None or at_peak is None:
        return []
    exposed, rate = plan.exposed_communication_seconds, plan.tokens / seconds
    kinds = sorted(exposed["by_kind"].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{kind} {milliseconds(t)}" for kind, t in kinds if t > 0.01 * exposed["total"])
    return [
        ("step time, simulated", milliseconds(seconds)),
        ("  exposed communication", f"{milliseconds(exposed['total'])}, {exposed['total'] / seconds:.1%} ({parts})"),
        ("  tokens/s", f"{si(rate)}, {rate / plan.devices:,.0f} per device"),
        ("  MFU", f"{mfu:.1%}; {at_peak:.1%} with matrix products at the peak"),
    ]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.4g} ms"


def gb(size: float) -> str:
    """Decimal gigabytes (10⁹ bytes), as in data sheets."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
