"""What users see who have no type checker at run time, which the other tests have."""

import subprocess
import sys

import pytest

PROGRAM = """
import jax.numpy as jnp
from flax import nnx
import mla_moe

cfg, rngs = mla_moe.preset("tiny"), nnx.Rngs(0)
attention, moe = (kind(hidden_size=8, **sizes, rngs=rngs) for kind, sizes in (
    (mla_moe.MLAttention, {"num_heads": 1, "kv_lora_rank": 4}), (mla_moe.MoE, {"num_experts": 2})))
model = nnx.eval_shape(lambda: mla_moe.Transformer(cfg, rngs=nnx.Rngs(0)))
for run in (
    lambda: attention(jnp.ones((3, 8))),
    lambda: attention(jnp.ones((1, 3, 9))),
    lambda: moe(jnp.ones(8)),
    lambda: model(jnp.ones(4, jnp.int32)),
    lambda: mla_moe.Transformer(cfg, rngs=rngs, remat="minimal"),
):
    try:
        run()
    except mla_moe.ConfigError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_wrong_rank_or_name_is_named_where_it_is_given():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines() == [
        "x = 'float32[3, 8]': the shape must be [B, T, 8]",
        "x = 'float32[1, 3, 9]': the shape must be [B, T, 8]",
        "x = 'float32[8]': the shape must be [B, T, 8]",
        "tokens = 'int32[4]': the shape must be [B, T]",
        "remat = 'minimal': choose one of none, dots, full",
    ]
