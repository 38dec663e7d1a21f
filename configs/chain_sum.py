"""SFT and RL on a reasoning-gym task, sums of two to four numbers, from the quickstart's pretrained checkpoint.

    python train.py configs/quickstart.py
    python examples/chain_sum_pairs.py runs/chain_sum.jsonl
    python train.py configs/chain_sum.py

The SFT data have the format, but more than half of the completions skip reasoning steps. RL increases accuracy.
"""

from pathlib import Path

from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    Recipe,
    RLConfig,
    ScheduleConfig,
    SFTConfig,
    TaskConfig,
    TrainingConfig,
    load_recipe,
)

quickstart = load_recipe(Path(__file__).with_name("quickstart.py"))

recipe = Recipe(
    run_dir="runs/chain_sum",
    model=quickstart.model,
    init_from="runs/quickstart/checkpoints/pretrain",
    data=DataConfig(tokenizer="runs/quickstart/tokenizer.json"),
    training=TrainingConfig(steps=0, batch_size=16),
    task=TaskConfig(
        name="reasoning_gym:chain_sum",
        options=("min_terms=2", "max_terms=4", "min_digits=1", "max_digits=1"),
        template="{question}\n",
        format_weight=0.2,
    ),
    sft=SFTConfig(
        steps=400,
        data=("runs/chain_sum.jsonl",),
        batch_size=16,
        sequence_length=256,
        optimizer=OptimizerConfig(
            "muon",
            ScheduleConfig(peak_lr=5e-3, warmup_fraction=0.05, decay_fraction=0.6, final_lr_fraction=0.05),
            muon_peak_lr=5e-3,
            weight_decay=0.0,
        ),
    ),
    rl=RLConfig(
        steps=20,
        objective="dapo",
        max_resample_rounds=2,
        prompts_per_step=48,
        group_size=8,
        minibatches=2,
        max_prompt_tokens=56,
        max_new_tokens=72,
        packed_length=256,
        micro_batch_size=16,
        max_num_seqs=128,
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak_lr=5e-4, warmup_fraction=0.0, decay_fraction=0.9, final_lr_fraction=0.05),
            weight_decay=0.0,
        ),
        eval_every=5,
    ),
    checkpoint=CheckpointConfig(every=100),
)
