"""Moonlight-16B-A3B on 4 TPU v5p, with AdamW in float32 (it was trained with Muon: `--optimizer.name muon`).

mla-moe plan configs/moonlight.py --topology v5p:2x2x1
python train.py configs/moonlight.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json
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
    run_dir="runs/moonlight",
    model=preset("moonlight-16b-a3b"),
    data=DataConfig(tokenizer="tokenizer.json"),
    # arXiv 2502.16982, section 3: 5.7 T tokens in sequences of 8,192.
    optimizer=OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=4.2e-4, warmup_fraction=0.006, decay_fraction=0.9, final_lr_fraction=0.1)
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=4),
    training=TrainingConfig(
        steps=340_000,
        batch_size=2048,
        gradient_accumulation_steps=256,
        sequence_length=8192,
        remat="full",
        log_every=10,
    ),
    checkpoint=CheckpointConfig(every=500),
)
