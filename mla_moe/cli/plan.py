"""`mla-moe plan`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from mla_moe.cli.recipe import open_recipe
from mla_moe.config import require
from mla_moe.config.errors import require_between
from mla_moe.training.console import Console


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a recipe ahead of time for TPUs or GPUs, without having any: memory per device and whether it fits,
    FLOPs, collectives, predicted step time and MFU. Fields of the recipe are flags, as for train: `--mesh.fsdp 32`."""

    recipe: tyro.conf.Positional[Path]
    """A recipe's .py or .json file."""
    topology: str
    """Target devices: v5e:4x4, v5p:8x8x8, v6e:16x16, v7x:4x4x8, h100:HOSTSxGPUS, cpu."""
    slices: int = 1
    """Number of such slices, connected by the data-center network and used as mesh.data."""
    stage: Literal["train", "sft", "decode", "rl"] = "train"
    """train: one training step; sft: one of SFT, with LoRA of its adapters; decode: one token for each of `batch`
    sequences; rl: the gradient of a microbatch."""
    batch: int = 128
    """Sequences of the decode stage."""
    context: int = 4096
    """Cached tokens per sequence of the decode stage."""
    int8_kv_cache: bool = False
    """Quantize the KV cache of the decode stage to int8."""
    search: bool = False
    """Also try other meshes, remat and gradient accumulation; rank those that fit. Cached in ~/.cache/mla_moe."""
    json: bool = False
    """Print everything as JSON."""

    def __post_init__(self):
        require_between(self, "", "slices", 1, 1024)
        require_between(self, "", "batch", 1, 1_000_000)
        require_between(self, "", "context", 1, 10_000_000)

    def run(self, flags: Sequence[str]) -> None:
        """`flags` set fields of the recipe."""
        from mla_moe.plan.topology import open_topology, quiet_compilers

        quiet_compilers()

        from mla_moe.plan import report
        from mla_moe.plan.search import cached_plan, search
        from mla_moe.plan.stages import DecodeOptions

        recipe = open_recipe(self.recipe, flags, f"mla-moe plan {self.recipe}")
        topology = open_topology(self.topology, self.slices)
        console = Console(enabled=not self.json)
        if self.search:
            require(self.stage == "train", "stage", self.stage, "must be train with --search")
            ranked = search(recipe, topology, console.print)
            report.print_ranking(ranked, console)
            found = json.dumps([{"recipe": json.loads(r.to_json()), **plan.to_json()} for r, plan in ranked])
        else:
            options = DecodeOptions(self.batch, self.context, self.int8_kv_cache)
            plan = cached_plan(recipe, topology, self.stage, options)
            report.print_plan(plan, console)
            found = json.dumps(plan.to_json(), indent=2)
        if self.json:
            print(found)
