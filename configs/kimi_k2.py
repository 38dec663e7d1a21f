"""Kimi K2, 1.03 T parameters, on 256 TPU v5p: full AdamW in float32.

mla-moe plan configs/kimi_k2.py --topology v5p:4x8x8
python train.py configs/kimi_k2.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json
"""

from mla_moe.config import preset
from mla_moe.recipe import Checkpoint, Data, Mesh, Optimizer, Recipe, Schedule, Training

recipe = Recipe(
    run_dir="runs/kimi_k2",
    model=preset("kimi-k2"),
    data=Data(tokenizer="tokenizer.json"),
    # arXiv 2507.20534, section 2.5: 15.5 T tokens in sequences of 4,096, 67 M tokens a step.
    optimizer=Optimizer(schedule=Schedule(peak=2e-4, warmup=0.0022, decay=0.35, final=0.1)),
    mesh=Mesh(data=1, fsdp=-1, expert=32),
    training=Training(
        steps=231_000, batch_size=16_384, accumulation=32, sequence_length=4096, remat="full", log_every=10
    ),
    checkpoint=Checkpoint(every=500),
)
