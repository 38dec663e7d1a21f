"""Kernels of tokamax for NVIDIA GPUs: attention and grouped matmul, each with its gradients (extra `cuda`).

Every product is computed by the faster of tokamax's two families, Mosaic and Triton, as measured in the autotuning data
that tokamax 0.0.17 ships (`tokamax/data/autotuning`, bfloat16). In TFLOP/s:

| compute capability | attention | grouped matmul, and its rows' gradient | its matrices' gradient |
|---|---|---|---|
| 9 (H100) | Mosaic | Mosaic: 370-480, Triton 40-460 | Triton: 410-750, Mosaic 100-150 |
| 10 (B200) | Mosaic | Mosaic: 860-1,400, Triton 50-630 | Triton: 570-1,400, Mosaic has none |
| 8 (A100) and others | Triton | Triton | Triton |

Accumulation is in float32. Rows of a grouped matmul behind the last group are neither read nor written: in the result
they are whatever the memory held before, NaN included.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jaxtyping import Array, Float, Int

from mla_moe.ops.kernel_choice import compute_capability
from mla_moe.ops.masking import CAUSAL, Masking, key_ranges

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default so far, which it warns will change
if (nvidia := importlib.util.find_spec("nvidia")) is not None:
    # XLA takes the first `ptxas` in PATH for Triton's code. That of an installed toolkit may be too old for it; the one
    # of the packages that JAX depends on is not.
    found = [str(path) for folder in nvidia.submodule_search_locations or () for path in Path(folder).glob("cu1?/bin")]
    os.environ["PATH"] = os.pathsep.join([*found, os.environ.get("PATH", "")])

from tokamax._src.ops.attention.base import Mask  # ty: ignore[import-not-found]
from tokamax.ops import gpu  # ty: ignore[import-not-found]

# tokamax logs a page for every shape that its autotuning data lack. Such a shape takes the configuration below, or for
# attention the library's own choice.
logging.getLogger("absl").addFilter(lambda record: "Autotuning cache miss" not in record.getMessage())

_ROWS_BY_MATRICES = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
_ROWS_BY_ROWS = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def _has_mosaic() -> bool:
    return 9 <= compute_capability() < 11


@jax.custom_vjp
def ragged_dot(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """`y[r] = x[r] @ w[e]` for the rows r of group e, of which any may be empty; groups start at row 0."""
    return _ragged_dot(x_RD, w_EDF, group_sizes_E)


def _ragged_dot_forward(x_RD: Array, w_EDF: Array, group_sizes_E: Array) -> tuple[Array, tuple[Array, ...]]:
    return ragged_dot(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _ragged_dot_backward(residuals: tuple[Array, ...], g_RF: Array) -> tuple[Array, Array, None]:
    x_RD, w_EDF, group_sizes_E = residuals
    g_x_RD = _ragged_dot(g_RF, jnp.swapaxes(w_EDF, 1, 2), group_sizes_E)
    return g_x_RD, _ragged_dot_gradient(x_RD, g_RF, group_sizes_E).astype(w_EDF.dtype), None


ragged_dot.defvjp(_ragged_dot_forward, _ragged_dot_backward)


# `mla_moe.plan` recognises the kernels by the names of these jitted functions.


@partial(jax.jit, inline=False)
def _ragged_dot(x_RD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    kernel = _rows_by_matrices(len(x_RD) // len(w_EDF), w_EDF.shape[1:])
    x = jnp.pad(x_RD, ((0, -len(x_RD) % 8), (0, 0)))  # Mosaic copies multiples of 8 rows
    with jax.numpy_dtype_promotion("standard"):
        sizes, numbers = group_sizes_E.astype(jnp.int32), _ROWS_BY_MATRICES
        return kernel(x, w_EDF, group_sizes=sizes, ragged_dot_dimension_numbers=numbers)[: len(x_RD)]


@partial(jax.jit, inline=False)
def _ragged_dot_gradient(x_RD: Array, g_RF: Array, group_sizes_E: Array) -> Array:
    """`Σ x[r]ᵀ g[r]` over the rows of each group."""
    sizes, numbers = group_sizes_E.astype(jnp.int32), _ROWS_BY_ROWS
    with jax.numpy_dtype_promotion("standard"):
        return _rows_by_rows()(x_RD, g_RF, group_sizes=sizes, ragged_dot_dimension_numbers=numbers)


def _rows_by_matrices(rows_per_group: int, widths: tuple[int, ...]) -> Callable[..., Array]:
    """The configurations are the fastest of the autotuning data for MoE training and for decode."""
    few = rows_per_group < 64
    if not _has_mosaic() or any(width % 64 for width in widths):  # Mosaic copies multiples of 64 columns
        m, n = (64, 128) if few else (64, 256)
        config = gpu.PallasTritonRaggedDotConfig(block_m=m, block_n=n, block_k=32, num_stages=5, num_warps=4)
        return gpu.PallasTritonRaggedDot(config=config)
    if compute_capability() >= 10:
        blocks = {"block_m": 64 if few else 128, "block_n": 128, "block_k": 128, "num_stages": 2, "collective": True}
        blocks |= {"persistent": False, "grid_minor_dim": 0, "grid_tile_width": 4}
    else:
        blocks = {"block_m": 64 if few else 128, "block_n": 64, "block_k": 128, "num_stages": 4, "persistent": not few}
        blocks |= {"grid_minor_dim": 1, "grid_tile_width": 8}
    return gpu.PallasMosaicRaggedDot(config=gpu.PallasMosaicRaggedDotConfig(split_k=1, **blocks))


def _rows_by_rows() -> Callable[..., Array]:
    m, n, k, stages, warps = (128, 256, 32, 5, 8) if _has_mosaic() else (256, 64, 64, 3, 4)
    config = gpu.PallasTritonRaggedDotConfig(block_m=m, block_n=n, block_k=k, num_stages=stages, num_warps=warps)
    return gpu.PallasTritonRaggedDot(config=config)


def flash_attention(
    q_BTHA: Float[Array, "B T H A"],
    k_BSHA: Float[Array, "B S H A"],
    v_BSHV: Float[Array, "B S H V"],
    segments_BS: Int[Array, "B S"],
    index_T: Int[Array, "T"] | None,
    scale: float,
    masking: Masking = CAUSAL,
) -> Float[Array, "B T H V"]:
    """`ops.attention.attention`, which see; `index_T` are the indices of the queries if they are a part of the tokens.
    Blocks of keys outside of a query's segment are skipped: a packed sequence costs what its documents cost alone."""
    first_B1T, end_B1T = (x[:, None] for x in key_ranges(segments_BS, masking))
    if index_T is not None:
        first_B1T, end_B1T = (x[:, :, index_T] for x in (first_B1T, end_B1T))
    elif masking == CAUSAL:
        end_B1T = None  # the kernel knows of causality
    return _attention(q_BTHA, k_BSHA, v_BSHV, first_B1T, end_B1T, scale)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q_BTHA: Array, k_BSHA: Array, v_BSHV: Array, first_B1T: Array, end_B1T: Array | None, scale: float
) -> Array:
    return _flash_attention(q_BTHA, k_BSHA, v_BSHV, first_B1T, end_B1T, scale, False)


