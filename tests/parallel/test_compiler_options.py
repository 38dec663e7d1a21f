import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mla_moe
from mla_moe.config import KernelConfig
from mla_moe.nn.rope import rotary, rotate


def test_options_are_accepted_by_the_compiler_and_change_the_program():
    """On CPU attention's batched matmuls are Eigen's, which their names in the compiled program tell."""
    x = jnp.ones((4, 32, 32))
    compiled = [
        jax.jit(lambda x: x @ x, compiler_options=options).lower(x).compile().as_text()
        for options in (None, mla_moe.compiler_options())
    ]
    assert compiled[0] != compiled[1]


def test_on_cpu_the_angles_of_a_position_are_computed_once_and_not_for_each_head():
    """With jaxlib 0.10 and without the options they would be."""
    cfg = mla_moe.MLAttention(hidden_size=16, num_heads=4, kv_lora_rank=8, qk_rope_head_dim=4, rngs=nnx.Rngs(0)).cfg
    x_BTHR, positions_BT = jnp.ones((2, 32, 4, 4)), jnp.ones((2, 32), jnp.int32)
    options = mla_moe.compiler_options()
    run = jax.jit(lambda x, positions: rotate(x, *rotary(cfg, positions)), compiler_options=options)
    text = run.lower(x_BTHR, positions_BT).compile().as_text()
    with_cosines = [computation for computation in text.split("\n\n") if " cosine(" in computation]
    assert [re.findall(r"ROOT .* = \w+(\[[\d,]*\])", c) for c in with_cosines] == [["[2,32,2]"]]


def test_options_are_those_of_the_platform_and_a_copy():
    assert mla_moe.compiler_options() == mla_moe.compiler_options("cpu") != mla_moe.compiler_options("tpu")
    mla_moe.compiler_options("tpu").clear()
    assert mla_moe.compiler_options("tpu")
    assert not any(mla_moe.compiler_options("gpu").values())  # of what went wrong with expert parallelism elsewhere
    with pytest.raises(mla_moe.ConfigError, match="platform = 'cuda': must be one of tpu, gpu, cpu"):
        mla_moe.compiler_options("cuda")


def test_a_recipe_changes_single_options():
    off, text, other = "xla_jf_bf16_propagation=", "xla_tpu_scoped_vmem_limit_kib=65536", "xla_enable_x=false"
    changed = mla_moe.compiler_options("tpu", (off, text, other))
    default = mla_moe.compiler_options("tpu")
    assert "xla_jf_bf16_propagation" in default
    assert changed.pop("xla_tpu_scoped_vmem_limit_kib") == "65536"
    assert changed.pop("xla_enable_x") is False
    assert changed == {name: value for name, value in default.items() if name != "xla_jf_bf16_propagation"}
    with pytest.raises(mla_moe.ConfigError, match=r"kernels\.compiler_options = 'fast': write xla_NAME=VALUE"):
        KernelConfig(compiler_options=("fast",))
