"""Intermediate results that XLA for CPU must compute once."""

from typing import TypeVar

import jax

from mla_moe.ops.kernel_choice import target_platform

T = TypeVar("T")


def materialize(x: T) -> T:
    """Arrays that a program for CPU writes to memory. Otherwise XLA fuses what computes them with what uses them, and
    computes them again for each value that is made of them. Needs `compiler_options()`, without which jaxlib 0.10
    removes the barrier first."""
    return jax.lax.optimization_barrier(x) if target_platform() == "cpu" else x
