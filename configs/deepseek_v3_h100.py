"""DeepSeek-V3, 671 B parameters, on 2,048 H100 in hosts of 8, with eight sequences of 4,096 tokens per device: about
the batch of DeepSeek's run, 15,360. On 256 H100 there is memory for two per device. Both as planned: docs/plan.md.

    mla-moe plan configs/deepseek_v3_h100.py --topology h100:256x8
    mla-moe plan configs/deepseek_v3_h100.py --topology h100:32x8 --training.batch_size 512 --training.steps 7056000
    python train.py configs/deepseek_v3_h100.py --data.train 'text/*.parquet' --data.tokenizer path/to/tokenizer.json
"""

import dataclasses
from pathlib import Path

from mla_moe.config import load_recipe

deepseek_v3 = load_recipe(Path(__file__).with_name("deepseek_v3.py"))
recipe = dataclasses.replace(
    deepseek_v3,
    run_dir="runs/deepseek_v3_h100",
    training=dataclasses.replace(deepseek_v3.training, steps=220_500, batch_size=16_384),
)
