"""The recipe: the complete configuration of a run."""

import dataclasses
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mla_moe.config.data import DataConfig
from mla_moe.config.errors import ConfigError, require, require_each, structure
from mla_moe.config.migrations import FORMAT_VERSION, migrate_recipe, renamed_flag
from mla_moe.config.model import ModelConfig, preset
from mla_moe.config.optimizer import OptimizerConfig
from mla_moe.config.parallelism import KernelConfig, MeshConfig
from mla_moe.config.post_training import RejectionConfig, RLConfig, SFTConfig, TaskConfig
from mla_moe.config.pretraining import TrainingConfig
from mla_moe.config.resume import field


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of each stage, saved asynchronously in `checkpoints/STAGE/STEP`."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    max_to_keep: int = 2
    """Newest checkpoints to keep per stage."""

    def __post_init__(self):
        require(self.every >= 1, "checkpoint.every", self.every, "at least 1 step")
        require(self.max_to_keep >= 1, "checkpoint.max_to_keep", self.max_to_keep, "keep at least 1")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text generated at the end of pretraining, printed and written to `samples.jsonl`."""

    prompts: tuple[str, ...] = ()
    """Prompts to complete."""
    max_new_tokens: int = 96
    """Longest completion in tokens."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""

    def __post_init__(self):
        require(self.max_new_tokens >= 1, "sample.max_new_tokens", self.max_new_tokens, "at least 1")
        require_each(self, "sample", "temperature", lambda x: 0 <= x <= 100, "in [0, 100]; 0 is greedy")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The complete configuration of a run. `recipe.json` in the run's directory is one, and can be run again."""

    run_dir: str = dataclasses.field(metadata={"resume": "free"})
    """Directory of the run. The same command with the same directory resumes."""
    model: ModelConfig = preset("tiny")
    seed: int = field(0, full_state="equal")
    """Seed of initialization, data order and sampling."""
    init_from: str | None = None
    """Checkpoint that initializes the first stage, instead of random parameters: a Hugging Face directory, a run's
    directory, or one of its checkpoints."""
    init_parts: Literal["params", "full_state"] = "params"
    """What init_from initializes: params (parameters and router biases), or full_state (of a run on the same data:
    also optimizer state, step and position in the data, so that this run continues that one)."""
    data: DataConfig = field(DataConfig(), full_state="equal")
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = field(MeshConfig(), resume="free")
    kernels: KernelConfig = KernelConfig()
    training: TrainingConfig = TrainingConfig()
    task: TaskConfig = field(TaskConfig(), resume=("sft", "rl", "rejection"))
    sft: SFTConfig = field(SFTConfig(), resume=("sft", "rl", "rejection"))
    rl: RLConfig = field(RLConfig(), resume=("rl", "rejection"))
    rejection: RejectionConfig = field(RejectionConfig(), resume=("rejection",))
    checkpoint: CheckpointConfig = field(CheckpointConfig(), resume="free")
    sample: SampleConfig = field(SampleConfig(), resume="free")

    def __post_init__(self):
        require(0 <= self.seed < 1 << 31, "seed", self.seed, "in [0, 2**31)")
        limit = self.model.max_position_embeddings
        message = f"at most model.max_position_embeddings = {limit}"
        if self.training.steps:
            length = self.training.sequence_length
            require(length <= limit, "training.sequence_length", length, message)
        if self.rl.steps or self.rejection.steps:
            length = self.rl.max_prompt_tokens + self.rl.max_new_tokens
            require(length <= limit, "rl.max_prompt_tokens + rl.max_new_tokens", length, message)
        if self.fine_tunes:
            require(self.sft.sequence_length <= limit, "sft.sequence_length", self.sft.sequence_length, message)
        streams, sft_batch_size = self.data.streams or 1, self.sft.batch_size if self.fine_tunes else 0
        for section, batch_size in (("training", self.training.batch_size), ("sft", sft_batch_size)):
            message = f"must divide {section}.batch_size = {batch_size}"
            require(batch_size % streams == 0, "data.streams", streams, message)
        if self.init_parts == "full_state":
            message = "set init_from to the checkpoint of a run"
            require(self.init_from is not None, "init_parts", "full_state", message)
            message = "resumes pretraining, which training.steps = 0 skips; set init_parts = 'params'"
            require(self.training.steps > 0, "init_parts", "full_state", message)

    @property
    def fine_tunes(self) -> bool:
        """Whether a stage fine-tunes as configured in `sft`: SFT itself, or rejection sampling."""
        return self.sft.steps > 0 or self.rejection.steps > 0

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read the text of a `recipe.json`, of this or an older format version.

        Raises `ConfigError` for a newer version, and for a field that is unknown, missing or of a wrong type.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError("recipe", str(error), "write it as JSON") from None
        return structure(cls, migrate_recipe(value) if isinstance(value, dict) else value, "recipe")


def with_overrides(recipe: Recipe, flags: Sequence[str], prog: str, description: str = "") -> Recipe:
    """The recipe with the fields that the command-line flags `--section.field VALUE …` override.

    For `--help`, an unknown flag, and a flag by the old name of a field, it prints a message and raises `SystemExit`.
    """
    import tyro

    if renamed := renamed_flag(flags):
        print(f"{renamed[0]}: renamed; use {renamed[1]}", file=sys.stderr)
        raise SystemExit(2)
    return tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)(Recipe),
        default=recipe,
        args=flags,
        prog=prog,
        description=description,
    )


def load_recipe(path: str | Path) -> Recipe:
    """The `recipe` that a Python file defines, or the recipe in a `recipe.json`."""
    path = Path(path)
    require(path.is_file(), "recipe", str(path), "no such file; try configs/quickstart.py")
    if path.suffix == ".json":
        return Recipe.from_json(path.read_bytes().decode(errors="replace"))
    recipe = runpy.run_path(str(path)).get("recipe")
    if not isinstance(recipe, Recipe):
        raise ConfigError("recipe", str(path), "the file must bind `recipe = Recipe(…)`")
    return structure(Recipe, dataclasses.asdict(recipe), "recipe")  # Python itself does not check field types
