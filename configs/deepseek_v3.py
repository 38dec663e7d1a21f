"""DeepSeek-V3, 671 B parameters with the prediction module, on 512 TPU v5p: full AdamW in float32, 4 x 4,096 tokens a
chip, no token dropped.

    mla-moe plan configs/deepseek_v3.py --topology v5p:8x8x8
    python train.py configs/deepseek_v3.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json

What it costs on this and on other pods: docs/plan.md. The recipes for those start from this one.
"""

from mla_moe.config import preset
from mla_moe.recipe import Checkpoint, Data, Mesh, Optimizer, Recipe, Schedule, Training

recipe = Recipe(
    run_dir="runs/deepseek_v3",
    model=preset("deepseek-v3"),
    data=Data(tokenizer="tokenizer.json"),
    # Section 4.2: 14.8 T tokens in sequences of 4,096; here in steps of 8 M tokens from the first on.
    optimizer=Optimizer(schedule=Schedule(peak=2.2e-4, warmup=0.0011, decay=0.29, final=0.1, tail=0.034)),
    mesh=Mesh(data=1, fsdp=-1, expert=32),
    training=Training(
        steps=1_764_000,
        batch_size=2048,
        sequence_length=4096,
        remat="full",
        bias_freeze=0.034,
        log_every=10,
    ),
    checkpoint=Checkpoint(every=500),
)
