"""`mla-moe`: look at models and runs from the command line."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mla_moe.config import ConfigError, preset
from mla_moe.counting import (
    cache_bytes_per_token,
    count_parameters,
    multi_head_cache_bytes_per_token,
    train_flops_per_token,
)
from mla_moe.training.console import Console, si


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what a model costs: parameters, KV bytes a token, FLOPs a token. Nothing is allocated."""

    model: tyro.conf.Positional[str]
    """A preset's name."""
    length: int = 4096
    """Tokens of a sequence, for the FLOPs."""

    def run(self) -> None:
        cfg = preset(self.model)
        count = count_parameters(cfg)
        latent, multi_head = cache_bytes_per_token(cfg), multi_head_cache_bytes_per_token(cfg)
        rows = [
            ("parameters", f"{count.total:,} ({si(count.total)})"),
            ("active a token", f"{count.active:,} ({si(count.active)})"),
            ("prediction module", f"{count.mtp:,} ({si(count.mtp)})" if count.mtp else "none"),
            ("layers", f"{cfg.num_hidden_layers}, of which {cfg.first_k_dense_replace} dense"),
            ("experts", f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} and {cfg.n_shared_experts} shared"),
            ("KV bytes a token", f"{latent:,} in bfloat16"),
            ("  multi-head attention", f"{multi_head:,} ({multi_head / latent:.1f} times as many)"),
            ("FLOPs a token", f"{si(train_flops_per_token(cfg, self.length))} to train on {self.length} tokens"),
        ]
        Console(enabled=True).startup_table(self.model, rows)


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a run's report.html."""

    run_dir: tyro.conf.Positional[Path]

    def run(self) -> None:
        from mla_moe.report import write_report

        print(write_report(self.run_dir))


Command = Annotated[Inspect, tyro.conf.subcommand("inspect")] | Annotated[Report, tyro.conf.subcommand("report")]


def main(args: list[str] | None = None) -> int:
    try:
        tyro.cli(Command, prog="mla-moe", description=__doc__, args=args).run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
