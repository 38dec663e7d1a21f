"""The device mesh, and the implementations (kernels) of attention, grouped matmul and expert dispatch."""

import dataclasses
import math
from typing import Literal

from mla_moe.config.errors import MAX_SIZE, require, require_each, structure
from mla_moe.config.resume import field

AttentionKernel = Literal["reference", "blockwise", "splash", "tokamax", "cudnn"]
GroupedMatmulKernel = Literal["reference", "blocks", "chunks", "ragged", "megablox", "tokamax"]
DispatchKernel = Literal["all_to_all", "ragged"]


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Implementations by name; None selects the platform's. All give the same result, unless `capacity_factor` drops
    tokens."""

    attention: AttentionKernel | None = field(None, resume="free")
    """Attention: splash (default on TPU), tokamax (default on GPU), cudnn, blockwise (FlashAttention in plain XLA,
    default on CPU), or reference (all scores in memory)."""
    grouped_matmul: GroupedMatmulKernel | None = field(None, resume="free")
    """Matrix products of the experts: megablox (default on TPU), tokamax (default on GPU), blocks, chunks (default on
    CPU), ragged (jax.lax.ragged_dot), or reference (every expert on every token)."""
    dispatch: DispatchKernel | None = field(None, resume="free")
    """Token dispatch to experts on other devices: ragged (default on TPU and GPU), which sends only the tokens, or
    all_to_all, which sends buffers of fixed capacity."""
    capacity_factor: float | None = None
    """Capacity factor: a device sends at most this many times the tokens of balanced routing to each other device, over
    all chunks (not per expert as in MaxText). Further tokens are dropped and counted as moe/dropped. None: dropless;
    unbalanced routing takes more chunks instead."""
    compiler_options: tuple[str, ...] = field((), resume="free")
    """Changes to the platform's XLA options (parallel/compiler_options.py) for training and RL: name=value sets one,
    name= removes it."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            structure(f.type, getattr(self, f.name), f"kernels.{f.name}")
        message = "must be a positive number; 1 is the capacity that balanced routing needs"
        require_each(self, "kernels", "capacity_factor", lambda x: 0 < x < math.inf, message)
        for option in self.compiler_options:
            named = option.startswith("xla_") and "=" in option
            require(named, "kernels.compiler_options", option, "write xla_NAME=VALUE, or xla_NAME= to remove an option")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; −1 on one axis takes all remaining devices."""

    pipeline: int = 1
    """Pipeline parallelism: the MoE layers are sharded over pipeline stages, through which the microbatches of
    gradient accumulation pass. For networks between devices that are too slow for FSDP and expert parallelism over
    all."""
    data: int = -1
    """Data parallelism: replicas of parameters and optimizer state. The axis for slow networks between slices."""
    fsdp: int = 1
    """FSDP (ZeRO-3): parameters and optimizer state are sharded, and all-gathered before use."""
    expert: int = 1
    """Expert parallelism: experts are sharded, and tokens dispatched to them."""
    tensor: int = 1
    """Tensor parallelism: attention heads and hidden widths are sharded."""
    context: int = 1
    """Context parallelism: sequences are sharded along time, with equal work in causal attention."""
    rules: tuple[str, ...] = ()
    """Overrides of the sharding rules of parallel/sharding.py: axis=mesh_axis, or axis= for replicated."""

    def __post_init__(self):
        sizes = {name: size for name, size in dataclasses.asdict(self).items() if name != "rules"}
        for name, size in sizes.items():
            require(
                size == -1 or 1 <= size <= MAX_SIZE,
                f"mesh.{name}",
                size,
                "must be a number of devices, or -1 for the rest",
            )
        require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one axis can be -1")
