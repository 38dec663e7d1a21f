"""What each part of the quickstart's reinforcement learning is worth: one base, one change at a time, one table.

    python benchmarks/rl.py runs/quickstart [--steps 24] [--prompts 48] [--only grpo dapo]

The base is the run's pretraining. Held-out figures are of the validation split.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from mla_moe.config import Recipe, RLConfig, TaskConfig, load_recipe
from mla_moe.rl.trainer import train_rl
from mla_moe.training.compile_cache import enable_compile_cache
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_directory import open_run_directory


def variants(rl: RLConfig, task: TaskConfig) -> dict[str, tuple[RLConfig, TaskConfig]]:
    """Name → settings; the first is the quickstart's own."""
    change = dataclasses.replace
    answers = rl.prompts_per_step * rl.group_size
    sizes = {
        f"groups of {size}": (change(rl, group_size=size, prompts_per_step=answers // size), task) for size in (4, 16)
    }
    return {
        "quickstart": (rl, task),
        "grpo, no divergence": (change(rl, objective="grpo", kl_coef=0.0), task),
        "grpo, divergence 1e-3": (change(rl, objective="grpo", kl_coef=1e-3), task),
        "dr_grpo": (change(rl, objective="dr_grpo", kl_coef=0.0), task),
        "gspo": (change(rl, objective="gspo", kl_coef=0.0), task),
        "no reward for form": (rl, change(task, format_weight=0.0)),
        "no routing replay": (change(rl, routing_replay=False), task),
        **sizes,
    }


def run(base: Recipe, source: Path, name: str, rl: RLConfig, task: TaskConfig, folder: Path) -> list[str]:
    settings = dataclasses.replace(
        base,
        run_dir=str(folder / name.replace(" ", "-")),
        init_from=str(source / "checkpoints" / "pretrain"),
        training=dataclasses.replace(base.training, steps=0),
        checkpoint=dataclasses.replace(base.checkpoint, every=10**6),
        rl=rl,
        task=task,
    )
    train_rl(settings, open_run_directory(settings), Console(enabled=False))
    rows = read_rows(Path(settings.run_dir) / "metrics.jsonl")
    evals = [row for row in rows if "eval/accuracy" in row]
    steps = [row for row in rows if "reward" in row]
    seconds, sampling = (np.array([row[key] for row in steps[1:]]) for key in ("step_seconds", "sample_seconds"))
    first, last = evals[0], evals[-1]

    def change(key: str, form: str = ".0%") -> str:
        return f"{first[key]:{form}} → {last[key]:{form}}"

    return [
        name,
        change("eval/accuracy"),
        change("eval/forced_accuracy"),
        change("eval/format_rate"),
        change("eval/response_length", ".0f"),
        f"{max(row['sampler_logprob_diff_max'] for row in steps):.1e}",
        f"{np.median(seconds):.1f}",
        f"{np.median(sampling / seconds):.0%}",
    ]


HEAD = ("", "right", "opened with `<think>`", "form", "tokens", "largest mismatch", "s a step", "sampling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    enable_compile_cache()
    base = load_recipe(args.run / "recipe.json")
    changes = {key: value for key in ("steps", "prompts") if (value := getattr(args, key)) is not None}
    rl = dataclasses.replace(base.rl, eval_every=0, eval_samples=2, eval_split="validation", **changes)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (settings, task) in variants(rl, base.task).items():
            if not args.only or name in args.only:
                print("| " + " | ".join(run(base, args.run, name, settings, task, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main()
