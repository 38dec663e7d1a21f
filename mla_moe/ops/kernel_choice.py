"""Which kernel runs where: by default, and in place of one that does not support a device or its inputs.

The choice follows the *target* of a program, which need not be attached: a program for absent devices is traced inside
`with jax.default_device(device)`, as `mla_moe.plan` does.
"""

import functools
import importlib.util
import logging

import jax.numpy as jnp
from jax.extend.backend import get_default_device
from jax.typing import DTypeLike

from mla_moe.config.parallelism import AttentionKernel, GroupedMatmulKernel

logger = logging.getLogger(__name__)

MAX_HEAD_WIDTH = 256
"""Widest keys and values of tokamax's attention: wider ones do not fit a core's shared memory."""

LATENT_BLOCK = 32
"""Entries of the latent KV cache that a program of `ops.latent_attention` reads at a time."""


def target_platform() -> str:
    """`tpu`, `gpu` or `cpu`: of the device that the present program is traced for, by default the attached one."""
    return get_default_device().platform


def compute_capability() -> float:
    """Of the target, if it is an NVIDIA GPU (8.0 for A100, 9.0 for H100, 10.0 for B200); 0 for any other device."""
    found = getattr(get_default_device(), "compute_capability", None)
    return float(found) if isinstance(found, str) and found[:1].isdecimal() else 0.0


def default_attention_kernel(platform: str | None = None) -> AttentionKernel:
    """The kernel for `platform` (`tpu`, `gpu`, `cpu`; by default the target's)."""
    platform = platform or target_platform()
    return "splash" if platform == "tpu" else "tokamax" if platform in ("gpu", "cuda") else "blockwise"


def default_grouped_matmul_kernel(platform: str | None = None) -> GroupedMatmulKernel:
    """The implementation for `platform` (`tpu`, `gpu`, `cpu`; by default the target's) that does no masked work."""
    platform = platform or target_platform()
    return "megablox" if platform == "tpu" else "tokamax" if platform in ("gpu", "cuda") else "chunks"


def supported_attention_kernel(
    wanted: AttentionKernel | None, dtype: DTypeLike, *, queries: int, tokens: int, widths: tuple[int, int],
    keys_in_ranges: bool = True, dropout: bool = False, selected: bool = False,
) -> AttentionKernel:  # fmt: skip
    """`wanted` (None: the default), or `blockwise` where it does not support the target or the inputs: `queries` and
    `tokens` that are keys; keys and values of `widths`; whether the keys that a query attends to are a
    range, which they need not be with keys of another sequence or padding masks; whether an indexer has `selected` them
    (DSA), which only plain XLA computes."""
    kernel = wanted or default_attention_kernel()
    problem = None
    if selected and kernel not in ("reference", "blockwise"):
        problem = "has no selected keys (DSA)"
    elif kernel in ("splash", "tokamax") and (dropout or not keys_in_ranges):
        problem = "has no dropout, and no keys of other sequences or padding masks"
    elif kernel == "splash" and (queries % 128 or tokens % 128):
        problem = f"{queries} queries of {tokens} tokens: needs multiples of 128"
    elif kernel == "cudnn" and dropout:
        problem = "no dropout"
    elif kernel == "tokamax":
        problem = _tokamax_problem(dtype)
        if problem is None and max(widths) > MAX_HEAD_WIDTH:
            problem = f"keys and values of widths {widths}: at most {MAX_HEAD_WIDTH}"
    if problem is None:
        return kernel
    log_fallback("attention", kernel, "blockwise", problem)
    return "blockwise"


def has_latent_kernel(
    wanted: AttentionKernel | None, dtype: DTypeLike, cache_dtype: DTypeLike, *, latent: int, rotary: int,
    capacity: int, all_slots: bool = True, selected: bool = False,
) -> bool:  # fmt: skip
    """Whether `ops.latent_attention` computes a decode step: on GPU, unless `wanted` is an implementation in plain XLA,
    and if it supports the dtypes, the widths of the latent and the rotary key, the capacity of the cache, and its slots
    (all in order) and keys (not `selected` by an indexer)."""
    if target_platform() not in ("gpu", "cuda") or wanted in ("reference", "blockwise"):
        return False
    problem = None
    if compute_capability() < 8:
        problem = f"needs an NVIDIA GPU of compute capability 8 or more, not {get_default_device().device_kind}"
    elif importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        problem = "this version of JAX has no Triton backend for Pallas"
    elif jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) or cache_dtype not in (dtype, jnp.int8):
        problem = f"{jnp.dtype(dtype)}, cache {jnp.dtype(cache_dtype)}: needs bfloat16 or float16, and the same or int8"
    elif any(width < 16 or width & (width - 1) for width in (latent, rotary)):
        problem = f"latent {latent}, rotary key {rotary}: needs powers of two, at least 16"
    elif selected or not all_slots:
        problem = "has no selected keys (DSA), and needs all slots in order"
    elif capacity % LATENT_BLOCK:
        problem = f"a cache of {capacity} tokens: needs a multiple of {LATENT_BLOCK}"
    if problem is not None:
        log_fallback("attention of a decode step", "latent_attention", "plain XLA", problem)
    return problem is None


def supported_grouped_matmul_kernel(wanted: GroupedMatmulKernel | None, dtype: DTypeLike) -> GroupedMatmulKernel:
    """`wanted` (None: the default), or `blocks` where it does not support the target or the dtype."""
    kernel = wanted or default_grouped_matmul_kernel()
    problem = _tokamax_problem(dtype) if kernel == "tokamax" else None
    if problem is None:
        return kernel
    log_fallback("grouped matmul", kernel, "blocks", problem)
    return "blocks"


def _tokamax_problem(dtype: DTypeLike) -> str | None:
    """Why tokamax's kernels cannot run on the target with this dtype; None if they can."""
    if any(importlib.util.find_spec(package) is None for package in ("tokamax", "jax_triton")):
        return "tokamax is not installed; with Python 3.12 or later: pip install 'mla_moe[cuda]'"
    if compute_capability() < 8:
        return f"needs an NVIDIA GPU of compute capability 8 or more, not {get_default_device().device_kind}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)}: needs bfloat16 or float16"
    return None


@functools.cache
def log_fallback(function: str, wanted: str, used: str, reason: str) -> None:
    """Once per reason."""
    logger.warning("%s: using %s instead of %s: %s", function, used, wanted, reason)
