"""LoRA adapters in the layout of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Names and shapes are those that PEFT 0.21 has for the modules of transformers 5: attention is adapted by module,
everything else by parameter (`target_parameters`), because PEFT 0.21 reads `gate_proj`, `up_proj` and `down_proj` among
the modules as the experts'. There the matrices of all experts are one parameter; its factors are flattened to
`lora_A [E · r, in]`, expert by expert, and `lora_B [out, r · E]`, rank by rank. If both parameters of the experts have
adapters, that of `gate_up_proj` is the inner one, named `base_layer`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mla_moe.checkpoint.adapter import AdapterCheckpoint, open_base_of
from mla_moe.checkpoint.files import atomic_directory, check, read_json
from mla_moe.checkpoint.hf_mapping import ALL, Index, tensor_mappings
from mla_moe.checkpoint.safetensors_reader import WEIGHT_DTYPES, SafetensorsReader
from mla_moe.checkpoint.safetensors_writer import TensorEntry, write_file
from mla_moe.config import LoRAConfig, ModelConfig, structure
from mla_moe.config.hub import is_hub, is_hub_id
from mla_moe.config.lora import AdapterSize
from mla_moe.config.storage import require_path
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.lora import RANK, adapter_axes
from mla_moe.parallel.sharding import logical_axes

if TYPE_CHECKING:
    from mla_moe.checkpoint.reader import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_READ = {
    "peft_type", "base_model_name_or_path", "revision", "lora_alpha", "alpha_pattern", "use_rslora",
    "target_parameters", "bias", "init_lora_weights", "lora_dropout",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "r", "rank_pattern", "target_modules", "exclude_modules",  # the tensors say the same
    "task_type", "auto_mapping", "inference_mode", "peft_version", "ensure_weight_tying",
    "runtime_config", "megatron_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
"""Options of PEFT without effect on what an adapter computes. All others are refused, also those of other versions."""
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base as it is. Others, such as PiSSA, subtract from it."""


class PeftModule(NamedTuple):
    """A matrix of transformers that an adapter can have, or the matrices of all experts of a layer."""

    target: str
    """The module's name, or the parameter's."""
    path: str
    """Path of the parameter in this package."""
    index: Index
    """Index of the module in that parameter."""
    module: str
    """The module that PEFT wraps."""
    experts: int
    """0 for a single matrix."""


def is_peft(path: Path) -> bool:
    """Whether a directory has an adapter in PEFT's layout."""
    return path.is_dir() and (path / CONFIG).is_file()


def peft_modules(cfg: ModelConfig) -> Iterator[PeftModule]:
    """All that can have an adapter, layer by layer."""
    adaptable, found = set(AbstractModel(cfg).adaptable_paths), set()
    for mapping in tensor_mappings(cfg, copies=False):
        if mapping.path not in adaptable:
            continue
        name, index = mapping.name.removesuffix(".weight"), mapping.index
        if match := re.fullmatch(r"(.*\.mlp\.experts)\.(?:\d+\.)?(gate|up|down|gate_up)_proj", name):
            part = "down_proj" if match[2] == "down" else "gate_up_proj"
            target = f"{match[1]}.{part}"
            if target not in found:
                found.add(target)
                axes = len(index) - 1
                yield PeftModule(target, mapping.path, (index[0], *(ALL,) * axes), match[1], cfg.n_routed_experts)
        else:
            target = name if "/attention/" in mapping.path else mapping.name
            yield PeftModule(target, mapping.path, index, name, 0)


class _Tensor(NamedTuple):
    """A tensor of `adapter_model.safetensors`: a part of a factor of an adapter."""

    name: str
    path: str
    """Path of the factor."""
    index: Index
    shape: tuple[int, ...]
    """Shape of that part of the factor."""
    experts: int

    def to_peft(self, part: np.ndarray) -> np.ndarray:
        is_a = self.path.endswith("/a")
        if self.experts:
            part_EXY = part.reshape(self.experts, *_matrix(self.shape[1:], is_a))
            if is_a:
                return part_EXY.transpose(0, 2, 1).reshape(-1, part_EXY.shape[1])
            return part_EXY.transpose(2, 1, 0).reshape(part_EXY.shape[2], -1)
        return part.reshape(_matrix(self.shape, is_a)).T

    def from_peft(self, tensor: np.ndarray) -> np.ndarray:
        is_a = self.path.endswith("/a")
        if self.experts:
            inputs, outputs = _matrix(self.shape[1:], is_a)
            if is_a:
                part = tensor.reshape(self.experts, outputs, inputs).transpose(0, 2, 1)
            else:
                part = tensor.reshape(outputs, inputs, self.experts).transpose(2, 1, 0)
            return part.reshape(self.shape)
        return tensor.T.reshape(self.shape)

    @property
    def peft_shape(self) -> tuple[int, ...]:
        return self.to_peft(np.broadcast_to(np.int8(0), self.shape)).shape


def _matrix(shape: tuple[int, ...], is_a: bool) -> tuple[int, int]:
    """A has the rank as its last axis, B as its first."""
    return (int(np.prod(shape[:-1])), shape[-1]) if is_a else (shape[0], int(np.prod(shape[1:])))


