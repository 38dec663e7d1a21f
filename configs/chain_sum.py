"""A task of reasoning-gym's, from the quickstart's pretraining: sums of two to four numbers, fine-tuned, then rewarded.

    python train.py configs/quickstart.py
    python examples/chain_sum_pairs.py runs/chain_sum.jsonl
    python train.py configs/chain_sum.py

The pairs show the form, and as much haste as care.
"""

import runpy
from pathlib import Path

from mla_moe.recipe import RL, SFT, Checkpoint, Data, Optimizer, Recipe, Schedule, Task, Training

quickstart: Recipe = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["recipe"]

recipe = Recipe(
    run_dir="runs/chain_sum",
    model=quickstart.model,
    init_from="runs/quickstart/checkpoints/pretrain",
    data=Data(tokenizer="runs/quickstart/tokenizer.json"),
    training=Training(steps=0, batch_size=16),
    task=Task(
        name="reasoning_gym:chain_sum",
        options=("min_terms=2", "max_terms=4", "min_digits=1", "max_digits=1"),
        template="{question}\n",
        format=0.2,
    ),
    sft=SFT(
        steps=400,
        data=("runs/chain_sum.jsonl",),
        batch_size=16,
        sequence_length=256,
        optimizer=Optimizer(
            "muon", Schedule(peak=5e-3, warmup=0.05, decay=0.6, final=0.05), muon_peak=5e-3, weight_decay=0.0
        ),
    ),
    rl=RL(
        steps=20,
        objective="dapo",
        rounds=2,
        prompts=48,
        group_size=8,
        minibatches=2,
        max_prompt_tokens=56,
        max_new_tokens=72,
        row_tokens=256,
        rows=16,
        slots=128,
        optimizer=Optimizer(schedule=Schedule(peak=5e-4, warmup=0.0, decay=0.9, final=0.05), weight_decay=0.0),
        eval_every=5,
    ),
    checkpoint=Checkpoint(every=100),
)
