"""The time of each collective at the published peaks of the links that it can use."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from mla_moe.parallel.accelerators import Accelerator
from mla_moe.plan.hlo import Collective
from mla_moe.plan.topology import Topology


@dataclass(frozen=True)
class CollectiveTraffic:
    """All collectives of one kind over the same mesh axes."""

    axes: str
    """Mesh axes that a group of devices spans, joined by ×; and whether it spans slices."""
    kind: str
    count: float
    """Number of runs."""
    bytes: float
    """Sent by one device, in all runs."""
    largest: float
    """Sent by one device in the largest of them."""
    seconds: float


def collective_traffic(
    collectives: Iterable[Collective], mesh: Mesh, topology: Topology, dispatch_fill: float
) -> list[CollectiveTraffic]:
    """The collectives by mesh axes and kind, most bytes first. `dispatch_fill` is the fraction of the buffers of a
    ragged all-to-all that an even routing fills."""
    by_kind: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for c in collectives:
        sent = bytes_sent(c, dispatch_fill)
        if sent:
            seconds = collective_seconds(c, mesh, topology, dispatch_fill)
            by_kind.setdefault((traffic_axes(c, mesh), c.kind), []).append((c.runs, sent, seconds))
    found = []
    for (axes, kind), items in by_kind.items():
        count, total = sum(runs for runs, _, _ in items), sum(runs * sent for runs, sent, _ in items)
        largest, seconds = max(sent for _, sent, _ in items), sum(runs * seconds for runs, _, seconds in items)
        found.append(CollectiveTraffic(axes, kind, count, total, largest, seconds))
    return sorted(found, key=lambda t: -t.bytes)


def bytes_sent(c: Collective, dispatch_fill: float) -> float:
    """Bytes that a device sends in one run, 0 for a group of one device."""
    return c.sent * (dispatch_fill if c.kind == "ragged-all-to-all" else 1) if len(c.group) > 1 else 0.0


def collective_seconds(c: Collective, mesh: Mesh, topology: Topology, dispatch_fill: float) -> float:
    """Seconds of one run, alone on its links; 0 on CPU."""
    sent, device = bytes_sent(c, dispatch_fill), topology.accelerator
    return sent / bandwidth(c, mesh, topology, device) if sent and device is not None else 0.0


def traffic_axes(c: Collective, mesh: Mesh) -> str:
    """The mesh axes of a collective, joined by ×, and whether it spans slices."""
    return group_axes(c.group, mesh) + ", between slices" * (count_slices(c.group, mesh) > 1)


def links(c: Collective, mesh: Mesh, topology: Topology) -> tuple[str, ...]:
    """The links that a collective occupies: dimensions of a TPU's torus, a GPU's NVLinks, or the network."""
    devices = [mesh.devices.flat[i] for i in c.group]
    if count_slices(c.group, mesh) > 1:
        return ("network",)
    if topology.platform != "tpu":
        return ("NVLink",) if len({d.process_index for d in devices}) == 1 else ("network",)
    extents = zip("xyz", zip(*(d.coords for d in devices), strict=True), strict=False)
    return tuple(name for name, along in extents if len(set(along)) > 1) or ("chip",)


def group_axes(group: tuple[int, ...], mesh: Mesh) -> str:
    """The mesh axes along which the devices of a group differ."""
    positions = np.array(np.unravel_index(group, mesh.devices.shape))
    return "×".join(axis for axis, along in zip(mesh.axis_names, positions, strict=True) if len(set(along)) > 1)


def count_slices(group: tuple[int, ...], mesh: Mesh) -> int:
    return len({getattr(mesh.devices.flat[i], "slice_index", 0) for i in group})


def bandwidth(c: Collective, mesh: Mesh, topology: Topology, accelerator: Accelerator) -> float:
    """Bytes/s at which a device of the group can send. On a TPU's torus a ring uses both links of every dimension along
    which the group extends. An all-to-all crosses a quarter of a dimension on average, in either direction, so that the
    longest dimension bounds its time."""
    devices = [mesh.devices.flat[i] for i in c.group]
    if count_slices(c.group, mesh) > 1:
        return accelerator.network
    if topology.platform != "tpu":
        return accelerator.link if len({d.process_index for d in devices}) == 1 else accelerator.network
    extents = [n for along in zip(*(d.coords for d in devices), strict=True) if (n := len(set(along))) > 1]
    if not extents:  # the two devices of a TPU7x chip, joined by six times a link, of which `link` is half
        return 12 * accelerator.link
    if "all-to-all" in c.kind:
        return 2 * accelerator.link / max(max(extents) / 4, 1)
    return 2 * accelerator.link * (len(extents) if c.kind != "collective-permute" else 0.5)
