"""DeepSeek-V3, 671 B parameters and the MTP module, on 512 TPU v5p: AdamW in float32, 4 x 4,096 tokens per chip,
dropless.

    mla-moe plan configs/deepseek_v3.py --topology v5p:8x8x8
    python train.py configs/deepseek_v3.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json

Memory and time on this and on other pods: docs/plan.md. There only mesh and batch size differ from this recipe.
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
    run_dir="runs/deepseek_v3",
    model=preset("deepseek-v3"),
    data=DataConfig(tokenizer="tokenizer.json"),
    # Section 4.2: 14.8 T tokens in sequences of 4,096; here with 8 M tokens per step from the start.
    optimizer=OptimizerConfig(
        schedule=ScheduleConfig(
            peak_lr=2.2e-4, warmup_fraction=0.0011, decay_fraction=0.29, final_lr_fraction=0.1, tail_fraction=0.034
        )
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=32),
    training=TrainingConfig(
        steps=1_764_000,
        batch_size=2048,
        sequence_length=4096,
        remat="full",
        router_bias_freeze_fraction=0.034,
        log_every=10,
    ),
    checkpoint=CheckpointConfig(every=500),
)
