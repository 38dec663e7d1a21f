"""Kimi K2, 1.03 T parameters, on 256 TPU v5p: AdamW in float32.

mla-moe plan configs/kimi_k2.py --topology v5p:4x8x8
python train.py configs/kimi_k2.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json
"""

from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    TrainingConfig,
    preset,
)

recipe = Recipe(
    run_dir="runs/kimi_k2",
    model=preset("kimi-k2"),
    data=DataConfig(tokenizer="tokenizer.json"),
    # arXiv 2507.20534, section 2.5: 15.5 T tokens in sequences of 4,096, 67 M tokens per step.
    optimizer=OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=2e-4, warmup_fraction=0.0022, decay_fraction=0.35, final_lr_fraction=0.1)
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=64),
    training=TrainingConfig(
        steps=231_000,
        batch_size=16_384,
        gradient_accumulation_steps=32,
        sequence_length=4096,
        remat="full",
        log_every=10,
    ),
    checkpoint=CheckpointConfig(every=500),
)