def _tensors(cfg: ModelConfig, lora: LoRAConfig) -> Iterator[_Tensor]:
    model = AbstractModel(cfg, lora=lora)
    sizes = lora.sizes(model.adaptable_paths)
    both = {"moe_layers/moe/gate_up", "moe_layers/moe/down"} <= sizes.keys()
    for item in peft_modules(cfg):
        if item.path not in sizes:
            continue
        inner = ".base_layer" if both and item.target.endswith(".gate_up_proj") else ""
        module, _, name = item.path.rpartition("/")
        weight = model.variables[item.path]
        at = dict(zip(logical_axes(weight), item.index, strict=True)) | {RANK: ALL}
        for factor, axes in zip("ab", adapter_axes(weight), strict=True):
            path = f"{module}/lora/{name}/{factor}"
            index = tuple(at[axis] for axis in axes)
            full = model.variables[path].get_value().shape
            shape = tuple(n for n, i in zip(full, index, strict=True) if not isinstance(i, int))
            tensor = f"{_PREFIX}{item.module}{inner}.lora_{factor.upper()}.weight"
            yield _Tensor(tensor, path, index, shape, item.experts)


def write_peft(source: AdapterCheckpoint, target: Path, dtype: np.dtype | None) -> None:
    """Write the adapters to the new directory `target`, which appears only when it is complete. Raises
    `CheckpointError` if router biases were updated, for which the layout has no place."""
    moved = source.changed_biases()
    fix = "were updated in training, and PEFT's layout has adapters only; convert with --merge-adapter"
    check(not moved, "adapter", ", ".join(moved), fix)
    entries = []
    for tensor in _tensors(source.cfg, source.lora):
        stored = source.array(tensor.path)
        entry = partial(lambda tensor, stored: [tensor.to_peft(stored[tensor.index])], tensor, stored)
        entries.append(TensorEntry(tensor.name, np.dtype(dtype or stored.dtype), tensor.peft_shape, entry))
    with atomic_directory(target) as directory:
        write_file(directory / WEIGHTS, entries, lambda _: None)
        config = peft_config(source.cfg, source.lora, source.base_name)
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def peft_config(cfg: ModelConfig, lora: LoRAConfig, base: str) -> dict[str, Any]:
    """The contents of `adapter_config.json`."""
    sizes = lora.sizes(AbstractModel(cfg).adaptable_paths)
    modules = list(peft_modules(cfg))
    by_suffix: dict[str, set[AdapterSize | None]] = {}
    for item in modules:
        by_suffix.setdefault(_suffix(item.target), set()).add(sizes.get(item.path))
    targets: dict[str, AdapterSize] = {}
    linear: set[str] = set()
    for item in modules:
        if item.path in sizes:  # the name without the layer, if it is the same in all layers
            same = len(by_suffix[_suffix(item.target)]) == 1
            name = _suffix(item.target) if same else item.target
            targets[name] = sizes[item.path]
            linear |= {name} if item.target == item.module else set()
    default = AdapterSize(lora.rank, lora.alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.removeprefix("hf://").partition("@")[0] if is_hub(base) else base,
        "revision": base.partition("@")[2] or None if is_hub(base) else None,
        "r": default.rank,
        "lora_alpha": default.alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted(linear),
        "target_parameters": sorted(targets.keys() - linear),
        "rank_pattern": {re.escape(n): s.rank for n, s in sorted(targets.items()) if s.rank != default.rank},
        "alpha_pattern": {re.escape(n): s.alpha for n, s in sorted(targets.items()) if s.alpha != default.alpha},
        # PEFT refuses to load an adapter with dropout that has target_parameters.
        "lora_dropout": lora.dropout if linear >= targets.keys() else 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _suffix(target: str) -> str:
    return re.sub(r".*\.layers\.\d+\.", "", target)


def open_peft(directory: Path, open_base: Callable[[str], "Checkpoint"]) -> AdapterCheckpoint:
    """An adapter in PEFT's layout over its base, which `adapter_config.json` names by a directory. Raises
    `CheckpointError` for an adapter that this package cannot compute, and for missing or unknown tensors."""
    config = read_json(directory / CONFIG)
    check(config.get("peft_type") == "LORA", "peft_type", config.get("peft_type"), f"in {directory}: only LORA is read")
    for name in sorted(config.keys() - _READ - _WITHOUT_EFFECT):
        check(not config[name], name, config[name], f"in {directory}: such adapters are not supported")
    check(config.get("bias", "none") == "none", "bias", config.get("bias"), f"in {directory}: only none is supported")
    init, fix = config.get("init_lora_weights"), "changes the base too; convert the adapter to plain LoRA with PEFT"
    check(init in _PLAIN_INITS, "init_lora_weights", init, f"in {directory}: {fix}")
    named = structure(str, config.get("base_model_name_or_path"), "base_model_name_or_path")
    check(named != "", "base_model_name_or_path", named, f"in {directory}: name a directory or a model of the Hub")
    base_name = _base_name(directory, named, structure(str | None, config.get("revision"), "revision"))
    base = open_base_of(directory, base_name, open_base)
    tensors = SafetensorsReader(directory)
    for name, tensor in tensors.stored.items():
        check(
            len(tensor.shape) == 2, "adapter", name, f"in {directory}: has shape {list(tensor.shape)}, not a matrix's"
        )
    lora = _lora_of(base.cfg, config, tensors)
    expected = {tensor.name: tensor for tensor in _tensors(base.cfg, lora)}
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - tensors.stored)]
    wrong += [f"{name} is unknown" for name in sorted(tensors.stored.keys() - expected)]
    for name in expected.keys() & tensors.stored.keys():
        stored, shape = tensors.stored[name], expected[name].peft_shape
        wrong += [f"{name} has shape {list(stored.shape)}, not {list(shape)}"] if stored.shape != shape else []
        wrong += [f"{name} has type {stored.dtype}"] if stored.dtype not in WEIGHT_DTYPES else []
    fix = f"does not fit its base {named}: {'; '.join(wrong[:20])}"
    check(not wrong, "adapter", str(directory), fix)
    variables = AbstractModel(base.cfg, lora=lora).variables

    def factor(path: str) -> np.ndarray:
        array = np.zeros(variables[path].get_value().shape, np.float32)
        for tensor in expected.values():
            if tensor.path == path:
                array[tensor.index] = tensor.from_peft(tensors[tensor.name].astype(np.float32))
        return array

    own = {tensor.path: partial(factor, tensor.path) for tensor in expected.values()}
    return AdapterCheckpoint(base, base_name, lora, base.directory, own)


