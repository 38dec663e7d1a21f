"""Compile a recipe for a named topology without the hardware: does it fit in HBM, and what step time to expect."""

from mla_moe.plan.plan import Plan, make_plan
from mla_moe.plan.topology import Topology, open_topology

__all__ = ["Plan", "Topology", "make_plan", "open_topology"]
