"""Train: run the stages of a recipe (pretraining, SFT, DPO, RL, rejection sampling) in order, then write the report.

    mla-moe train RECIPE [--section.field VALUE …]          python train.py RECIPE [--section.field VALUE …]

A recipe is a Python file that binds `recipe`, or the `recipe.json` of an earlier run; `RECIPE --help` lists all fields.
The same command again resumes from the newest checkpoint. On a cluster start it once per host; where the hosts are not
found automatically, add `--distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I`
(docs/pods.md).
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence

import tyro

from mla_moe.cli.errors import EXPECTED, print_any_text, report_error
from mla_moe.cli.recipe import open_recipe, split_recipe
from mla_moe.config import Recipe
from mla_moe.parallel.distributed import exit_on_error, initialize


@dataclasses.dataclass(frozen=True)
class Train:
    """Run a recipe: pretraining, SFT and RL. The same command resumes. `train RECIPE --help` lists all its fields."""

    # For `mla-moe --help` alone: the flags of this command depend on the recipe, so `main` parses them.

    recipe: tyro.conf.Positional[str]
    """A recipe's .py or .json file."""


def reexecute_with_huge_pages() -> None:
    """On Linux replace this process by itself with arrays in huge pages: on CPU a training step takes a fifth less
    time. The C library reads `GLIBC_TUNABLES` only when a process starts. Does nothing if the variable is set."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})


def main(args: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Parse a recipe's path and the flags for its fields, by default from `sys.argv`, and run it. Returns the exit
    code: 0, 1 for an error during the run, 2 for invalid input, 130 if interrupted."""
    print_any_text()
    try:
        path, flags = split_recipe(initialize(sys.argv[1:] if args is None else args))
        if not path:
            wants_help = not {"--help", "-h"}.isdisjoint(flags)
            print(__doc__ if wants_help else "error: name a recipe first\n\n" + __doc__)
            return 0 if wants_help else 2
        recipe = open_recipe(path, flags, f"{prog} {path}", __doc__)
        with exit_on_error():
            return run(recipe)
    except EXPECTED as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the newest checkpoint", file=sys.stderr)
        return 130


def run(recipe: Recipe) -> int:
    """Run the stages that have steps, one after the other, and write the report. Returns the exit code."""
    import jax

    from mla_moe.checkpoint.bucket_run import close_run, location
    from mla_moe.report.page import write_report
    from mla_moe.rl.preflight import preflight
    from mla_moe.rl.rejection_sampling import train_rejection
    from mla_moe.rl.trainer import train_rl
    from mla_moe.training.console import Console
    from mla_moe.training.dpo import train_dpo
    from mla_moe.training.errors import InterruptedRun
    from mla_moe.training.preemption import remember_interrupts
    from mla_moe.training.pretrain import pretrain
    from mla_moe.training.run_context import enable_compile_cache
    from mla_moe.training.run_directory import open_run_directory, started_stages
    from mla_moe.training.sft import train_sft
    from mla_moe.training.trackers import Trackers, require_installed

    with remember_interrupts(), contextlib.ExitStack() as at_end:
        enable_compile_cache()
        console = Console(enabled=jax.process_index() == 0)
        require_installed(recipe.track)
        run_dir = open_run_directory(recipe)
        at_end.push(lambda error, *_: close_run(run_dir, failed=error is not None))
        preflight(recipe, started_stages(run_dir))
        stages = {
            pretrain: recipe.training.active,
            train_sft: recipe.sft.active,
            train_dpo: recipe.dpo.active,
            train_rl: recipe.rl.steps,
            train_rejection: recipe.rejection.steps,
        }
        try:
            for train in (stage for stage, active in stages.items() if active):
                train(recipe, run_dir, console)
        except InterruptedRun as stop:
            console.print(f"{stop}. The same command resumes from there.")
            return 130
        if jax.process_index() == 0:
            console.print(f"report: {location(report := write_report(run_dir))}")
            with Trackers(recipe, run_dir) as trackers:
                trackers.log_file(report)
        return 0
