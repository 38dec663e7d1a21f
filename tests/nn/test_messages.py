"""What users see who have no type checker at run time, which the other tests have."""

import subprocess
import sys

import pytest

PROGRAM = """
import jax
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
    lambda: attention(jnp.ones((1, 3, 8)), mask=jnp.zeros((1, 3))),
    lambda: mla_moe.MLAttention(hidden_size=8, num_heads=1, rope_scaling={"rope_type": "linear"}, rngs=rngs),
    lambda: mla_moe.MoE(hidden_size=8, num_experts=2, router=lambda x: (x, x), rngs=rngs)(jnp.ones((3, 8))),
    lambda: mla_moe.add_adapters(model, mla_moe.LoRAConfig(), rngs=rngs),
    lambda: mla_moe.OptimizerConfig("lion"),
    lambda: mla_moe.ScheduleConfig(decay_shape="exp"),
    lambda: mla_moe.grouped_optimizer({"a": jnp.ones((2, 2))}, mla_moe.OptimizerConfig("muon"), steps=1),
    lambda: mla_moe.named_shardings(moe, jax.make_mesh((1,), ("dp",)), {"embed": "pd"}),
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
        "remat = 'minimal': choose one of none, dots, full, stage",
        "mask = 'float32[1, 3]': must be boolean, False where a key is padding: give attention_mask == 1 of what "
        "transformers takes",
        "rope_scaling = {'rope_type': 'linear'}: is read by mla_moe.rope_scaling({…}): give what that returns",
        "router = 'tuple': must return a mla_moe.Routing",
        "lora.rank = 0: adapters need a rank, such as 16",
        "optimizer.name = 'lion': must be one of 'adamw', 'muon'",
        "optimizer.schedule.decay_shape = 'exp': must be one of 'cosine', 'linear', '1-sqrt'",
        "optimizer.name = 'muon': no weight is in the group matrix; give weights with Flax's metadata, before they "
        "become plain arrays",
        "rules.embed = 'pd': the mesh has dp",
    ]
