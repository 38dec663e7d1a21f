"""How long a program takes at the published peaks: arithmetic, memory, and each collective on the links it can use."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from mla_moe.parallel.accelerators import Chip
from mla_moe.plan.program import Collective
from mla_moe.plan.topology import Topology


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same mesh axes."""

    axes: str
    """Mesh axes that the groups span, joined by ×; and whether they span slices."""
    kind: str
    count: float
    """Runs."""
    bytes: float
    """Sent by one device, over all runs."""
    largest: float
    """Sent by one device in the largest of them."""
    seconds: float


def traffic(collectives: Iterable[Collective], mesh: Mesh, topology: Topology, row_share: float) -> list[Traffic]:
    """`row_share` is how full the buffers of a ragged exchange are. Most bytes first."""
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for c in collectives:
        sent = c.sent * (row_share if c.kind == "ragged-all-to-all" else 1)
        if len(c.group) < 2 or not sent:
            continue
        wait = 0.0 if topology.chip is None else sent / bandwidth(c, mesh, topology, topology.chip)
        axes = mesh_axes(c.group, mesh) + ", between slices" * (slices(c.group, mesh) > 1)
        rows.setdefault((axes, c.kind), []).append((c.times, sent, wait))
    found = [
        Traffic(
            axes,
            kind,
            sum(times for times, _, _ in runs),
            sum(times * sent for times, sent, _ in runs),
            max(sent for _, sent, _ in runs),
            sum(times * wait for times, _, wait in runs),
        )
        for (axes, kind), runs in rows.items()
    ]
    return sorted(found, key=lambda t: -t.bytes)


def mesh_axes(group: tuple[int, ...], mesh: Mesh) -> str:
    """The mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    return "×".join(axis for axis, place in zip(mesh.axis_names, places, strict=True) if len(set(place)) > 1)


def slices(group: tuple[int, ...], mesh: Mesh) -> int:
    return len({getattr(mesh.devices.flat[i], "slice_index", 0) for i in group})


def bandwidth(c: Collective, mesh: Mesh, topology: Topology, chip: Chip) -> float:
    """Bytes/s at which a device of the group can send.

    On a TPU's torus a ring uses both links of every dimension along which the group extends. An exchange of all with
    all crosses a quarter of a dimension on average, in either direction, so that the longest dimension sets its time.
    """
    devices = [mesh.devices.flat[i] for i in c.group]
    if slices(c.group, mesh) > 1:
        return chip.network
    if topology.platform != "tpu":
        one_host = len({d.process_index for d in devices}) == 1
        return chip.link if one_host else chip.network
    extents = [len(set(place)) for place in zip(*(d.coords for d in devices), strict=True)]
    extents = [n for n in extents if n > 1]
    if not extents:  # the halves of a TPU7x chip, joined by six times a link, of which `chip.link` is half
        return 12 * chip.link
    if "all-to-all" in c.kind:
        return 2 * chip.link / max(max(extents) / 4, 1)
    return 2 * chip.link * (len(extents) if c.kind != "collective-permute" else 0.5)
