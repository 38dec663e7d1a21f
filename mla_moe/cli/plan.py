"""`mla-moe plan`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from mla_moe.config import load_recipe, require, with_overrides
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
    stage: Literal["train", "decode", "rl"] = "train"
    """train: one training step. decode: one token for each of `batch` sequences. rl: the gradient of one microbatch
    (`rl.micro_batch_size` packed sequences)."""
    batch: int = 128
    """Sequences of the decode stage."""
    context: int = 4096
    """Cached tokens per sequence of the decode stage."""
    int8_kv_cache: bool = False
    """Quantize the KV cache of the decode stage to int8."""
    search: bool = False
    """Also try other meshes, rematerialisation and gradient accumulation, and rank those that fit. Plans are cached in
    ~/.cache/mla_moe."""
    json: bool = False
    """Print everything as JSON."""

    def run(self, flags: Sequence[str]) -> None:
        """`flags` set fields of the recipe."""
        from mla_moe.plan.topology import open_topology, quiet_compilers

        quiet_compilers()

        from mla_moe.plan import report
        from mla_moe.plan.search import cached_plan, search
        from mla_moe.plan.stages import DecodeOptions

        recipe = with_overrides(load_recipe(self.recipe), flags, f"mla-moe plan {self.recipe}")
        topology = open_topology(self.topology, self.slices)
        console = Console(enabled=True)
        if self.search:
            require(self.stage == "train", "stage", self.stage, "must be train with --search")
            ranked = search(recipe, topology, (lambda line: None) if self.json else console.print)
            if self.json:
                print(json.dumps([{"recipe": json.loads(r.to_json()), **plan.to_json()} for r, plan in ranked]))
            else:
                report.print_ranking(ranked, console)
            return
        options = DecodeOptions(self.batch, self.context, self.int8_kv_cache)
        plan = cached_plan(recipe, topology, self.stage, options)
        if self.json:
            print(json.dumps(plan.to_json(), indent=2))
        else:
            report.print_plan(plan, console)
