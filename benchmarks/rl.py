"""RL ablations on the quickstart: one base model, one change at a time, one table.

    python benchmarks/rl.py runs/quickstart [--steps 24] [--prompts-per-step 48] [--only dr_grpo gspo]

The base model is the run's pretrained checkpoint. Evaluations are on the validation split.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from mla_moe.config import Recipe, RLConfig, TaskConfig, load_recipe
from mla_moe.rl.trainer import train_rl
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_context import enable_compile_cache
from mla_moe.training.run_directory import open_run_directory


def variants(rl: RLConfig, task: TaskConfig) -> dict[str, tuple[RLConfig, TaskConfig]]:
    """Settings by name; the first are the quickstart's own."""
    change = dataclasses.replace
    completions = rl.prompts_per_step * rl.group_size
    sizes = {
        f"groups of {size}": (change(rl, group_size=size, prompts_per_step=completions // size), task)
        for size in (4, 16)
    }
    return {
        "quickstart": (rl, task),
        "grpo, no KL": (change(rl, objective="grpo", kl_coef=0.0), task),
        "grpo, KL 1e-3": (change(rl, objective="grpo", kl_coef=1e-3), task),
        "dr_grpo": (change(rl, objective="dr_grpo", kl_coef=0.0), task),
        "gspo": (change(rl, objective="gspo", kl_coef=0.0), task),
        "no format reward": (rl, change(task, format_weight=0.0)),
        "no routing replay": (change(rl, routing_replay=False), task),
        **sizes,
    }


def from_base(base: Recipe, source: Path, run_dir: Path, rl: RLConfig, task: TaskConfig) -> Recipe:
    """The recipe of RL that starts from the pretrained checkpoint of the run `source`."""
    return dataclasses.replace(
        base,
        run_dir=str(run_dir),
        init_from=str(source / "checkpoints" / "pretrain"),
        training=dataclasses.replace(base.training, steps=0),
        checkpoint=dataclasses.replace(base.checkpoint, every=10**6),
        rl=rl,
        task=task,
    )


def run(base: Recipe, source: Path, name: str, rl: RLConfig, task: TaskConfig, folder: Path) -> list[str]:
    settings = from_base(base, source, folder / name.replace(" ", "-"), rl, task)
    train_rl(settings, open_run_directory(settings), Console(enabled=False))
    rows = read_rows(Path(settings.run_dir) / "metrics.jsonl")
    evals = [row for row in rows if "eval/accuracy" in row]
    steps = [row for row in rows if "reward" in row]
    seconds, sampling = (np.array([row[key] for row in steps[1:]]) for key in ("step_seconds", "sample_seconds"))
    first, last = evals[0], evals[-1]

    def before_after(key: str, spec: str = ".0%") -> str:
        return f"{first[key]:{spec}} → {last[key]:{spec}}"

    return [
        name,
        before_after("eval/accuracy"),
        before_after("eval/forced_accuracy"),
        before_after("eval/format_rate"),
        before_after("eval/response_length", ".0f"),
        f"{max(row['sampler_logprob_diff_max'] for row in steps):.1e}",
        f"{np.median(seconds):.1f}",
        f"{np.median(sampling / seconds):.0%}",
    ]


COLUMNS = (
    "", "accuracy", "prefilled with `<think>`", "format", "tokens", "largest difference", "s per step", "sampling",
)  # fmt: skip
"""`largest difference` is between the log-probabilities of sampler and trainer; `sampling` its fraction of the time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--prompts-per-step", type=int)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    enable_compile_cache()
    base = load_recipe(args.run / "recipe.json")
    changes = {key: value for key in ("steps", "prompts_per_step") if (value := getattr(args, key)) is not None}
    rl = dataclasses.replace(base.rl, eval_every=0, eval_samples=2, eval_split="validation", **changes)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (settings, task) in variants(rl, base.task).items():
            if not args.only or name in args.only:
                print("| " + " | ".join(run(base, args.run, name, settings, task, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main()
