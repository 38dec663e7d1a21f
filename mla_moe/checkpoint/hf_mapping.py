"""The one place that knows Hugging Face names: which tensor is which part of which of our arrays.

The released checkpoints of DeepSeek-V2, V3, R1, Moonlight and Kimi-K2 share their names. Ours differ in layout: layers
are stacked in front, experts behind them, gate and up are one array, heads are an axis of their own, and a matrix is
[in, out] where PyTorch has [out, in].
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mla_moe.config import ModelConfig
from mla_moe.nn.abstract_model import AbstractModel

WHOLE = slice(None)
BLOCK_ROWS = 128


Slices = tuple[slice, ...]
Index = tuple[int | slice, ...]
"""A number or a slice for each axis; a number takes its axis away."""


class ShardSlice(NamedTuple):
    """Some rows of a tensor, and where they lie in our array."""

    rows: slice
    index: Index


class TensorMapping(NamedTuple):
    """One tensor of a file, and where it lies in one of our arrays."""

    name: str
    path: str
    index: Index
    """A number for each axis that is stacked in ours and split into tensors there; `WHOLE` for one that is kept."""
    rows: tuple[int, ...]
    """Sizes of our axes that, flattened, are the tensor's first axis."""
    columns: tuple[int, ...] = ()
    """The same for its second axis; empty for a vector."""
    transposed: bool = True
    """Ours has the columns' axes first."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return (math.prod(self.rows), math.prod(self.columns)) if self.columns else (math.prod(self.rows),)

    def window(self, kept: Slices) -> tuple[slice, slice]:
        """The tensor's rows and columns that hold a part of our kept axes. Only an axis that leads there is ever split:
        a mesh splits heads, but no head."""
        n = len(self.columns) if self.transposed else len(self.rows)
        first, second = kept[:n], kept[n:]
        rows, columns = (second, first) if self.transposed else (first, second)
        return _stretch(rows, self.rows), _stretch(columns, self.columns)

    def from_hf_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """The kept axes of our array, from a window of the tensor."""
        rows, columns = (
            (n // math.prod(sizes[1:]), *sizes[1:]) if sizes else ()
            for n, sizes in zip((*tensor.shape, 0), (self.rows, self.columns), strict=False)
        )
        if not self._turned:
            return tensor.reshape(rows + columns)
        return _transpose(tensor).reshape(columns + rows)

    def to_hf_tensor(self, array: np.ndarray) -> np.ndarray:
        """The tensor of the file, or some of its rows, from the kept axes of our array."""
        if not self._turned:
            return array.reshape(-1, *self.shape[1:])
        return _transpose(array.reshape(math.prod(array.shape[: len(self.columns)]), -1))

    @property
    def _turned(self) -> bool:
        return self.transposed and bool(self.columns)

    def cuts(self, part_bytes: int) -> Iterator[ShardSlice]:
        """The tensor in parts to be held in memory at a time: whole FP8 blocks, about `part_bytes` in float32."""
        inner = math.prod(self.rows[1:])
        whole = BLOCK_ROWS // math.gcd(inner, BLOCK_ROWS)
        step = max(part_bytes // (4 * inner * math.prod(self.columns)) // whole, 1) * whole
        axis = self.row_axis
        for start in range(0, self.rows[0], step):
            stop = min(start + step, self.rows[0])
            index = (*self.index[:axis], slice(start, stop), *self.index[axis + 1 :])
            yield ShardSlice(slice(start * inner, stop * inner), index)

    @property
    def row_axis(self) -> int:
        """The axis of ours that leads in the tensor."""
        kept = [axis for axis, i in enumerate(self.index) if not isinstance(i, int)]
        return kept[len(self.columns) if self.transposed else 0]


def _transpose(matrix: np.ndarray) -> np.ndarray:
    """A contiguous copy, a few rows at a time, which fill cache lines: three to six times as fast as all at once."""
    bits = matrix.view(f"u{matrix.itemsize}")
    out = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), 16):
        out[:, start : start + 16] = bits[start : start + 16].T
    return out.view(matrix.dtype)


def _stretch(cut: tuple[slice, ...], sizes: tuple[int, ...]) -> slice:
    if not sizes:
        return WHOLE
    assert all(c.indices(n) == (0, n, 1) for c, n in zip(cut[1:], sizes[1:], strict=True)), "an inner axis is split"
    start, stop, _ = cut[0].indices(sizes[0])
    inner = math.prod(sizes[1:])
    return slice(start * inner, stop * inner)


def tensor_mappings(abstract_model: AbstractModel) -> Iterator[TensorMapping]:
    """Every tensor of a file in the order of its layers. The embedding and the head come twice where a prediction
    module shares them: a released file repeats them in its layer."""
    cfg = abstract_model.cfg
    V, D = cfg.vocab_size, cfg.hidden_size
    yield TensorMapping("model.embed_tokens.weight", "embed", (WHOLE, WHOLE), (V,), (D,), transposed=False)
    for layer in range(cfg.num_hidden_layers):
        dense = layer < cfg.first_k_dense_replace
        stack, index = ("dense_layers", layer) if dense else ("moe_layers", layer - cfg.first_k_dense_replace)
        yield from _block(cfg, f"model.layers.{layer}", stack, (index,), experts=not dense)
    yield TensorMapping("model.norm.weight", "norm/scale", (WHOLE,), (D,))
    yield TensorMapping("lm_head.weight", "head", (WHOLE, WHOLE), (V,), (D,))
    if cfg.num_nextn_predict_layers:
        yield from _mtp(cfg)


def _mtp(cfg: ModelConfig) -> Iterator[TensorMapping]:
    """The prediction module stands at the index after the last layer, whatever that is."""
    layer, V, D = f"model.layers.{cfg.num_hidden_layers}", cfg.vocab_size, cfg.hidden_size
    embed, head = ("embed", "head") if cfg.mtp_shares_embedding else ("mtp/embed", "mtp/head")
    yield TensorMapping(f"{layer}.embed_tokens.weight", embed, (WHOLE, WHOLE), (V,), (D,), transposed=False)
    yield TensorMapping(f"{layer}.enorm.weight", "mtp/embedding_norm/scale", (WHOLE,), (D,))
    yield TensorMapping(f"{layer}.hnorm.weight", "mtp/hidden_norm/scale", (WHOLE,), (D,))
    yield TensorMapping(f"{layer}.eh_proj.weight", "mtp/project", (WHOLE, WHOLE), (D,), (2 * D,))
    yield from _block(cfg, layer, "mtp/block", (), experts=True)
    yield TensorMapping(f"{layer}.shared_head.norm.weight", "mtp/norm/scale", (WHOLE,), (D,))
    yield TensorMapping(f"{layer}.shared_head.head.weight", head, (WHOLE, WHOLE), (V,), (D,))


def _block(
    cfg: ModelConfig, theirs: str, ours: str, stack: tuple[int, ...], *, experts: bool
) -> Iterator[TensorMapping]:
    D, H, Q, C = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
    N, R, V = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim

    def piece(name, path, rows, columns=()):
        return TensorMapping(
            f"{theirs}.{name}", f"{ours}/{path}", stack + (WHOLE,) * len(rows + columns), rows, columns
        )

    def mlp(name, path, width, stack):
        for g, part in enumerate(("gate_proj", "up_proj")):
            index = (*stack, WHOLE, g, WHOLE)
            yield TensorMapping(f"{theirs}.{name}.{part}.weight", f"{ours}/{path}/gate_up", index, (width,), (D,))
        index = (*stack, WHOLE, WHOLE)
        yield TensorMapping(f"{theirs}.{name}.down_proj.weight", f"{ours}/{path}/down", index, (D,), (width,))

    yield piece("input_layernorm.weight", "attention_norm/scale", (D,))
    if Q is None:
        yield piece("self_attn.q_proj.weight", "attention/q", (H, N + R), (D,))
    else:
        yield piece("self_attn.q_a_proj.weight", "attention/q_a", (Q,), (D,))
        yield piece("self_attn.q_a_layernorm.weight", "attention/q_a_norm/scale", (Q,))
        yield piece("self_attn.q_b_proj.weight", "attention/q_b", (H, N + R), (Q,))
    yield piece("self_attn.kv_a_proj_with_mqa.weight", "attention/kv_a", (C + R,), (D,))
    yield piece("self_attn.kv_a_layernorm.weight", "attention/kv_a_norm/scale", (C,))
    yield piece("self_attn.kv_b_proj.weight", "attention/kv_b", (H, N + V), (C,))
    yield piece("self_attn.o_proj.weight", "attention/o", (D,), (H, V))
    yield piece("post_attention_layernorm.weight", "mlp_norm/scale", (D,))
    if not experts:
        yield from mlp("mlp", "mlp", cfg.intermediate_size, stack)
        return
    E, F = cfg.n_routed_experts, cfg.moe_intermediate_size
    yield piece("mlp.gate.weight", "moe/router/weight", (E,), (D,))
    if cfg.topk_method == "noaux_tc":
        yield piece("mlp.gate.e_score_correction_bias", "moe/router/bias", (E,))
    for e in range(E):
        yield from mlp(f"mlp.experts.{e}", "moe", F, (*stack, e))
    if cfg.n_shared_experts:
        yield from mlp("mlp.shared_experts", "moe/shared", cfg.n_shared_experts * F, stack)
