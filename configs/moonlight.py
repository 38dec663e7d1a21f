"""Moonlight-16B-A3B on 4 TPU v5p, with AdamW in float32 (it was trained with Muon: `--optimizer.name muon`).

mla-moe plan configs/moonlight.py --topology v5p:2x2x1
python train.py configs/moonlight.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json
"""

from mla_moe.config import preset
from mla_moe.recipe import Checkpoint, Data, Mesh, Optimizer, Recipe, Schedule, Training

recipe = Recipe(
    run_dir="runs/moonlight",
    model=preset("moonlight-16b-a3b"),
    data=Data(tokenizer="tokenizer.json"),
    # arXiv 2502.16982, section 3: 5.7 T tokens in sequences of 8,192.
    optimizer=Optimizer(schedule=Schedule(peak=4.2e-4, warmup=0.006, decay=0.9, final=0.1)),
    mesh=Mesh(data=1, fsdp=-1, expert=4),
    training=Training(
        steps=340_000, batch_size=2048, accumulation=256, sequence_length=8192, remat="full", log_every=10
    ),
    checkpoint=Checkpoint(every=500),
)