def _base_name(directory: Path, named: str, revision: str | None) -> str:
    """A directory, as PEFT reads it or relative to that of the adapter, or a model of the Hub."""
    require_path("base_model_name_or_path", named)
    for path in (Path(named), directory / named):
        if path.is_dir():
            return str(path.resolve())
    return f"hf://{named}" + (f"@{revision}" if revision else "") if is_hub_id(named) else named


def _lora_of(cfg: ModelConfig, config: Mapping[str, Any], tensors: SafetensorsReader) -> LoRAConfig:
    """The targets are the matrices that have tensors; ranks are those of the tensors, and α as in the file."""
    sizes: dict[str, AdapterSize] = {}
    default = structure(float, config.get("lora_alpha", 8.0), "lora_alpha")
    alphas, parameters = config.get("alpha_pattern") or {}, config.get("target_parameters") or ()
    check(isinstance(alphas, dict), "alpha_pattern", alphas, "must be an object with names of modules")
    targets = " ".join(structure(tuple[str, ...], parameters, "target_parameters"))
    for item in peft_modules(cfg):
        names = [f"{_PREFIX}{item.module}{inner}.lora_A.weight" for inner in (".base_layer", "")]
        if item.experts and names[0] not in tensors.stored and names[1] in tensors.stored:
            # The only adapter of the experts: the parameter is the one whose input has this width.
            is_down = item.target.endswith(".down_proj")
            width = cfg.moe_intermediate_size if is_down else cfg.hidden_size
            part = "down_proj" if is_down else "gate_up_proj"
            name = names[1] if part in targets and tensors.stored[names[1]].shape[-1] == width else None
        elif item.experts:
            name = names[0] if item.target.endswith(".gate_up_proj") else names[1]
        else:
            name = names[1]
        if name not in tensors.stored:
            continue
        rank = tensors.stored[name].shape[0] // max(item.experts, 1)
        size = AdapterSize(rank, _alpha(alphas, item.target, default))
        fix = f"layers of {item.path} differ in rank or α; give all the same"
        check(sizes.setdefault(item.path, size) == size, "adapter", name, fix)
    fix = "has no tensor of a matrix of this model; name the base that it was trained on"
    check(bool(sizes), "adapter", CONFIG, fix)
    first = next(iter(sizes.values()))
    sized = tuple(f"{path}={size.rank}:{size.alpha}" for path, size in sizes.items())
    dropout = structure(float, config.get("lora_dropout") or 0.0, "lora_dropout")
    rslora = structure(bool, config.get("use_rslora", False), "use_rslora")
    return LoRAConfig(first.rank, first.alpha, sized, dropout, rslora)


def _alpha(patterns: Mapping[str, Any], target: str, default: float) -> float:
    """The α of a target. PEFT's patterns are regular expressions of the end of a name, from a dot on; here names and
    `.*` in front are read, and others refused: a file from elsewhere may have one that takes for ever."""
    for pattern, value in patterns.items():
        text = pattern.removesuffix("$").replace("\\.", ".")
        start = text.removeprefix("^")
        end = start.removeprefix(".*")
        fix = "only names of modules are read, not patterns"
        check(re.fullmatch(r"[\w.]+", end) is not None, "alpha_pattern", pattern, fix)
        if start != end:
            matches = target.endswith(end)
        else:
            matches = target == end or (text == start and target.endswith(f".{end}"))
        if matches:
            return structure(float, value, f"alpha_pattern.{pattern}")
    return default
