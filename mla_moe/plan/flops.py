"""FLOPs of a traced function: its matrix products, each as often as it runs.

Elementwise work is not counted: it takes time, but not the matrix units'. Kernels written in Pallas are black boxes to
XLA, so theirs come from formulas. What lies outside a `shard_map` is taken as evenly split over all devices.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval


@dataclass(frozen=True)
class ExpectedRouting:
    """What depends on the data, as expected of an even routing."""

    rounds: float = 1.0
    """Runs of an expert exchange's loop."""
    rows: float | None = None
    """Rows of a device's experts in one run, padding included; None takes the whole buffer."""
    experts: float | None = None
    """Experts of a device that some token chose; None takes all."""
    blocks: float = 1.0
    """Blocks of keys that a block of queries looks at, where a loop goes over them."""


def count_flops(
    closed: ClosedJaxpr, devices: int = 1, expected: ExpectedRouting = ExpectedRouting()
) -> dict[str, float]:
    """FLOPs of one device: `products`, and `attention` and `experts` of Pallas kernels."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    total: dict[str, float] = defaultdict(float)
    _count(jaxpr, 1 / devices, False, expected, total)
    return dict(total)


def _count(jaxpr: Any, times: float, inside: bool, expected: ExpectedRouting, total: dict[str, float]) -> None:
    """Add to `total`; `inside` says whether a loop is around."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total["products"] += times * 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        elif name in ("ragged_dot", "ragged_dot_general"):
            rows, depth = eqn.invars[0].aval.shape
            total["products"] += times * 2 * (expected.rows or rows) * depth * eqn.outvars[0].aval.shape[-1]
        elif name == "pallas_call":
            kind, flops = _kernel(eqn, expected)
            total[kind] += times * flops
        elif name == "scan":
            length = eqn.params["length"]
            _count(eqn.params["jaxpr"].jaxpr, times * length, True, expected, total)
        elif name == "while":
            body = eqn.params["body_jaxpr"].jaxpr
            _count(body, times * _trips(body, inside, expected), inside, expected, total)
        elif name == "cond":
            branches: list[dict[str, float]] = []
            for branch in eqn.params["branches"]:
                branches.append(defaultdict(float))
                _count(branch.jaxpr, times, inside, expected, branches[-1])
            for kind, flops in max(branches, key=lambda counted: sum(counted.values())).items():
                total[kind] += flops
        elif name == "shard_map":
            mesh = eqn.params["mesh"]
            _count(eqn.params["jaxpr"], times * mesh.size, inside, expected, total)
        else:
            for inner in _inner(eqn):
                _count(inner, times, inside, expected, total)


def _inner(eqn) -> Iterator[Any]:
    """The one function that a call, a checkpoint or a custom derivative runs."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            inner = eqn.params[key]
            yield inner.jaxpr if hasattr(inner, "jaxpr") else inner
            return


def _trips(body, inside: bool, expected: ExpectedRouting) -> float:
    """How often a loop runs whose end is not in its type: an exchange's, within a layer attention's, which has an
    exponential, or one over chunks of experts' rows, and the outermost one, which takes decode steps and is counted
    once."""
    names = set(_names(body))
    if any("all_to_all" in name for name in names):
        return expected.rounds
    if not inside:
        return 1.0
    if "exp" in names or expected.rows is None:
        return expected.blocks
    product = next((eqn for eqn in body.eqns if eqn.primitive.name == "dot_general"), None)
    return expected.blocks if product is None else expected.rows / math.prod(product.invars[0].aval.shape[:2])


def _names(jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in _inner(eqn):
            yield from _names(inner)


def _kernel(eqn, expected: ExpectedRouting) -> tuple[str, float]:
    """What a Pallas kernel is for, and its FLOPs."""
    name = str(eqn.params.get("name") or "")
    shapes = [v.aval.shape for v in eqn.invars if hasattr(v.aval, "shape")]
    if name.startswith("splash_mha"):
        floats = [v.aval for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
        q, _, v = [x.shape for x in floats if len(x.shape) > 2][:3]  # one sequence alone has no axis for it
        *rows, T, A = q
        V = v[-1]
        # Forward: scores and values. Derivative: scores again, the weights' gradient, and those of q, k and v.
        depth = 3 * A + 2 * V if "dkv" in name else A + V
        block = next((size for size in (512, 256, 128) if T % size == 0), T)
        return "attention", 2 * math.prod(rows) * T * (T + block) / 2 * depth
    estimate = eqn.params.get("cost_estimate")
    if estimate is None:
        raise NotImplementedError(f"no formula for the kernel {name!r}")
    rows = next(shape for shape in shapes if len(shape) == 2)[0]
    return "experts", estimate.flops * (expected.rows or rows) / rows
