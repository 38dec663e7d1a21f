"""Reinforcement learning of any checkpoint from rule rewards, on all devices. Model and tokenizer are the checkpoint's.

    mla-moe train --init-from path/to/model configs/rl.py --task.name problems.jsonl
    mla-moe train --init-from path/to/model configs/rl.py --lora.rank 16 --rl.optimizer.schedule.peak-lr 5e-5

Each line of problems.jsonl has `question` and `answer`; other tasks and rewards are in docs/reinforcement-learning.md.
"""

from mla_moe.config import (
    CheckpointConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    RLConfig,
    ScheduleConfig,
    TaskConfig,
    TrainingConfig,
)

recipe = Recipe(
    run_dir="runs/rl",
    model_from="init_from",
    mesh=MeshConfig(data=1, fsdp=-1),
    training=TrainingConfig(steps=0, remat="full"),
    task=TaskConfig(name="problems.jsonl", template="chat", answer_format="boxed", format_weight=0.1),
    rl=RLConfig(
        steps=200,
        objective="dapo",
        prompts_per_step=64,
        group_size=8,
        minibatches=2,
        max_prompt_tokens=1024,
        max_new_tokens=3072,
        micro_batch_size=32,
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak_lr=1e-6, warmup_fraction=0.05, decay_fraction=0.0), weight_decay=0.0
        ),
        eval_split="validation",
        eval_every=20,
    ),
    checkpoint=CheckpointConfig(every=20),
)
