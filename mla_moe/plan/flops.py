"""FLOPs of a traced function: its matrix products, each as often as it runs.

Elementwise operations are not counted: they do not use the matrix units. XLA does not see into Pallas kernels, so their
FLOPs come from formulas. Work outside of a `shard_map` is taken as evenly divided over all devices.
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
    """Quantities that depend on the data, as expected of an even routing."""

    num_chunks: float = 1.0
    """Chunks of the token dispatch of expert parallelism."""
    expert_rows: float | None = None
    """Rows of a device's grouped matmul in one chunk, padding included; None takes the full buffer."""
    active_experts: float | None = None
    """Experts of a device that at least one token selected; None takes all."""
    key_blocks: float = 1.0
    """Blocks of keys per block of queries, where attention loops over them."""


def count_flops(
    closed: ClosedJaxpr, devices: int = 1, expected: ExpectedRouting = ExpectedRouting()
) -> dict[str, float]:
    """FLOPs of one device by kind: `matmul`, and `attention` and `experts` of Pallas kernels. Raises
    `NotImplementedError` for a kernel without a formula."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    total: dict[str, float] = defaultdict(float)
    _count(jaxpr, 1 / devices, False, expected, total)
    return dict(total)


def _count(jaxpr: Any, runs: float, in_loop: bool, expected: ExpectedRouting, total: dict[str, float]) -> None:
    """Add the FLOPs of a jaxpr that runs so often to `total`."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total["matmul"] += runs * 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        elif name in ("ragged_dot", "ragged_dot_general"):
            rows, depth = eqn.invars[0].aval.shape
            total["matmul"] += runs * 2 * (expected.expert_rows or rows) * depth * eqn.outvars[0].aval.shape[-1]
        elif name == "pallas_call":
            kind, flops = _kernel_flops(eqn, expected)
            total[kind] += runs * flops
        elif name == "scan":
            length = eqn.params["length"]
            _count(eqn.params["jaxpr"].jaxpr, runs * length, True, expected, total)
        elif name == "while":
            body = eqn.params["body_jaxpr"].jaxpr
            _count(body, runs * _expected_trips(body, in_loop, expected), in_loop, expected, total)
        elif name == "cond":
            branches: list[dict[str, float]] = []
            for branch in eqn.params["branches"]:
                branches.append(defaultdict(float))
                _count(branch.jaxpr, runs, in_loop, expected, branches[-1])
            for kind, flops in max(branches, key=lambda counted: sum(counted.values())).items():
                total[kind] += flops
        elif name == "shard_map":
            mesh = eqn.params["mesh"]
            _count(eqn.params["jaxpr"], runs * mesh.size, in_loop, expected, total)
        else:
            for inner in _inner_jaxpr(eqn):
                _count(inner, runs, in_loop, expected, total)


def _inner_jaxpr(eqn: Any) -> Iterator[Any]:
    """The function that a call, a checkpoint or a custom derivative runs, if there is one."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            inner = eqn.params[key]
            yield inner.jaxpr if hasattr(inner, "jaxpr") else inner
            return


def _expected_trips(body: Any, in_loop: bool, expected: ExpectedRouting) -> float:
    """Trips of a while loop, which has no static trip count. It is recognised by its body: token dispatch has an
    all-to-all; within a layer, attention has an exponential, a grouped matmul on CPU loops over blocks of rows; the
    outermost loop runs decode steps, of which one is counted."""
    names = set(_primitive_names(body))
    if any("all_to_all" in name for name in names):
        return expected.num_chunks
    if not in_loop:
        return 1.0
    if "exp" in names or expected.expert_rows is None:
        return expected.key_blocks
    product = next((eqn for eqn in body.eqns if eqn.primitive.name == "dot_general"), None)
    if product is None:
        return expected.key_blocks
    return expected.expert_rows / math.prod(product.invars[0].aval.shape[:2])


def _primitive_names(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in _inner_jaxpr(eqn):
            yield from _primitive_names(inner)


def _kernel_flops(eqn: Any, expected: ExpectedRouting) -> tuple[str, float]:
    """Kind and FLOPs of a Pallas kernel."""
    name = str(eqn.params.get("name") or "")
    shapes = [v.aval.shape for v in eqn.invars if hasattr(v.aval, "shape")]
    if name.startswith("splash_mha"):
        floats = [v.aval for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
        q, _, v = [x.shape for x in floats if len(x.shape) > 2][:3]  # a single sequence has no batch axis
        *batch, T, A = q
        V = v[-1]
        # Forward: scores and values. Backward: scores again, and the gradients of the weights, of q, k and v.
        depth = 3 * A + 2 * V if "dkv" in name else A + V
        block = next((size for size in (512, 256, 128) if T % size == 0), T)
        return "attention", 2 * math.prod(batch) * T * (T + block) / 2 * depth
    estimate = eqn.params.get("cost_estimate")
    if estimate is None:
        raise NotImplementedError(f"no formula for the kernel {name!r}")
    rows = next(shape for shape in shapes if len(shape) == 2)[0]
    return "experts", estimate.flops * (expected.expert_rows or rows) / rows
