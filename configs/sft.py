"""Supervised fine-tuning of any checkpoint on chats, on all devices. Model and tokenizer are the checkpoint's.

    mla-moe train --init-from path/to/model configs/sft.py --sft.data chats.jsonl
    mla-moe data preview configs/sft.py --init-from path/to/model --sft.data chats.jsonl

Chats are JSON lines, JSON or Parquet in one of the formats of docs/fine-tuning.md.
"""

from mla_moe.config import (
    CheckpointConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    SFTConfig,
    TaskConfig,
    TrainingConfig,
)

recipe = Recipe(
    run_dir="runs/sft",
    model_from="init_from",
    mesh=MeshConfig(data=1, fsdp=-1),
    training=TrainingConfig(steps=0, remat="full"),
    task=TaskConfig(template="chat"),
    sft=SFTConfig(
        epochs=2.0,
        data=("chats.jsonl",),
        eval_every=100,
        batch_size=32,
        sequence_length=4096,
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak_lr=5e-6, warmup_fraction=0.05, decay_fraction=0.95, final_lr_fraction=0.1)
        ),
    ),
    checkpoint=CheckpointConfig(every=100),
)
