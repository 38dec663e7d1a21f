"""A run, whole."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from mla_moe.config.data import DataConfig
from mla_moe.config.errors import ConfigError, require, structure
from mla_moe.config.model import ModelConfig, preset
from mla_moe.config.optimizer import OptimizerConfig
from mla_moe.config.parallelism import KernelConfig, MeshConfig
from mla_moe.config.post_training import RejectionConfig, RLConfig, SFTConfig, TaskConfig
from mla_moe.config.pretraining import TrainingConfig


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 100
    """Steps between checkpoints; the last step is always kept."""
    max_to_keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self):
        require(self.every >= 1, "checkpoint.every", self.every, "at least 1 step")
        require(self.max_to_keep >= 1, "checkpoint.max_to_keep", self.max_to_keep, "keep at least 1")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text generated at the end of a run."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 96
    temperature: float = 0.7

    def __post_init__(self):
        require(self.max_new_tokens >= 1, "sample.max_new_tokens", self.max_new_tokens, "at least 1")
        require(0 <= self.temperature <= 100, "sample.temperature", self.temperature, "in [0, 100]; 0 is greedy")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run, complete: `recipe.json` in the run's directory is one of these and can be run again."""

    run_dir: str
    """Directory of the run. Running again with the same one resumes."""
    model: ModelConfig = preset("tiny")
    seed: int = 0
    init_from: str | None = None
    """Where the first stage's weights come from in place of random ones: a Hugging Face directory, or a run's
    directory or one of its checkpoints."""
    init_parts: Literal["parameters", "whole"] = "parameters"
    """What is taken: parameters and router biases; or, of a run on the same data, also optimizer, step and place in the
    data, so that a branch goes on where the other stood."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    kernels: KernelConfig = KernelConfig()
    training: TrainingConfig = TrainingConfig()
    task: TaskConfig = TaskConfig()
    sft: SFTConfig = SFTConfig()
    rl: RLConfig = RLConfig()
    rejection: RejectionConfig = RejectionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self):
        require(0 <= self.seed < 1 << 31, "seed", self.seed, "in [0, 2**31)")
        limit = self.model.max_position_embeddings
        fix = f"at most model.max_position_embeddings = {limit}"
        if self.training.steps:
            length = self.training.sequence_length
            require(length <= limit, "training.sequence_length", length, fix)
        if self.rl.steps or self.rejection.steps:
            length = self.rl.max_prompt_tokens + self.rl.max_new_tokens
            require(length <= limit, "rl.max_prompt_tokens + rl.max_new_tokens", length, fix)
        if self.tunes:
            require(self.sft.sequence_length <= limit, "sft.sequence_length", self.sft.sequence_length, fix)
        streams = self.data.streams or 1
        for field, rows in (("training", self.training.batch_size), ("sft", self.sft.batch_size if self.tunes else 0)):
            require(rows % streams == 0, "data.streams", streams, f"must divide {field}.batch_size = {rows}")
        whole = self.init_parts == "whole"
        require(not whole or self.init_from is not None, "init_parts", "whole", "name a run's checkpoint in init_from")
        fix = "goes on with pretraining, of which there is none (training.steps = 0); ask for parameters"
        require(not whole or self.training.steps > 0, "init_parts", "whole", fix)

    @property
    def tunes(self) -> bool:
        """Whether a stage fine-tunes as `sft` says."""
        return self.sft.steps > 0 or self.rejection.steps > 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read `to_json`'s text back. Raises `ConfigError` for a field that is unknown, missing or of a wrong type."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError("recipe", str(error), "write it as JSON") from None
        return structure(cls, value, "recipe")


def with_overrides(recipe: Recipe, flags: Sequence[str], prog: str, description: str = "") -> Recipe:
    """The recipe with the fields that `--section.field VALUE …` sets."""
    return tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)(Recipe),
        default=recipe,
        args=flags,
        prog=prog,
        description=description,
    )


def load_recipe(path: str | Path) -> Recipe:
    """The recipe that a Python file binds to the name `recipe`, or that a `recipe.json` holds."""
    import runpy

    path = Path(path)
    require(path.is_file(), "recipe", str(path), "no such file; try configs/quickstart.py")
    if path.suffix == ".json":
        return Recipe.from_json(path.read_bytes().decode(errors="replace"))
    recipe = runpy.run_path(str(path)).get("recipe")
    if not isinstance(recipe, Recipe):
        raise ConfigError("recipe", str(path), "the file must bind `recipe = Recipe(…)`")
    return structure(Recipe, dataclasses.asdict(recipe), "recipe")  # Python itself takes any type for any field
