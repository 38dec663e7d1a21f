"""The device mesh, and the implementations (kernels) of attention, grouped matmul and expert dispatch."""

import dataclasses
from typing import Literal

from mla_moe.config.errors import require, require_each, structure
from mla_moe.config.resume import field

AttentionKernel = Literal["reference", "blockwise", "splash", "cudnn"]
GroupedMatmulKernel = Literal["reference", "blocks", "chunks", "ragged", "megablox"]
DispatchKernel = Literal["all_to_all", "ragged"]


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Implementations by name; None selects the one for the platform. All give the same result, except for tokens that
    `capacity_factor` drops."""

    attention: AttentionKernel | None = field(None, resume="free")
    """Attention: splash (default on TPU), cudnn (default on GPU), blockwise (FlashAttention in plain XLA, default on
    CPU), or reference (all scores in memory)."""
    grouped_matmul: GroupedMatmulKernel | None = field(None, resume="free")
    """Matrix products of the experts: megablox (default on TPU), blocks (default on GPU), chunks (default on CPU),
    ragged (jax.lax.ragged_dot), or reference (every expert on every token)."""
    dispatch: DispatchKernel | None = field(None, resume="free")
    """Token dispatch to experts on other devices: ragged (default on TPU and GPU), which sends only the tokens, or
    all_to_all, which sends buffers of fixed capacity."""
    capacity_factor: float | None = None
    """Capacity of the token dispatch between two devices, as a multiple of its size under balanced routing. Tokens
    beyond it are dropped and counted as moe/dropped. None: dropless; unbalanced routing takes more chunks instead."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            structure(f.type, getattr(self, f.name), f"kernels.{f.name}")
        message = "a positive number; 1 is the capacity that balanced routing needs"
        require_each(self, "kernels", "capacity_factor", lambda x: x > 0, message)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; −1 on one axis takes all remaining devices."""

    data: int = -1
    """Data parallelism: replicas of parameters and optimizer state. The axis for slow networks between slices."""
    fsdp: int = 1
    """FSDP (ZeRO-3): parameters and optimizer state are sharded, and all-gathered before use."""
    expert: int = 1
    """Expert parallelism: experts are sharded, and tokens dispatched to them."""
    tensor: int = 1
    """Tensor parallelism: attention heads and hidden widths are sharded."""
    context: int = 1
    """Context parallelism: sequences are sharded along time."""
    rules: tuple[str, ...] = ()
    """Overrides of the sharding rules of parallel/sharding.py: axis=mesh_axis, or axis= for replicated."""

    def __post_init__(self):
        sizes = {name: size for name, size in dataclasses.asdict(self).items() if name != "rules"}
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name}", size, "a number of devices, or -1 for the rest")
        require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one axis can be -1")
