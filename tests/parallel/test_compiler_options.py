import jax
import jax.numpy as jnp
import pytest

import mla_moe
from mla_moe.config import KernelConfig


def test_options_are_accepted_by_the_compiler_and_change_the_program():
    """On CPU attention's batched matmuls are Eigen's, which their names in the compiled program tell."""
    x = jnp.ones((4, 32, 32))
    compiled = [
        jax.jit(lambda x: x @ x, compiler_options=options).lower(x).compile().as_text()
        for options in (None, mla_moe.compiler_options())
    ]
    assert compiled[0] != compiled[1]


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
