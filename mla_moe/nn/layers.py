"""Small layers that blocks are built of: RMSNorm, the gated MLP, and the token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mla_moe.config import ModelConfig, require
from mla_moe.nn.lora import project
from mla_moe.nn.param import Precision, matrix, scale
from mla_moe.ops.experts import Activation, gated
from mla_moe.parallel.collectives import all_gather, all_to_all, axis_index, psum, shard_map
from mla_moe.parallel.mesh import BATCH_SPEC, token_mesh
from mla_moe.parallel.sharded_einsum import Einsum, sharded_einsum

Activations = Float[Array, "B T D"]
Mask = Bool[Array, "B T"]
Ids = Int[Array, "B T"]
"""Token ids, segment ids or positions."""


def shape_text(x: Array) -> str:
    """Dtype and shape, as in `float32[2, 8]`."""
    return f"{x.dtype}{list(x.shape)}"


def require_shape(name: str, x: Array, *sizes: int | str) -> tuple[int, ...]:
    """The shape of an argument. Raises `ConfigError` if it does not have these sizes; a string is any size."""
    fits = x.ndim == len(sizes) and all(isinstance(n, str) or n == m for n, m in zip(sizes, x.shape, strict=True))
    require(fits, name, shape_text(x), f"the shape must be [{', '.join(map(str, sizes))}]")
    return x.shape


class RMSNorm(nnx.Module):
    """Root-mean-square norm `x / sqrt(mean(x²) + eps) · scale`, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, axis: str, width: int, eps: float, precision: Precision):
        self.scale = scale(axis, width, precision.param)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm `(x - mean(x)) / sqrt(var(x) + eps) · scale + bias`, computed in float32 (arXiv 1607.06450)."""

    def __init__(self, axis: str, width: int, eps: float, precision: Precision):
        self.scale, self.bias = scale(axis, width, precision.param), scale(axis, width, precision.param, fill=0.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        x32 -= x32.mean(axis=-1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """Gated MLP `(activation(x · gate) * (x · up)) · down` (with silu SwiGLU, arXiv 2002.05202), used by the dense
    first layers and the shared experts. Gate and up projection are one parameter."""

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        std: float,
        activation: Activation = jax.nn.silu,
        rngs: nnx.Rngs,
        precision: Precision,
    ):
        gate_up = {"embed": hidden_size, "gate_up": 2, "hidden": width}
        down = {"hidden": width, "embed": hidden_size}
        self.gate_up = matrix(rngs, gate_up, contracts=("embed",), std=std, dtype=precision.param)
        self.down = matrix(rngs, down, contracts=("hidden",), std=std, dtype=precision.param)
        self.activation, self.precision = activation, precision

    def __call__(
        self, x_BTD: Activations, einsum: Einsum = sharded_einsum, adapter_ids: Int[Array, "*N"] | None = None
    ) -> Activations:
        """For training; with `plain_einsum` for prefill and decode. `adapter_ids`: see `project`."""
        compute = self.precision.compute
        gu_BT2F = project(einsum, "BTD,DgF->BTgF", x_BTD, self, "gate_up", compute, adapter_ids)
        h_BTF = gated(gu_BT2F, 2, self.activation)[:, :, 0]
        return project(einsum, "BTF,FD->BTD", h_BTF, self, "down", compute, adapter_ids)


def token_embedding(cfg: ModelConfig, rngs: nnx.Rngs, precision: Precision) -> nnx.Param:
    """The parameter of the token embedding `[V, D]`."""
    axes, std = {"vocab": cfg.vocab_size, "embed": cfg.hidden_size}, cfg.initializer_range
    return matrix(rngs, axes, contracts=(), std=std, dtype=precision.param, role="embedding")


def output_head(cfg: ModelConfig, rngs: nnx.Rngs, precision: Precision) -> nnx.Param:
    """The parameter of the output head `[D, V]`."""
    axes, std = {"embed": cfg.hidden_size, "vocab": cfg.vocab_size}, cfg.initializer_range
    return matrix(rngs, axes, contracts=("embed",), std=std, dtype=precision.param, role="embedding")


def embedding_lookup(table_VD: Float[Array, "V D"], tokens_BT: Ids) -> Activations:
    """Embeddings of tokens. Under a mesh the table stays sharded: each device looks up its shard of the embeddings of
    all tokens along its `fsdp` axis, and an all-to-all exchanges N · D values, where the full table has V · D."""
    mesh = token_mesh(tokens_BT.shape)
    if mesh is None:
        return table_VD[tokens_BT]
    V, D = table_VD.shape
    vocab = "tensor" if V % mesh.shape["tensor"] == 0 else None
    embed = "fsdp" if D % mesh.shape["fsdp"] == 0 else None

    def local(table_vd: Array, tokens_bt: Array) -> Array:
        if embed:
            tokens_bt = all_gather(tokens_bt, embed)
        if vocab:
            tokens_bt -= axis_index(vocab) * len(table_vd)
        x_btd = table_vd.at[tokens_bt].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        if vocab:
            x_btd = psum(x_btd, vocab)
        return all_to_all(x_btd, embed, split_axis=0, concat_axis=2) if embed else x_btd

    return shard_map(local, (P(vocab, embed), BATCH_SPEC), BATCH_SPEC)(table_VD, tokens_BT)
