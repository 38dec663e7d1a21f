"""The device mesh, and the kernels that run on it."""

import dataclasses
from typing import Literal

from mla_moe.config.errors import require, structure


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Implementations by name; None takes the one for the platform. All but the buffer compute the same."""

    attention: Literal["reference", "blockwise", "splash", "cudnn"] | None = None
    """splash is a TPU kernel, cudnn a GPU one; by default blockwise elsewhere."""
    grouped_matmul: Literal["reference", "blocks", "chunks", "ragged", "megablox"] | None = None
    """megablox is a TPU kernel; by default blocks elsewhere."""
    dispatch: Literal["all_to_all", "ragged"] | None = None
    """How rows go to experts on other devices: ragged, the default on TPU and GPU, moves the rows alone."""
    capacity_factor: float | None = None
    """How many times its even share of rows a device may send to another before tokens are dropped, which moe/dropped
    counts; None drops none, and takes more rounds where the routing is uneven."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            structure(field.type, getattr(self, field.name), f"kernels.{field.name}")
        ok = self.capacity_factor is None or self.capacity_factor > 0
        require(ok, "kernels.capacity_factor", self.capacity_factor, "a positive share; 1 is that of an even routing")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; −1 takes what the others leave."""

    data: int = -1
    """Replicas of everything; the axis that may cross a slow network."""
    fsdp: int = 1
    """Parameters and optimizer state split, gathered when used."""
    expert: int = 1
    """Experts split."""
    tensor: int = 1
    """Heads and hidden widths split."""
    context: int = 1
    """Time split."""
    rules: tuple[str, ...] = ()
    """Changes to the table of `sharding.py`, each `axis=mesh_axis`, or `axis=` for whole on every device."""

    def __post_init__(self):
        sizes = {name: size for name, size in dataclasses.asdict(self).items() if name != "rules"}
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name}", size, "a number of devices, or -1 for the rest")
        require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one axis can be -1")
