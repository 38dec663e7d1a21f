"""DeepSeek-V2-Lite, 15.7 B parameters, on 4 TPU v5p: AdamW in float32.

mla-moe plan configs/v2_lite.py --topology v5p:2x2x1
python train.py configs/v2_lite.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json
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
    run_dir="runs/v2_lite",
    model=preset("deepseek-v2-lite"),
    data=DataConfig(tokenizer="tokenizer.json"),
    # Appendix B of DeepSeek-V2: 5.7 T tokens, 4,608 sequences per step; the schedule is V3's.
    optimizer=OptimizerConfig(
        schedule=ScheduleConfig(
            peak_lr=4.2e-4, warmup_fraction=0.0067, decay_fraction=0.29, final_lr_fraction=0.1, tail_fraction=0.034
        )
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=4),
    training=TrainingConfig(
        steps=302_000,
        batch_size=4608,
        gradient_accumulation_steps=288,
        sequence_length=4096,
        remat="full",
        log_every=10,
    ),
    checkpoint=CheckpointConfig(every=500),
)
