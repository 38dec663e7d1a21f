"""The first RL steps of the quickstart, compared with TRL's `GRPOTrainer` on the same base model.

    python benchmarks/trl_grpo.py runs/quickstart --torch PYTHON [--steps 3] [--objective grpo]

`--torch` is a Python with PyTorch, `transformers == 5.23.0` and `trl == 1.16.0`. It loads the run's pretrained
checkpoint in the Hugging Face layout and has the run's prompts and hyperparameters; this process computes the rewards.
TRL has no dynamic sampling, no routing replay, and without vLLM no truncated importance sampling. `ours` is a new run
without them, on the prompts that TRL has; `run` has the rows of the run itself. In the new runs the learning rate stays
at its peak, and there is no KL term.

First both compute the gradient of one update on the same completions. TRL divides advantages by the standard deviation
with ddof 1, which makes the gradient smaller by `√(1 − 1/group_size)`. In the steps that follow each samples its own
completions, and TRL shuffles those of a step before it splits them into minibatches, which here have whole groups.
"""

import argparse
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rl import from_base

from mla_moe.checkpoint import convert
from mla_moe.config import Recipe, RLConfig, load_recipe
from mla_moe.rl.objectives import clip_range
from mla_moe.rl.rewards import Reward, RewardInput
from mla_moe.rl.rollout import open_rollout
from mla_moe.rl.tasks import open_task
from mla_moe.rl.trainer import RLTrainer, train_rl
from mla_moe.rl.verifiers.worker import Example
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_context import RunContext, enable_compile_cache
from mla_moe.training.run_directory import open_run_directory

PEER = """
import json, os, sys, datasets, torch, transformers, trl
assert (transformers.__version__, trl.__version__) == ("5.23.0", "1.16.0")
messages = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries print
path, request = sys.argv[1], json.loads(sys.stdin.readline())
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

def prompts(split):
    texts = [tokenizer.bos_token + request["template"].replace("{question}", one) for one in request[split]]
    assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in tokenizer(texts).input_ids)
    return texts

def score(split, number, completions):
    print(json.dumps([split, number, completions]), file=messages, flush=True)
    return json.loads(sys.stdin.readline())

def reward(completions, number, **_):
    return score("train", number, completions)

def given(texts, trainer):
    return {"prompt_ids": tokenizer(texts).input_ids, "completion_ids": request["completion_ids"], "logprobs": None}

class Evaluation(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, **_):
        if state.global_step % args.steps_per_generation == 0:
            batch = tokenizer(prompts("heldout"), padding=True, padding_side="left", return_tensors="pt")
            out = model.generate(**batch, do_sample=False, max_new_tokens=args.max_completion_length)
            texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
            score("heldout", list(range(len(texts))), texts)

    on_step_end = on_train_begin

args = trl.GRPOConfig(
    output_dir=path, use_cpu=True, bf16=False, gradient_checkpointing=False, shuffle_dataset=False, logging_steps=1,
    report_to="none", save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", **request["config"],
)
train = datasets.Dataset.from_dict({"prompt": prompts("train"), "number": list(range(len(request["train"])))})
trainer = trl.GRPOTrainer(
    model, reward, args, train, processing_class=tokenizer, callbacks=[Evaluation()],
    rollout_func=given if request["completion_ids"] else None,
)
trainer.train()
print(json.dumps(["log", trainer.state.log_history, None]), file=messages, flush=True)
"""

COLUMNS = {"reward": ".3f", "response_length": ".1f", "grad_norm": ".3f", "eval/accuracy": ".1%"}
"""`grad_norm` is before clipping, the mean over a step's updates; the accuracy is that of greedy completions."""

Rows = dict[int, dict[str, float]]
"""Metrics by step, 0 before the first."""


def trl_config(rl: RLConfig) -> dict[str, Any]:
    """Arguments of `GRPOConfig`."""
    low, high = clip_range(rl)
    return {
        "loss_type": rl.objective,
        "epsilon": low,
        "epsilon_high": high,
        "temperature": rl.temperature,
        "max_completion_length": rl.max_new_tokens,
        "num_generations": rl.group_size,
        "per_device_train_batch_size": rl.prompts_per_step * rl.group_size // rl.minibatches,
        "steps_per_generation": rl.minibatches,
        "max_steps": rl.steps * rl.minibatches,
        "learning_rate": rl.optimizer.schedule.peak_lr,
        "adam_beta1": rl.optimizer.beta1,
        "adam_beta2": rl.optimizer.beta2,
        "adam_epsilon": rl.optimizer.eps,
        "weight_decay": rl.optimizer.weight_decay,
        "max_grad_norm": rl.optimizer.max_grad_norm,
    }


