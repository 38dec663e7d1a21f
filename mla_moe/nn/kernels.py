"""Which implementation runs where: names that a recipe leaves open are filled in by platform."""

import dataclasses

import jax

from mla_moe.config import KernelConfig
from mla_moe.ops.attention import default_implementation as attention
from mla_moe.ops.grouped_matmul import default_implementation as grouped_matmul
from mla_moe.parallel.expert_parallel import default_dispatch as exchange


def resolve_kernels(kernels: KernelConfig, platform: str | None = None) -> KernelConfig:
    """`kernels` with every name filled in for `platform` (`tpu`, `gpu`, `cpu`; by default the attached one, which is
    not the one that a program is compiled for ahead of time)."""
    platform = platform or jax.default_backend()
    defaults = {"attention": attention, "grouped_matmul": grouped_matmul, "exchange": exchange}
    return dataclasses.replace(
        kernels, **{name: getattr(kernels, name) or default(platform) for name, default in defaults.items()}
    )
