"""DeepSeek-V3 as specified by MLPerf Training v6.0: sequences of 4,096 tokens, at least 15,360 per step, a learning
rate of 2.4e-5 · √(batch / 16,384), and a given checkpoint (`--init-from`).

    mla-moe plan configs/deepseek_v3_mlperf.py --topology v5p:8x8x8
"""

import dataclasses
from pathlib import Path

from mla_moe.config import OptimizerConfig, ScheduleConfig, load_recipe

v3 = load_recipe(Path(__file__).with_name("deepseek_v3.py"))
recipe = dataclasses.replace(
    v3,
    run_dir="runs/deepseek_v3_mlperf",
    optimizer=OptimizerConfig(schedule=ScheduleConfig(peak_lr=2.4e-5)),
    training=dataclasses.replace(v3.training, batch_size=16_384, gradient_accumulation_steps=8),
)
