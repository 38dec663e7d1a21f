"""Several LoRA adapters of one model at a time, for inference: each sequence of a batch has one of them, or none."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from mla_moe.config import require
from mla_moe.nn.lora import RANK, LoRA, adaptable, adapter_axes
from mla_moe.nn.transformer import Transformer
from mla_moe.parallel.sharding import axis_metadata


class AdapterWeights(NamedTuple):
    """The adapters of one model's matrices."""

    scales: Mapping[str, float]
    """Scale by path of the matrix, such as `moe_layers/attention/q_b`."""
    factors: Mapping[str, np.ndarray]
    """Factors A and B by path, such as `moe_layers/attention/lora/q_b/a`."""


class StackedLoRA(LoRA):
    """The adapters of one weight, concatenated along the rank (`ops.lora`). Adapters are numbered from 1 on; 0 is the
    weight alone."""

    def __init__(self, weight: nnx.Param, parts: Mapping[int, tuple[np.ndarray, np.ndarray]]):
        """`parts` are A and scale · B of each adapter that this weight has."""
        axes = adapter_axes(weight)
        a, b = (
            np.concatenate([part[i] for part in parts.values()], axis=names.index(RANK)) for i, names in enumerate(axes)
        )
        # A router is float32 in every layout of the weights.
        role: dict[str, Any] = {} if "router" in weight.get_metadata("out_sharding") else {"role": "matrix"}
        role_a = role | {"contracts": weight.get_metadata("contracts")}
        role_b: dict[str, Any] = role | {"contracts": (RANK,)}
        self.a = nnx.Param(jnp.asarray(a, jnp.float32), **role_a, **axis_metadata(axes.a))
        self.b = nnx.Param(jnp.asarray(b, jnp.float32), **role_b, **axis_metadata(axes.b))
        self.scale, self.dropout = 1.0, 0.0
        self.adapter_of_column = tuple(i for i, (a, _) in parts.items() for _ in range(a.shape[-1]))

    def own(self, adapter_ids: Int[Array, "*N"] | None) -> Bool[Array, "*N r"]:
        fix = "is required for a model with several adapters; give the adapter of each sequence, 0 for none"
        require(adapter_ids is not None, "adapter_ids", None, fix)
        assert adapter_ids is not None
        return adapter_ids[..., None] == jnp.asarray(self.adapter_of_column, adapter_ids.dtype)


def stack_adapters(model: Transformer, adapters: Sequence[AdapterWeights]) -> Transformer:
    """The model, whose arrays it shares, with these adapters, numbered from 1 on. It must have none before."""
    model = nnx.merge(*nnx.split(model))
    for keys, weight in list(adaptable(model)):
        parent, name = "/".join(map(str, keys[:-1])), keys[-1]
        parts = {}
        for number, (scales, factors) in enumerate(adapters, start=1):
            if (scale := scales.get(f"{parent}/{name}")) is not None:
                a, b = (factors[f"{parent}/lora/{name}/{factor}"] for factor in "ab")
                parts[number] = a, np.float32(scale) * b
        if parts:
            module: Any = model
            for key in keys[:-1]:
                module = getattr(module, key)
            if not hasattr(module, "lora"):
                module.lora = nnx.Dict()
            module.lora[name] = StackedLoRA(weight, parts)
    return model
