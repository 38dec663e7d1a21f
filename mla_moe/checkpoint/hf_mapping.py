"""The mapping between tensors of Hugging Face checkpoints and our parameters.

Architectures have the names of DeepSeek-V3, or say how theirs differ (`config.architectures`). Parameters have another
layout than tensors: layers are stacked along the first axis and experts along the next, gate and up projections are one
array, heads have their own axis, and a matrix is [in, out] where PyTorch has [out, in].
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mla_moe.config import ModelConfig

ALL = slice(None)
BLOCK_ROWS = 128
"""Rows of an FP8 block."""
READ_BYTES = 16 << 20
"""About as many bytes, in float32, are read at a time by a conversion."""

Index = tuple[int | slice, ...]
"""A number or a slice for each axis; a number removes the axis."""


class TensorMapping(NamedTuple):
    """A Hugging Face tensor, a vector or a matrix, and the elements of a parameter that it holds. Where the matrices of
    all experts are one tensor `[E, rows, columns]`, it is one of them: rows of `[E · rows, columns]`."""

    name: str
    path: str
    """The parameter's path."""
    index: Index
    """For each axis of the parameter a number, if it is stacked there and separate tensors here, else `ALL`."""
    row_sizes: tuple[int, ...]
    """Sizes of the parameter's axes that are flattened into the tensor's first axis."""
    column_sizes: tuple[int, ...] = ()
    """Sizes of the axes that are flattened into its second axis; empty for a vector."""
    first_row: int = 0
    """The matrix's first row in the tensor of all experts."""
    stacked_shape: tuple[int, ...] = ()
    """The shape of that tensor; empty: the tensor is this matrix or vector."""

    @property
    def transposed(self) -> bool:
        """Whether the parameter has the column axes before the row axes: every matrix but an embedding."""
        return bool(self.column_sizes) and not self.path.endswith("embed")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the vector or matrix."""
        rows = math.prod(self.row_sizes)
        return (rows, math.prod(self.column_sizes)) if self.column_sizes else (rows,)

    def hf_slices(self, kept: tuple[slice, ...]) -> tuple[slice, slice]:
        """The tensor's rows and columns that hold a slice of the parameter's kept axes. Of flattened axes only the
        first can be sliced: a mesh shards heads, but not the dimensions within a head."""
        n = len(self.column_sizes) if self.transposed else len(self.row_sizes)
        first, second = kept[:n], kept[n:]
        rows, columns = (second, first) if self.transposed else (first, second)
        return self._shifted(_flat_slice(rows, self.row_sizes)), _flat_slice(columns, self.column_sizes)

    def from_hf_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter's kept axes, from the tensor or the part of it that `hf_slices` gives."""
        rows, columns = (
            (n // math.prod(sizes[1:]), *sizes[1:]) if sizes else ()
            for n, sizes in zip((*tensor.shape, 0), (self.row_sizes, self.column_sizes), strict=False)
        )
        return _transpose(tensor).reshape(columns + rows) if self.transposed else tensor.reshape(rows + columns)

    def to_hf_tensor(self, array: np.ndarray) -> np.ndarray:
        """The tensor, or some of its rows, from the parameter's kept axes."""
        if not self.transposed:
            return array.reshape(-1, *self.shape[1:])
        return _transpose(array.reshape(math.prod(array.shape[: len(self.column_sizes)]), -1))

    def row_slices(self) -> Iterator[tuple[slice, Index]]:
        """Slices of rows to read one at a time, complete FP8 blocks of about `READ_BYTES` in float32, each with the
        index of the same elements in the parameter."""
        inner = math.prod(self.row_sizes[1:])
        multiple = BLOCK_ROWS // math.gcd(inner, BLOCK_ROWS)
        step = rows_per_read(inner * math.prod(self.column_sizes), multiple)
        kept = [axis for axis, i in enumerate(self.index) if not isinstance(i, int)]
        axis = kept[len(self.column_sizes) if self.transposed else 0]  # the first of the row axes
        for start in range(0, self.row_sizes[0], step):
            stop = min(start + step, self.row_sizes[0])
            index = (*self.index[:axis], slice(start, stop), *self.index[axis + 1 :])
            yield self._shifted(slice(start * inner, stop * inner)), index

    def _shifted(self, rows: slice) -> slice:
        return slice(self.first_row + rows.start, self.first_row + rows.stop)


def rows_per_read(row_size: int, multiple: int) -> int:
    """The multiple of `multiple` whose rows of `row_size` elements are about `READ_BYTES` in float32, at least one."""
    return max(READ_BYTES // (4 * row_size) // multiple, 1) * multiple


def is_router_bias(name: str) -> bool:
    """Whether a tensor is a router bias, which keeps its dtype in conversions."""
    return name.endswith(".e_score_correction_bias")


def _transpose(matrix: np.ndarray) -> np.ndarray:
    """A contiguous transposed copy. 16 rows at a time, which fill cache lines: 3 to 6 times as fast as all at once."""
    bits = matrix.view(f"u{matrix.itemsize}")
    out = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), 16):
        out[:, start : start + 16] = bits[start : start + 16].T
    return out.view(matrix.dtype)