def train_with_trl(
    python: str, model: Path, recipe: Recipe, train: Sequence[Example], completion_ids: Sequence[Sequence[int]] = ()
) -> Rows:
    """Train on these examples in order, on completions that TRL samples or on given ones."""
    rl, task = recipe.rl, open_task(recipe.task)
    examples = {"train": train, "heldout": [task.example(rl.eval_split, number) for number in range(rl.eval_prompts)]}
    request: dict[str, Any] = {
        "template": recipe.task.template,
        "config": trl_config(rl),
        "completion_ids": completion_ids,
    }
    request |= {split: [example.question for example in found] for split, found in examples.items()}
    accuracies, log = [], []
    command = [python, "-c", PEER, str(model)]
    with (
        Reward(recipe.task, task) as reward,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer,
    ):
        assert peer.stdin is not None
        assert peer.stdout is not None
        print(json.dumps(request), file=peer.stdin, flush=True)
        for kind, content, completions in map(json.loads, peer.stdout):
            if kind == "log":
                log = [row for row in content if "grad_norm" in row]
                continue
            prompted = [examples[kind][number] for number in content]
            scores = reward([RewardInput(e.question, text, e) for e, text in zip(prompted, completions, strict=True)])
            print(json.dumps([score.total for score in scores]), file=peer.stdin, flush=True)
            if kind == "heldout":
                accuracies.append(mean(score.components["accuracy"] for score in scores))
    rows: Rows = {step: {"eval/accuracy": accuracy} for step, accuracy in enumerate(accuracies)}
    for step in range(1, rl.steps + 1):
        first, *_ = updates = log[(step - 1) * rl.minibatches : step * rl.minibatches]
        norm = mean(row["grad_norm"] for row in updates)
        rows[step] |= {
            "reward": first["reward"],
            "response_length": first["completions/mean_length"],
            "grad_norm": norm,
        }
    return rows


def train(recipe: Recipe) -> Rows:
    train_rl(recipe, run_dir := open_run_directory(recipe), Console(enabled=False))
    return read_steps(run_dir)


def read_steps(run_dir: Path) -> Rows:
    """The rows of `metrics.jsonl`, of which an evaluation has its own."""
    rows: Rows = {}
    for row in read_rows(run_dir / "metrics.jsonl", "rl"):
        rows.setdefault(row["step"], {}).update(row)
    return rows


def compare_gradients(python: str, model: Path, recipe: Recipe) -> None:
    """Print the gradient norms of one update on the completions of a step."""
    recipe = dataclasses.replace(recipe, rl=dataclasses.replace(recipe.rl, steps=1, minibatches=1, eval_prompts=1))
    context = RunContext.create(recipe, open_run_directory(recipe), Console(enabled=False))
    with open_rollout(context, recipe.rl) as rollout:
        trainer = RLTrainer(context, rollout)
        trainer.prepare()
        state, _ = trainer.initial_state(trainer.position)
        batch = trainer.next_batch(state, lambda _: None)
        ours = trainer.step(1, state, batch)[1]["grad_norm"]
    prompts = [group[0].prompt.example for group in batch.completions]
    tokens = [scored.completion.tokens for group in batch.completions for scored in group]
    theirs = train_with_trl(python, model, recipe, prompts, tokens)[1]["grad_norm"]
    expected = (1 - 1 / recipe.rl.group_size) ** 0.5
    print(f"gradient norm on the same completions: TRL {theirs:.4f}, ours {ours:.4f}")
    print(f"ratio {theirs / ours:.4f}; of the standard deviations {expected:.4f}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--torch", required=True, help="a Python with PyTorch, transformers and trl")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--objective", help="of the new runs, grpo or dapo; by default the run's")
    args = parser.parse_args()
    enable_compile_cache()
    recipe, change = load_recipe(args.run / "recipe.json"), dataclasses.replace
    schedule = change(recipe.rl.optimizer.schedule, decay_fraction=0.0)
    rl = change(
        recipe.rl, steps=args.steps, eval_every=1, eval_samples=0, objective=args.objective or recipe.rl.objective,
        kl_coef=0.0, max_resample_rounds=1, tis_clip=None, routing_replay=False,
        optimizer=change(recipe.rl.optimizer, schedule=schedule),
    )  # fmt: skip
    task = open_task(recipe.task)
    prompts = [task.example("train", number) for number in range(rl.steps * rl.prompts_per_step)]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        convert(args.run / "checkpoints" / "pretrain", model)
        settings = [from_base(recipe, args.run, Path(folder) / name, rl, recipe.task) for name in ("update", "steps")]
        compare_gradients(args.torch, model, settings[0])
        columns = {
            "TRL": train_with_trl(args.torch, model, settings[1], prompts),
            "ours": train(settings[1]),
            "run": read_steps(args.run),
        }
    print(f"{'':4}" + "".join(f"{name:>24}" for name in COLUMNS))
    print("step" + "".join(f"{name:>8}" for _ in COLUMNS for name in columns))
    for step in range(args.steps + 1):
        cells = [
            format(rows[step][name], spec) if name in rows[step] else ""
            for name, spec in COLUMNS.items()
            for rows in columns.values()
        ]
        print(f"{step:4}" + "".join(f"{cell:>8}" for cell in cells))


if __name__ == "__main__":
    main()