def _attention_forward(
    q_BTHA: Array, k_BSHA: Array, v_BSHV: Array, first_B1T: Array, end_B1T: Array | None, scale: float
) -> tuple[Array, tuple[Any, ...]]:
    y_BTHV, softmax = _flash_attention(q_BTHA, k_BSHA, v_BSHV, first_B1T, end_B1T, scale, True)
    return y_BTHV, (q_BTHA, k_BSHA, v_BSHV, first_B1T, end_B1T, y_BTHV, softmax)


def _attention_backward(scale: float, residuals: tuple[Any, ...], g_BTHV: Array) -> tuple[Array | None, ...]:
    return *_flash_attention_gradient(*residuals, g_BTHV, scale), None, None


_attention.defvjp(_attention_forward, _attention_backward)


@partial(jax.jit, static_argnums=(5, 6), inline=False)
def _flash_attention(
    q_BTHA: Array, k_BSHA: Array, v_BSHV: Array, first_B1T: Array, end_B1T: Array | None, scale: float, residuals: bool
) -> Any:
    """The result, with `residuals` also the maxima and sums of the softmax `[B, H, T]`."""
    kernel, settings = _attention_kernel(first_B1T, end_B1T, scale)
    with jax.numpy_dtype_promotion("standard"):
        return kernel(q_BTHA, k_BSHA, v_BSHV, return_residuals=residuals, **settings)


@partial(jax.jit, static_argnums=(8,), inline=False)
def _flash_attention_gradient(
    q_BTHA: Array, k_BSHA: Array, v_BSHV: Array, first_B1T: Array, end_B1T: Array | None,
    y_BTHV: Array, softmax: tuple[Array, Array], g_BTHV: Array, scale: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    kernel, settings = _attention_kernel(first_B1T, end_B1T, scale)
    with jax.numpy_dtype_promotion("standard"):
        bound = kernel.bind(q_BTHA, k_BSHA, v_BSHV, **settings)
        settings = {name: value for name, value in bound.kwargs.items() if name != "return_residuals"}
        g = kernel.vjp(softmax, y_BTHV, g_BTHV, *bound.args, **settings)
    return g["q"], g["k"], g["v"]


def _attention_kernel(first_B1T: Array, end_B1T: Array | None, scale: float) -> tuple[Any, dict[str, Any]]:
    kernel = gpu.PallasMosaicFlashAttention() if _has_mosaic() else gpu.PallasTritonFlashAttention()
    return kernel, {"mask": Mask(is_causal=end_B1T is None, k_start=first_B1T, k_end=end_B1T), "logits_scale": scale}