def _flat_slice(slices: tuple[slice, ...], sizes: tuple[int, ...]) -> slice:
    if not sizes:
        return ALL
    inner_axes = zip(slices[1:], sizes[1:], strict=True)
    assert all(s.indices(n) == (0, n, 1) for s, n in inner_axes), "an inner axis is sharded"
    start, stop, _ = slices[0].indices(sizes[0])
    inner = math.prod(sizes[1:])
    return slice(start * inner, stop * inner)


def tensor_mappings(cfg: ModelConfig, *, copies: bool = True) -> Iterator[TensorMapping]:
    """All tensors, layer by layer, under the names of the model's architecture. The embedding and the head come twice
    if an MTP module shares them: released files repeat them in its layer. Without `copies` each element of a parameter
    comes once."""
    architecture = cfg.architecture
    for mapping in _mappings(cfg, copies):
        if architecture.stacked_experts and (match := _EXPERT.fullmatch(mapping.name)):
            mapping = _stacked(cfg, mapping, *match.groups())
        yield mapping._replace(name=architecture.tensor_name(mapping.name))


_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def _stacked(cfg: ModelConfig, mapping: TensorMapping, prefix: str, expert: str, part: str) -> TensorMapping:
    """A matrix as a part of the tensor of all experts: `gate_up_proj` `[E, 2F, D]` or `down_proj` `[E, D, F]`."""
    E, D, F = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
    name, shape = ("down_proj", (E, D, F)) if part == "down" else ("gate_up_proj", (E, 2 * F, D))
    first_row = int(expert) * shape[1] + (F if part == "up" else 0)
    return mapping._replace(name=f"{prefix}.{name}", first_row=first_row, stacked_shape=shape)


def by_tensor(mappings: Iterable[TensorMapping]) -> list[list[TensorMapping]]:
    """The mappings of each tensor, in the order of its rows."""
    groups: dict[str, list[TensorMapping]] = {}
    for mapping in mappings:
        groups.setdefault(mapping.name, []).append(mapping)
    return list(groups.values())


def _mappings(cfg: ModelConfig, copies: bool) -> Iterator[TensorMapping]:
    """`tensor_mappings` under the names of DeepSeek-V3."""
    V, D = cfg.vocab_size, cfg.hidden_size
    yield TensorMapping("model.embed_tokens.weight", "embed", (ALL, ALL), (V,), (D,))
    for layer in range(cfg.num_hidden_layers):
        prefix, dense = f"model.layers.{layer}", layer < cfg.first_k_dense_replace
        stack, index = ("dense_layers", layer) if dense else ("moe_layers", layer - cfg.first_k_dense_replace)
        if cfg.moe_shortcut:  # the experts of a pair of layers have the names of its first layer
            index, second = divmod(index, cfg.layers_per_moe)
            path = f"{stack}/{'second' if second else 'first'}"
            yield from _block(cfg, prefix, path, (index,), experts=False)
            if not second:
                yield from _experts(cfg, prefix, stack, (index,))
            continue
        yield from _block(cfg, prefix, stack, (index,), experts=not dense)
        if cfg.index_topk is not None and not cfg.shared_indexers[layer]:
            first = 0 if dense else cfg.first_k_dense_replace
            own = cfg.shared_indexers[first:layer].count(False)
            yield from _indexer(cfg, prefix, stack, (own,))
    yield TensorMapping("model.norm.weight", "norm/scale", (ALL,), (D,))
    if not cfg.tie_word_embeddings:
        yield TensorMapping("lm_head.weight", "head", (ALL, ALL), (V,), (D,))
    if not cfg.num_nextn_predict_layers:
        return
    mtp = f"model.layers.{cfg.num_hidden_layers}"
    head = "embed" if cfg.tie_word_embeddings else "head"
    embed, head = ("embed", head) if cfg.mtp_shares_embedding else ("mtp/embed", "mtp/head")
    copies = copies or not cfg.mtp_shares_embedding
    if copies:
        yield TensorMapping(f"{mtp}.embed_tokens.weight", embed, (ALL, ALL), (V,), (D,))
    yield TensorMapping(f"{mtp}.enorm.weight", "mtp/embedding_norm/scale", (ALL,), (D,))
    yield TensorMapping(f"{mtp}.hnorm.weight", "mtp/hidden_norm/scale", (ALL,), (D,))
    yield TensorMapping(f"{mtp}.eh_proj.weight", "mtp/project", (ALL, ALL), (D,), (2 * D,))
    yield from _block(cfg, mtp, "mtp/block", (), experts=True)
    if cfg.index_topk is not None:
        yield from _indexer(cfg, mtp, "mtp/block", ())
    yield TensorMapping(f"{mtp}.shared_head.norm.weight", "mtp/norm/scale", (ALL,), (D,))
    if copies:
        yield TensorMapping(f"{mtp}.shared_head.head.weight", head, (ALL, ALL), (V,), (D,))


