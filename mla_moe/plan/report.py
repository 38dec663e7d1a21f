"""A plan as a person reads it."""

from collections.abc import Sequence

from mla_moe.config import Recipe
from mla_moe.plan.plan import Plan
from mla_moe.plan.search import describe
from mla_moe.training.console import Console, duration, si


def show(plan: Plan, console: Console) -> None:
    axes = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    title = f"{plan.stage} on {plan.topology}: {plan.devices} devices, {axes}"
    console.startup_table(title, _memory(plan) + _work(plan))
    if plan.collectives:
        console.result_table("sent by a device: axis, kind", _network(plan))


def show_ranking(ranked: Sequence[tuple[Recipe, Plan]], console: Console) -> None:
    """Flags of `train.py`, and what they give."""
    rows = []
    for recipe, plan in ranked:
        need = gb(plan.bytes)
        step = f"{plan.step_seconds:.3g} s, MFU {plan.mfu:.1%}, " if plan.step_seconds and plan.mfu else ""
        rows.append((describe(recipe), f"{step}{need}" + ("" if plan.fits else ": does not fit")))
    console.result_table("best first", rows)


def _memory(plan: Plan) -> list[tuple[str, str]]:
    verdict = "fits" if plan.fits else "does NOT fit"
    if plan.capacity_bytes is None:
        verdict = f"{gb(plan.bytes)}; a CPU's capacity is its machine's"
    else:
        verdict += f": {gb(plan.bytes)} of {gb(plan.capacity_bytes)}"
    rows = [("memory", verdict), ("  arguments", gb(plan.argument_bytes))]
    during = ("gradients", "layer inputs")
    rows += [(f"    {kind}", gb(size)) for kind, size in plan.memory.items() if kind not in during]
    rows += [("  temporaries", gb(plan.temp_bytes))]
    known = {kind: size for kind, size in plan.memory.items() if kind in during}
    rows += [(f"    {kind}, alone", gb(size)) for kind, size in known.items()]
    rows += [(f"  {kind}, beside it", gb(size)) for kind, size in plan.held.items()]
    if plan.sampling_bytes:
        rows.append(("  while sampling", gb(plan.sampling_bytes)))
    return rows + ([("compiler", plan.refusal)] if plan.refusal else [])


def _work(plan: Plan) -> list[tuple[str, str]]:
    share, with_remat = plan.useful_flops_share, plan.useful_or_recomputed_flops_share
    useful = f"{share:.1%}"
    if with_remat > share:
        useful += f"; {with_remat:.1%} with what rematerialisation repeats"
    kinds = ", ".join(f"{kind} {flops / plan.flops:.0%}" for kind, flops in plan.flops_by_kind.items())
    rows = [("FLOPs", f"{si(plan.flops)} ({kinds})"), ("  useful", useful)]
    if plan.step_seconds is not None and (mfu := plan.mfu) is not None:
        assert plan.compute_seconds is not None
        assert plan.memory_seconds is not None
        assert plan.network_seconds is not None
        terms = plan.compute_seconds, plan.memory_seconds, plan.network_seconds
        compute, memory, network = (f"{term * 1e3:,.3g} ms" for term in terms)
        apart, rate = sum(terms), plan.tokens / plan.step_seconds
        rows += [
            ("step", f"{plan.step_seconds * 1e3:,.4g} ms = max(compute {compute}, memory {memory}, network {network})"),
            ("  nothing overlaps", f"{apart * 1e3:,.4g} ms, the sum"),
            ("  tokens/s", f"{si(rate)}, {rate / plan.devices:,.0f} a device"),
            ("  MFU", f"{mfu:.1%}; {mfu * plan.step_seconds / apart:.1%} if nothing overlaps"),
        ]
    return [*rows, ("compiled in", f"{duration(plan.compile_seconds)}, {gb(plan.compile_memory_bytes)}")]


def _network(plan: Plan) -> list[tuple[str, str]]:
    return [
        (f"{t.axes}, {t.kind}", f"{t.count:,.0f} × {gb(t.bytes / t.count)} = {gb(t.bytes)}, {t.seconds * 1e3:,.3g} ms")
        for t in plan.collectives
        if t.bytes > 1e-3 * plan.collectives[0].bytes
    ]


def gb(size: float) -> str:
    """Decimal, as memory is sold."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
