"""Run a recipe: `python train.py configs/quickstart.py [--section.field VALUE …]`. The same command again resumes.

A recipe is a Python file that binds `recipe`, or the `recipe.json` of an earlier run. On a cluster start it once a
host; where the hosts do not find each other, `--distributed.coordinator HOST:PORT`, `--distributed.processes N` and
`--distributed.process I` tell them (docs/pods.md).
"""

import os
import sys

if __name__ == "__main__" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    # Arrays in huge pages: a step on CPU takes a fifth less time. The C library reads this when a program begins.
    os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})


from mla_moe.config import ConfigError, Recipe, load_recipe, with_overrides
from mla_moe.parallel.distributed import ending_together, initialize
from mla_moe.training.loss_monitor import TrainingHaltedError


def main() -> int:
    try:
        arguments = initialize(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    if path is None:
        print(__doc__ if "--help" in arguments or "-h" in arguments else "error: name a recipe first\n\n" + __doc__)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    try:
        recipe = with_overrides(load_recipe(path), arguments, f"train.py {path}", __doc__)
        with ending_together():
            return run(recipe)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingHaltedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130


def run(recipe: Recipe) -> int:
    """The stages of a recipe, one after the other, and the report."""
    import jax

    from mla_moe.report.page import write_report
    from mla_moe.rl.preflight import preflight
    from mla_moe.rl.rejection_sampling import train_rejection
    from mla_moe.rl.trainer import train_rl
    from mla_moe.text.prompts import render_prompt
    from mla_moe.training.compile_cache import enable_compile_cache
    from mla_moe.training.console import Console
    from mla_moe.training.pretrain import pretrain
    from mla_moe.training.run_context import InterruptedRun
    from mla_moe.training.run_directory import open_run_directory, started_stages
    from mla_moe.training.sft import train_sft

    enable_compile_cache()
    console = Console(enabled=jax.process_index() == 0)
    run_dir = open_run_directory(recipe)
    preflight(recipe, started_stages(run_dir))
    try:
        if recipe.training.steps:
            pretrain(recipe, run_dir, console)
        if recipe.sft.steps:
            train_sft(recipe, run_dir, console, render_prompt)
        if recipe.rl.steps:
            train_rl(recipe, run_dir, console)
        if recipe.rejection.steps:
            train_rejection(recipe, run_dir, console)
    except InterruptedRun as stop:
        console.say(f"{stop}. The same command goes on from there.")
        return 130
    if jax.process_index() == 0:
        console.say(f"report: {write_report(run_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
