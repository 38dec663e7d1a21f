"""Moonlight-16B-A3B on one host of 8 H100, with AdamW in float32 (it was trained with Muon: `--optimizer.name muon`).

mla-moe plan configs/moonlight_h100.py --topology h100:1x8
python train.py configs/moonlight_h100.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json
"""

import dataclasses
from pathlib import Path

from mla_moe.config import MeshConfig, load_recipe

moonlight = load_recipe(Path(__file__).with_name("moonlight.py"))
recipe = dataclasses.replace(
    moonlight,
    run_dir="runs/moonlight_h100",
    mesh=MeshConfig(data=1, fsdp=-1, expert=8),
    training=dataclasses.replace(moonlight.training, gradient_accumulation_steps=128, remat="dots"),
)
