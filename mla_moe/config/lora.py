"""Low-rank adaptation (LoRA): which matrices get an adapter, and of what rank."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

from mla_moe.config.errors import MAX_SIZE, ConfigError, require, require_between, require_each

GROUPS: Mapping[str, str] = {
    "attention": "*_layers*/attention/*",
    "dense": "*_layers*/mlp/*",
    "shared": "moe_layers/moe/shared/*",
    "experts": "moe_layers/moe/[gd]*",
    "router": "moe_layers/moe/router/weight",
}
"""Names of groups of matrices, with the glob of their paths: `moe/gate_up` and `moe/down` are the routed experts'.
Layers in pairs (`ModelConfig.moe_shortcut`) have paths such as `moe_layers/first/attention/q_a`."""


QuantizedFormat = Literal["fp8", "int8", "int4"]

_FORMATS: Mapping[str, QuantizedFormat | None] = {name: name for name in get_args(QuantizedFormat)} | {"none": None}


class AdapterSize(NamedTuple):
    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """LoRA (arXiv 2106.09685) in SFT, DPO, RL and rejection sampling: the model stays as it is, without gradients and
    optimizer state, and each target matrix W gets an adapter, `W + scale · A B` with `scale = alpha / rank`. Adapters
    are initialised as in PEFT: A uniform, B zero."""

    rank: int = 0
    """Rank of the adapters; 0 trains all parameters, without adapters."""
    alpha: float = 16.0
    """Numerator of the adapters' scale."""
    targets: tuple[str, ...] = ("attention", "dense", "shared", "experts")
    """Matrices with an adapter: attention, dense (MLPs without experts), shared (shared experts), experts (routed),
    router, or a glob of paths such as moe_layers/attention/q_*. With =RANK or =RANK:ALPHA a target has values of its
    own; of several that match, the last one counts."""
    dropout: float = 0.0
    """Probability with which a feature of an adapter's input is dropped, in SFT and in the fine-tuning of rejection
    sampling. DPO and RL compare log-probabilities with those of a reference or of the sampler, and have none."""
    rslora: bool = False
    """Rank-stabilized scale, alpha / √rank (arXiv 2312.03732)."""
    quantize_base: tuple[str, ...] = ()
    """QLoRA: formats in which the base's matrices are in memory. fp8 (blocks of 128 x 128), int8 (a scale for each
    output) or int4 (groups of 32 inputs) is of all; NAME=FORMAT of those that a name or glob of targets matches, as in
    experts=int4, NAME=none of none; of several that match, the last one counts. Those of a checkpoint in the same
    format are taken as they are."""

    def __post_init__(self):
        require_between(self, "lora", "rank", 0, MAX_SIZE)
        require_each(self, "lora", "alpha", lambda x: 0 < x < math.inf, "must be a positive number")
        require_each(self, "lora", "dropout", lambda x: 0 <= x < 1, "must be a probability below 1")
        require(self.rank > 0 or not self.dropout, "lora.dropout", self.dropout, "needs adapters; set lora.rank")
        for target in self.targets:
            self._parsed(target)
        fix = "needs adapters to train; set lora.rank"
        require(self.rank > 0 or not self.quantize_base, "lora.quantize_base", self.quantize_base, fix)
        for entry in self.quantize_base:
            fix = f"write NAME=FORMAT or FORMAT, which is one of {', '.join(_FORMATS)}"
            require(entry.rpartition("=")[2] in _FORMATS, "lora.quantize_base", entry, fix)

    def scale(self, size: AdapterSize) -> float:
        return size.alpha / (math.sqrt(size.rank) if self.rslora else size.rank)

    def sizes(self, paths: Iterable[str]) -> dict[str, AdapterSize]:
        """The adapters of those matrices that get one, by path. Raises `ConfigError` for a target without any."""
        found, paths = {}, list(paths)
        for target in self.targets if self.rank else ():
            glob, size = self._parsed(target)
            matches = fnmatch.filter(paths, glob)
            fix = f"matches no matrix of this model; there are {', '.join(GROUPS)}, and {', '.join(paths)}"
            is_group = target.partition("=")[0] in GROUPS  # of which a model may have no matrix
            require(bool(matches) or is_group, "lora.targets", target, fix)
            found |= dict.fromkeys(matches, size)
        fix = "give at least one matrix an adapter, or set lora.rank = 0 to train all parameters"
        require(bool(found) or not self.rank, "lora.targets", self.targets, fix)
        return found

    def formats(self, paths: Iterable[str]) -> dict[str, QuantizedFormat]:
        """The formats of those matrices that are quantized, by path. Raises `ConfigError` for a name of none."""
        paths, formats = list(paths), dict[str, QuantizedFormat | None]()
        groups = [name for name in GROUPS if name != "router"]  # routers stay in float32
        for entry in self.quantize_base:
            name, equals, format_name = entry.rpartition("=")
            matches = fnmatch.filter(paths, GROUPS.get(name, name)) if equals else paths
            fix = f"matches no matrix that can be quantized; there are {', '.join(groups)}, and {', '.join(paths)}"
            require(bool(matches) or name in groups, "lora.quantize_base", entry, fix)
            formats |= dict.fromkeys(matches, _FORMATS[format_name])
        return {path: name for path, name in formats.items() if name is not None}

    def _parsed(self, target: str) -> tuple[str, AdapterSize]:
        name, _, size = target.partition("=")
        rank, _, alpha = size.partition(":")
        try:
            parsed = AdapterSize(int(rank or self.rank), float(alpha or self.alpha))
        except ValueError:
            raise ConfigError("lora.targets", target, "write NAME, NAME=RANK or NAME=RANK:ALPHA") from None
        ok = 0 < parsed.alpha < math.inf and (0 < parsed.rank <= MAX_SIZE or (not self.rank and not rank))
        require(ok, "lora.targets", target, "rank and alpha must be positive: write NAME=RANK:ALPHA")
        return GROUPS.get(name, name), parsed
