"""Kernels follow the target of a program, not what is attached; the replacement of one that cannot run is logged."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from mla_moe.ops import kernel_choice
from mla_moe.ops.kernel_choice import (
    default_attention_kernel,
    default_grouped_matmul_kernel,
    supported_attention_kernel,
    supported_grouped_matmul_kernel,
)


@pytest.fixture
def target(monkeypatch):
    """Set the target to an absent GPU."""

    def set_target(kind, capability):
        device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(kernel_choice, "get_default_device", lambda: device)
        monkeypatch.setattr("importlib.util.find_spec", lambda package: package)
        kernel_choice.log_fallback.cache_clear()

    return set_target


def test_the_default_kernels_depend_on_the_platform():
    platforms = "tpu", "gpu", "cpu"
    assert [default_grouped_matmul_kernel(p) for p in platforms] == ["megablox", "tokamax", "chunks"]
    assert [default_attention_kernel(p) for p in platforms] == ["splash", "tokamax", "blockwise"]
    assert default_grouped_matmul_kernel() == "chunks"


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "reason"),
    [
        ("9.0", jnp.bfloat16, 192, None),
        ("10.0", jnp.float16, 256, None),
        ("8.0", jnp.bfloat16, 192, None),
        ("7.5", jnp.bfloat16, 192, "compute capability 8 or more, not NVIDIA X"),
        ("9.0", jnp.float32, 192, "float32: needs bfloat16 or float16"),
        ("9.0", jnp.bfloat16, 576, "widths (576, 128): at most 256"),
    ],
)
def test_tokamax_is_replaced_where_it_cannot_run(target, caplog, capability, dtype, width, reason):
    target("NVIDIA X", capability)
    sizes = {"queries": 64, "tokens": 64, "widths": (width, 128)}
    chosen = {supported_attention_kernel(None, dtype, **sizes) for _ in range(2)}
    assert chosen == {"tokamax" if reason is None else "blockwise"}
    assert [reason in record.getMessage() for record in caplog.records] == ([] if reason is None else [True])
    if width < 256:
        assert supported_grouped_matmul_kernel(None, dtype) == ("tokamax" if reason is None else "blocks")


def test_without_tokamax_the_fallback_names_the_extra(target, caplog, monkeypatch):
    target("NVIDIA X", "9.0")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert supported_grouped_matmul_kernel("tokamax", jnp.bfloat16) == "blocks"
    assert supported_grouped_matmul_kernel("blocks", jnp.bfloat16) == "blocks"
    assert [r.getMessage() for r in caplog.records] == [
        "grouped matmul: using blocks instead of tokamax: tokamax is not installed; with Python 3.12 or later: "
        "pip install 'mla_moe[cuda]'"
    ]
