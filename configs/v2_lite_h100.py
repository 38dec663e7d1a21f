"""DeepSeek-V2-Lite, 15.7 B parameters, on one host of 8 H100: AdamW in float32.

mla-moe plan configs/v2_lite_h100.py --topology h100:1x8
python train.py configs/v2_lite_h100.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json
"""

import dataclasses
from pathlib import Path

from mla_moe.config import MeshConfig, load_recipe

v2_lite = load_recipe(Path(__file__).with_name("v2_lite.py"))
recipe = dataclasses.replace(
    v2_lite,
    run_dir="runs/v2_lite_h100",
    mesh=MeshConfig(data=1, fsdp=-1, expert=8),
    training=dataclasses.replace(v2_lite.training, gradient_accumulation_steps=144, remat="dots"),
)
