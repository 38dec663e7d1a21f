"""FLOPs of a traced function: its matrix products, each as often as it runs.

Elementwise operations are not counted: they do not use the matrix units. XLA does not see into Pallas kernels, so their
FLOPs come from formulas. Work outside of a `shard_map` is taken as evenly divided over all devices.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval

FlopsByKind = defaultdict[str, float]


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
    query_blocks: float | None = None
    """A device's blocks of queries per block of keys, over which the backward pass loops; None if as many as
    `key_blocks`, without context parallelism."""
    dispatch_fill: float = 1.0
    """The fraction of the token dispatch's buffers that is filled."""

    def loop_trips(self, scope: str) -> float:
        """Trip count of a while loop of the compiled program, from JAX's name of it."""
        if "attend" in scope and "experts" not in scope:
            backward = "transpose(" in scope and "rematted_computation" not in scope
            return self.attention_trips(backward)
        return self.num_chunks if "experts" in scope else 1.0

    def attention_trips(self, backward: bool) -> float:
        return self.query_blocks if backward and self.query_blocks is not None else self.key_blocks


def count_flops(
    jaxpr: ClosedJaxpr, devices: int = 1, expected: ExpectedRouting = ExpectedRouting()
) -> dict[str, float]:
    """FLOPs of one device by kind: `matmul`, and `attention` and `experts` of Pallas kernels. Raises
    `NotImplementedError` for a kernel without a formula."""
    live, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return dict(_count(live, 1 / devices, False, expected, defaultdict(float)))


def _count(jaxpr: Any, runs: float, in_loop: bool, expected: ExpectedRouting, total: FlopsByKind) -> FlopsByKind:
    """Add the FLOPs of a jaxpr that runs so often to `total`, and return it."""
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
        elif name in ("jit", "pjit") and (found := _gpu_kernel_call_flops(eqn, expected)) is not None:
            kind, flops = found
            total[kind] += runs * flops
        elif name == "scan":
            _count(eqn.params["jaxpr"].jaxpr, runs * eqn.params["length"], True, expected, total)
        elif name == "while":
            body = eqn.params["body_jaxpr"].jaxpr
            _count(body, runs * _expected_trips(body, in_loop, expected), in_loop, expected, total)
        elif name == "cond":
            branches = [branch.jaxpr for branch in eqn.params["branches"]]
            counted = [_count(branch, runs, in_loop, expected, defaultdict(float)) for branch in branches]
            for kind, flops in max(counted, key=lambda flops: sum(flops.values())).items():
                total[kind] += flops
        elif name == "shard_map":
            axes = eqn.params.get("newly_manual_axes") or eqn.params["manual_axes"]  # its name in other versions of JAX
            shards = math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
            _count(eqn.params["jaxpr"], runs * shards, in_loop, expected, total)
        else:
            for inner in _inner_jaxpr(eqn):
                _count(inner, runs, in_loop, expected, total)
    return total


def _inner_jaxpr(eqn: Any) -> list[Any]:
    """The function that a call, a checkpoint or a custom derivative runs, if there is one."""
    found = [eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params]
    return [getattr(inner, "jaxpr", inner) for inner in found[:1]]


def _expected_trips(body: Any, in_loop: bool, expected: ExpectedRouting) -> float:
    """Trips of a while loop, recognised by its body: token dispatch has an all-to-all; within a layer, attention has an
    exponential, a grouped matmul on CPU loops over blocks of rows; of decode steps, the outermost loop, one counts."""
    names = Counter(_primitive_names(body))
    if any("all_to_all" in name for name in names):
        return expected.num_chunks
    if not in_loop:
        return 1.0
    product = next((eqn for eqn in body.eqns if eqn.primitive.name == "dot_general"), None)
    if "exp" in names or expected.expert_rows is None or product is None:
        return expected.attention_trips(backward=names["dot_general"] == 5)  # forward it has two
    return expected.expert_rows / math.prod(product.invars[0].aval.shape[:2])


def _primitive_names(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in _inner_jaxpr(eqn):
            yield from _primitive_names(inner)


def gpu_kernel_flops(
    function: str, operands: list[tuple[int, ...]], results: list[tuple[int, ...]], expected: ExpectedRouting
) -> tuple[str, float] | None:
    """Kind and FLOPs of a jitted function of `ops.tokamax_kernels` or `ops.latent_attention`, by its name, or of one of
    its kernels, from the shapes of its operands and results. None for any other function."""
    if function in ("_ragged_dot", "_ragged_dot_gradient"):
        (rows, depth), (*_, width) = operands[:2]
        return "experts", 2 * (expected.expert_rows or rows) * depth * width
    if function == "_latent_attention":
        q, cache = (shape for shape in operands if len(shape) > 2)
        return "attention", 2 * math.prod(q[:-1]) * cache[2] * (q[-1] + results[0][-1])
    if function not in ("_flash_attention", "_flash_attention_gradient"):
        return None
    (*batch, T, H, A), (*_, S, _, _), (*_, V) = operands[:3]  # a single sequence has no batch axis
    depth = A + V
    if function == "_flash_attention_gradient":
        # The gradient of q, that of k and v, or all three, each part with scores and the weights' gradient of its own.
        depth = {1: 2 * A + V, 2: 2 * A + 2 * V}.get(len(results), 4 * A + 3 * V)
    # Causal, in tiles of 128 queries and keys. With context parallelism a device's T queries attend to as many of the S
    # keys as any others (`parallel.context_parallel`).
    return "attention", 2 * math.prod(batch) * H * T * (S + 128) / 2 * depth


def _gpu_kernel_call_flops(eqn: Any, expected: ExpectedRouting) -> tuple[str, float] | None:
    return gpu_kernel_flops(
        eqn.params["name"], *([v.aval.shape for v in vs] for vs in (eqn.invars, eqn.outvars)), expected
    )


def _kernel_flops(eqn: Any, expected: ExpectedRouting) -> tuple[str, float]:
    arrays = [(v.aval.shape, jnp.issubdtype(v.aval.dtype, jnp.floating)) for v in eqn.invars]
    estimate = eqn.params.get("cost_estimate")
    return kernel_flops(str(eqn.params.get("name") or ""), arrays, estimate and estimate.flops, expected)


def kernel_flops(
    name: str, operands: list[tuple[tuple[int, ...], bool]], estimate: float | None, expected: ExpectedRouting
) -> tuple[str, float]:
    """Kind and FLOPs of a Pallas kernel, from the shapes of its operands (and whether each has a floating dtype) and
    its own estimate for full buffers. Raises `NotImplementedError` for a kernel without a formula."""
    if name.startswith("splash_mha"):
        q, k, v = [shape for shape, floating in operands if floating and len(shape) > 2][:3]
        (*batch, T, A), (S, _), V = q, k[-2:], v[-1]  # a single sequence has no batch axis
        # Forward: scores and values. Backward: scores again, and the gradients of the weights, of q, k and v.
        depth = 3 * A + 2 * V if "dkv" in name else A + V
        block = next((size for size in (512, 256, 128) if T % size == 0), T)
        return "attention", 2 * math.prod(batch) * T * (S + block) / 2 * depth  # as for tokamax
    if estimate is None:
        raise NotImplementedError(f"no formula for the kernel {name!r}")
    rows = next(shape[0] for shape, _ in operands if len(shape) == 2)
    return "experts", estimate * (expected.expert_rows or rows) / rows
