"""Small layers that blocks are built of: RMSNorm, the gated MLP, and the token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mla_moe.config import ModelConfig
from mla_moe.nn.param import Embedding, Precision, matrix, scale
from mla_moe.ops.experts import swiglu
from mla_moe.parallel.mesh import BATCH_SPEC, require_auto_axes, token_mesh
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum


class RMSNorm(nnx.Module):
    """Root-mean-square norm `x / sqrt(mean(x²) + eps) · scale`, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, axis: str, width: int, eps: float, precision: Precision):
        self.scale = scale(axis, width, precision.param)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """Gated MLP `(silu(x · gate) * (x · up)) · down` (SwiGLU, arXiv 2002.05202), used by the dense first layers and the
    shared experts. Gate and up projection are one parameter."""

    def __init__(self, cfg: ModelConfig, width: int, *, rngs: nnx.Rngs, precision: Precision):
        D = cfg.hidden_size
        std = cfg.initializer_range
        gate_up, down = {"embed": D, "gate_up": 2, "hidden": width}, {"hidden": width, "embed": D}
        self.gate_up = matrix(rngs, gate_up, contracts=("embed",), std=std, dtype=precision.param)
        self.down = matrix(rngs, down, contracts=("hidden",), std=std, dtype=precision.param)
        self.precision = precision

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """For training."""
        return self._run(x_BTD, sharded_einsum)

    def extend(self, x_bTD: Float[Array, "b T D"]) -> Float[Array, "b T D"]:
        """The same for prefill and decode."""
        return self._run(x_bTD, plain_einsum)

    def _run(self, x_BTD: Float[Array, "B T D"], einsum: Einsum) -> Float[Array, "B T D"]:
        gu_BT2F = einsum("BTD,DgF->BTgF", x_BTD, self.gate_up, self.precision.compute)
        h_BTF = swiglu(gu_BT2F, 2)[:, :, 0]
        return einsum("BTF,FD->BTD", h_BTF, self.down, self.precision.compute)


def embedding_and_head(cfg: ModelConfig, rngs: nnx.Rngs, precision: Precision) -> tuple[nnx.Param, nnx.Param]:
    """Parameters of the token embedding `[V, D]` and of the output head `[D, V]`."""
    V, D, std, dtype = cfg.vocab_size, cfg.hidden_size, cfg.initializer_range, precision.param
    embed = matrix(rngs, {"vocab": V, "embed": D}, contracts=(), std=std, dtype=dtype, kind=Embedding)
    head = matrix(rngs, {"embed": D, "vocab": V}, contracts=("embed",), std=std, dtype=dtype, kind=Embedding)
    return embed, head


def embedding_lookup(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Embeddings of tokens. Under a mesh the table stays sharded: each device looks up its shard of the embeddings of
    all tokens along its `fsdp` axis, and an all-to-all exchanges N · D values, where the full table has V · D."""
    require_auto_axes(tokens_BT)
    mesh = token_mesh(tokens_BT.shape)
    if mesh is None:
        return table_VD[tokens_BT]
    V, D = table_VD.shape
    vocab = "tensor" if V % mesh.shape["tensor"] == 0 else None
    embed = "fsdp" if D % mesh.shape["fsdp"] == 0 else None

    def local(table_vd: Array, tokens_bt: Array) -> Array:
        if embed:
            tokens_bt = jax.lax.all_gather(tokens_bt, embed, tiled=True)
        if vocab:
            tokens_bt -= jax.lax.axis_index(vocab) * len(table_vd)
        x_btd = table_vd.at[tokens_bt].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        if vocab:
            x_btd = jax.lax.psum(x_btd, vocab)
        return jax.lax.all_to_all(x_btd, embed, split_axis=0, concat_axis=2, tiled=True) if embed else x_btd

    return jax.shard_map(local, in_specs=(P(vocab, embed), P(*BATCH_SPEC)), out_specs=P(*BATCH_SPEC), check_vma=False)(
        table_VD, tokens_BT
    )