def _block(
    cfg: ModelConfig, prefix: str, path_prefix: str, layer_index: tuple[int, ...], *, experts: bool
) -> Iterator[TensorMapping]:
    """The tensors of one block. `layer_index` is empty for a block that is not stacked."""
    D, H, Q, C = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
    N, R, V = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim

    def mapped(name: str, path: str, rows: tuple[int, ...], columns: tuple[int, ...] = ()) -> TensorMapping:
        index = layer_index + (ALL,) * len(rows + columns)
        return TensorMapping(f"{prefix}.{name}", f"{path_prefix}/{path}", index, rows, columns)

    yield mapped("input_layernorm.weight", "attention_norm/scale", (D,))
    if Q is None:
        yield mapped("self_attn.q_proj.weight", "attention/q", (H, N + R), (D,))
    else:
        yield mapped("self_attn.q_a_proj.weight", "attention/q_a", (Q,), (D,))
        yield mapped("self_attn.q_a_layernorm.weight", "attention/q_a_norm/scale", (Q,))
        yield mapped("self_attn.q_b_proj.weight", "attention/q_b", (H, N + R), (Q,))
    yield mapped("self_attn.kv_a_proj_with_mqa.weight", "attention/kv_a", (C + R,), (D,))
    yield mapped("self_attn.kv_a_layernorm.weight", "attention/kv_a_norm/scale", (C,))
    yield mapped("self_attn.kv_b_proj.weight", "attention/kv_b", (H, N + V), (C,))
    yield mapped("self_attn.o_proj.weight", "attention/o", (D,), (H, V))
    yield mapped("post_attention_layernorm.weight", "mlp_norm/scale", (D,))
    if experts:
        yield from _experts(cfg, prefix, path_prefix, layer_index)
        if cfg.post_mlp_norm:
            yield mapped("post_mlp_layernorm.weight", "moe_norm/scale", (D,))
    else:
        yield from _mlp(f"{prefix}.mlp", f"{path_prefix}/mlp", layer_index, D, cfg.intermediate_size)


def _experts(cfg: ModelConfig, prefix: str, path_prefix: str, layer_index: tuple[int, ...]) -> Iterator[TensorMapping]:
    """The tensors of one mixture of experts."""
    D, F, E = cfg.hidden_size, cfg.moe_intermediate_size, cfg.moe.router_width
    name, path = f"{prefix}.mlp", f"{path_prefix}/moe"
    yield TensorMapping(f"{name}.gate.weight", f"{path}/router/weight", (*layer_index, ALL, ALL), (E,), (D,))
    if cfg.topk_method == "noaux_tc":
        yield TensorMapping(f"{name}.gate.e_score_correction_bias", f"{path}/router/bias", (*layer_index, ALL), (E,))
    for e in range(cfg.n_routed_experts):
        yield from _mlp(f"{name}.experts.{e}", path, (*layer_index, e), D, F)
    if cfg.n_shared_experts:
        yield from _mlp(f"{name}.shared_experts", f"{path}/shared", layer_index, D, cfg.n_shared_experts * F)


def _mlp(name: str, path: str, index: tuple[int, ...], D: int, F: int) -> Iterator[TensorMapping]:
    """The three matrices of one MLP or expert of width D and hidden width F."""
    for g, part in enumerate(("gate_proj", "up_proj")):
        yield TensorMapping(f"{name}.{part}.weight", f"{path}/gate_up", (*index, ALL, g, ALL), (F,), (D,))
    yield TensorMapping(f"{name}.down_proj.weight", f"{path}/down", (*index, ALL, ALL), (D,), (F,))


def _indexer(cfg: ModelConfig, prefix: str, path_prefix: str, layer_index: tuple[int, ...]) -> Iterator[TensorMapping]:
    """The tensors of the indexer of one block."""
    D, H, width = cfg.hidden_size, cfg.index_n_heads, cfg.index_head_dim
    assert cfg.q_lora_rank is not None  # `AttentionConfig`
    tensors: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...]], ...] = (
        ("wq_b.weight", "q", (H, width), (cfg.q_lora_rank,)),
        ("wk.weight", "k", (width,), (D,)),
        ("k_norm.weight", "k_norm/scale", (width,), ()),
        ("k_norm.bias", "k_norm/bias", (width,), ()),
        ("weights_proj.weight", "head_weights", (H,), (D,)),
    )
    for name, path, rows, columns in tensors:
        index = layer_index + (ALL,) * len(rows + columns)
        name, path = f"{prefix}.self_attn.indexer.{name}", f"{path_prefix}/attention/indexer/{path}"
        yield TensorMapping(name, path, index, rows, columns)
