"""Preference optimization (DPO) of any checkpoint, on all devices. Model and tokenizer are the checkpoint's.

    mla-moe train --init-from path/to/model configs/dpo.py --dpo.data preferences.jsonl

Each line has `prompt`, `chosen` and `rejected`, texts or messages. `--dpo.loss ipo` is IPO.
"""

from mla_moe.config import CheckpointConfig, DPOConfig, MeshConfig, Recipe, TaskConfig, TrainingConfig

recipe = Recipe(
    run_dir="runs/dpo",
    model_from="init_from",
    mesh=MeshConfig(data=1, fsdp=-1),
    training=TrainingConfig(steps=0, remat="full"),
    task=TaskConfig(template="chat"),
    dpo=DPOConfig(epochs=1.0, data=("preferences.jsonl",), eval_every=100, batch_size=32, sequence_length=4096),
    checkpoint=CheckpointConfig(every=100),
)
