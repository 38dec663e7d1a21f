"""How checkpoints quantize matrices: what `quantization_config` says, and the tensors that hold a quantized matrix.

Read are FP8 blocks as DeepSeek releases them, with scales in float32 or UE8M0 (`fp8.py`), and INT4, INT8 and FP8 of
compressed-tensors (`compressed_tensors.py`), among them the experts of Kimi-K2.5. Which matrices are quantized, the
tensors themselves say, so the patterns of a file from elsewhere are never run. Written are FP8 blocks and INT4.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from mla_moe.checkpoint.files import check
from mla_moe.checkpoint.hf_mapping import TensorMapping
from mla_moe.config import ModelConfig, require

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
Quantize = Literal["fp8", "int4"]

_ENTRY = "quantization_config"
_TENSOR = 1 << 62
"""Rows or columns of a block that has all of them."""


class Scheme(NamedTuple):
    """How a matrix is quantized: `weight = code · scale`, with a scale for each block."""

    method: str
    """`quant_method`, which the names of the tensors depend on."""
    kind: str
    """Codes are "float" (E4M3) or "int"."""
    bits: int
    block: tuple[int, int]
    """Rows and columns of a block."""
    packed: bool = False
    """Whether the codes of a row are packed into int32, with an offset that makes them positive."""

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype(np.int32) if self.packed else E4M3 if self.kind == "float" else np.dtype(np.int8)

    @property
    def is_grouped(self) -> bool:
        """Whether a row has several scales, as far as the scheme tells."""
        return self.block[1] < _TENSOR

    def code_name(self, name: str) -> str:
        return f"{name}_packed" if self.packed else name

    def scale_name(self, name: str) -> str:
        return f"{name}_scale_inv" if self.method == "fp8" else f"{name}_scale"

    def shape_name(self, name: str) -> str:
        """The tensor with the matrix's shape, which packed codes do not show."""
        return f"{name}_shape"

    def companions(self, name: str) -> list[str]:
        """All tensors beside the codes that a checkpoint may have of a matrix. The scale of its inputs belongs to
        quantized products only."""
        return [self.scale_name(name), self.shape_name(name), f"{name.removesuffix('weight')}input_scale"]

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], -(-shape[-1] * self.bits // 32)) if self.packed else shape

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a matrix's scales. The last block of a row or column may be partial."""
        return tuple(-(-n // b) for n, b in zip(shape, self.block, strict=True))

    def selects(self, name: str) -> bool:
        """Whether a conversion to this scheme quantizes a tensor: for FP8 all projections, as in DeepSeek's releases,
        and those of an indexer but for the weights of its heads; for INT4 those of the routed experts, as in Kimi's."""
        return (_PROJECTION if self.kind == "float" else _EXPERT).search(name) is not None


class StoredMatrix(NamedTuple):
    """A quantized matrix as a Hugging Face directory has it, `[outputs, inputs]`."""

    mapping: TensorMapping
    scheme: Scheme
    codes: np.ndarray
    scale: np.ndarray


FP8_BLOCKS = Scheme("fp8", "float", 8, (128, 128))
INT4_GROUPS = Scheme("compressed-tensors", "int", 4, (1, 32), packed=True)
TARGETS: Mapping[str, Scheme] = {"fp8": FP8_BLOCKS, "int4": INT4_GROUPS}

_PROJECTION = re.compile(r"\.(self_attn|mlps?)\.((?!indexer\.).*_proj(_with_mqa)?|indexer\.(wq_b|wk))\.weight$")
_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.\w+_proj\.weight$")
_NEVER_CONVERTED = re.compile(r"(embed_tokens|lm_head|mlp\.gate|eh_proj|shared_head\.head)$")
"""Modules that readers of FP8 blocks leave alone without being told."""
_FP8_CONFIG: Mapping[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_INT4_IGNORE = (
    "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "re:.*lm_head.*",
    "re:.*eh_proj.*", "re:.*shared_head.*", "re:.*mlps.*", r"re:.*mlp\.router.*",
)  # fmt: skip
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_DEQUANTIZE = "is not read; use the release in bfloat16, FP8 or compressed-tensors INT4, or write bfloat16 with"
_REFUSED = {
    "awq": "AWQ", "gptq": "GPTQ", "mxfp4": "MXFP4", "modelopt": "ModelOpt (NVFP4)", "quark": "Quark (MXFP4)",
    "bitsandbytes": "bitsandbytes",
}  # fmt: skip


def quantization_config(config: Mapping[str, Any]) -> Any:
    """The entry of a `config.json`, also of one whose `text_config` has it: a language model beside a vision tower."""
    text = config.get("text_config")
    return config.get(_ENTRY) or (text.get(_ENTRY) if isinstance(text, dict) else None)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` without that entry, wherever it is: it describes other weights than those that are written."""
    config = {key: value for key, value in config.items() if key != _ENTRY}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in text.items() if key != _ENTRY}
    return config


def read_schemes(config: Mapping[str, Any]) -> list[Scheme]:
    """The schemes that a `config.json` names; DeepSeek's FP8 blocks if it names none. Raises `ConfigError` for kinds of
    quantization that are not read."""
    given = quantization_config(config)
    if given is None:
        return [FP8_BLOCKS]
    require(isinstance(given, dict), _ENTRY, given, "must be an object")
    method = given.get("quant_method", "fp8")
    if method == "compressed-tensors":
        return _compressed_tensors(given)
    if isinstance(method, str) and (known := _REFUSED.get(method)):
        require(False, f"{_ENTRY}.quant_method", method, f"{known} {_DEQUANTIZE} the library that made it")
    require(method == "fp8", f"{_ENTRY}.quant_method", method, "only 'fp8' and 'compressed-tensors' are read")
    fmt, block = given.get("fmt", "e4m3"), given.get("weight_block_size", [128, 128])
    require(fmt in ("e4m3", "float8_e4m3fn"), f"{_ENTRY}.fmt", fmt, "only 'e4m3' is read")
    ok = isinstance(block, list) and len(block) == 2 and all(_is_size(n) for n in block)
    require(ok, f"{_ENTRY}.weight_block_size", block, "must be two positive integers")
    return [FP8_BLOCKS._replace(block=tuple(block))]


def _is_size(n: Any) -> bool:
    return type(n) is int and 0 < n < _TENSOR


def _compressed_tensors(given: Mapping[str, Any]) -> list[Scheme]:
    format_name, groups = given.get("format"), given.get("config_groups")
    require(
        format_name in (*_FORMATS, "mixed-precision"),
        f"{_ENTRY}.format",
        format_name,
        f"{_DEQUANTIZE} compressed-tensors",
    )
    ok = isinstance(groups, dict) and groups and all(isinstance(group, dict) for group in groups.values())
    require(ok, f"{_ENTRY}.config_groups", groups, "must be an object of groups")
    assert isinstance(groups, dict)
    return [_group(f"{_ENTRY}.config_groups.{name}", group, format_name) for name, group in groups.items()]


def _group(field: str, group: Mapping[str, Any], default_format: Any) -> Scheme:
    format_name = group.get("format") or default_format
    require(format_name in _FORMATS, f"{_ENTRY}.format", format_name, f"{_DEQUANTIZE} compressed-tensors")
    weights = group.get("weights")
    require(isinstance(weights, dict), f"{field}.weights", weights, "must be an object")
    assert isinstance(weights, dict)
    only: Mapping[str, tuple[Any, ...]] = {
        "symmetric": (True, None), "type": ("int", "float"), "actorder": (None, False, "weight", "static"),
        "strategy": ("tensor", "channel", "group", "block"), "dynamic": (False, None),
    }  # fmt: skip
    for name, values in only.items():
        value = weights.get(name, "int" if name == "type" else None)
        fix = f"only {' and '.join(repr(v) for v in values if v is not None)} are read; write bfloat16 with"
        require(value in values, f"{field}.weights.{name}", value, f"{fix} compressed-tensors")
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights["strategy"]
    packed = format_name == "pack-quantized"
    fix = f"only {'INT4 and INT8' if kind == 'int' else 'FP8'} are read; write bfloat16 with compressed-tensors"
    ok = type(bits) is int and (bits == 8 or (bits == 4 and kind == "int"))
    require(ok, f"{field}.weights.num_bits", bits, fix)
    require(kind == "int" or not packed, f"{_ENTRY}.format", format_name, "packs integers only")
    size, shape = weights.get("group_size"), weights.get("block_structure")
    if strategy == "group":
        require(_is_size(size), f"{field}.weights.group_size", size, "must be a positive integer")
    if strategy == "block":
        ok = isinstance(shape, list) and len(shape) == 2 and all(_is_size(n) for n in shape)
        require(ok, f"{field}.weights.block_structure", shape, "must be two positive integers")
    blocks = {"tensor": (_TENSOR, _TENSOR), "channel": (1, _TENSOR), "group": (1, size), "block": shape}
    rows, columns = blocks[strategy]
    return Scheme("compressed-tensors", kind, bits, (rows, columns), packed)


def target_scheme(quantize: Quantize | None, cfg: ModelConfig) -> Scheme | None:
    """The scheme with this name, None for None. Raises `ConfigError` for an unknown one, and for a model whose matrices
    it does not fit."""
    if quantize is None:
        return None
    require(quantize in TARGETS, "quantize", quantize, f"must be one of {', '.join(TARGETS)}")
    stacked = cfg.architecture.stacked_experts
    fix = f"the experts of {cfg.architecture.model_type} are one tensor, which is not quantized; write bfloat16"
    check(not stacked, "quantize", quantize, fix)
    if quantize == "int4":
        check(
            cfg.num_moe_layers > 0, "quantize", quantize, "the model has no routed experts; use fp8, or write bfloat16"
        )
        group = INT4_GROUPS.block[1]
        for name in ("hidden_size", "moe_intermediate_size"):
            fix = f"{name} {getattr(cfg, name)} is no multiple of the group of {group}; use fp8, or write bfloat16"
            check(getattr(cfg, name) % group == 0, "quantize", quantize, fix)
    return TARGETS[quantize]


def written_config(scheme: Scheme, plain: Sequence[str], cfg: ModelConfig) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint with these matrices, whose modules `plain` are not quantized. Readers
    would otherwise expect a vision tower to be."""
    if scheme.kind == "float":
        told = any(_NEVER_CONVERTED.search(module) is None for module in plain)
        return {**_FP8_CONFIG, **({"modules_to_not_convert": sorted(plain)} if told else {})}
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": scheme.block[1], "num_bits": 4,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
    }  # fmt: skip
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": [*_INT4_IGNORE, *(f"re:.*{module}.*" for module in cfg.architecture.unused_modules)],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
