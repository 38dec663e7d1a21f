"""The recipe: the complete configuration of a run."""

import dataclasses
import json
import math
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mla_moe.config.data import DataConfig
from mla_moe.config.errors import (
    MAX_SIZE,
    ConfigError,
    require,
    require_between,
    require_each,
    require_field,
    require_local,
    require_number,
    structure,
)
from mla_moe.config.flags import parse_flags
from mla_moe.config.lora import LoRAConfig
from mla_moe.config.migrations import FORMAT_VERSION, migrate_recipe, renamed_flag
from mla_moe.config.model import ModelConfig
from mla_moe.config.optimizer import OptimizerConfig
from mla_moe.config.parallelism import KernelConfig, MeshConfig
from mla_moe.config.post_training import DPOConfig, RejectionConfig, RLConfig, SFTConfig, TaskConfig
from mla_moe.config.presets import preset
from mla_moe.config.pretraining import TrainingConfig
from mla_moe.config.profile import ProfileConfig
from mla_moe.config.resume import field, leaves
from mla_moe.config.storage import require_path, require_run_dir

_MAX_BYTES = 16 << 20  # of a recipe.json


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of each stage, saved asynchronously in `checkpoints/STAGE/STEP`."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    every_minutes: float | None = None
    """Also save when so many minutes have passed since the last checkpoint. None: by steps alone."""
    max_to_keep: int = 2
    """Newest checkpoints to keep per stage."""
    keep_every: int | None = None
    """Also keep each checkpoint whose step is a multiple of this, for good. None keeps only the newest."""
    local_dir: str | None = None
    """Emergency checkpoints: a directory on each host's own disk or RAM disk, where its processes save their shards
    every `local_every` steps. A run of several processes with mesh.data above 1 resumes from them if they are newer
    than the checkpoints of run_dir; a host that was replaced receives its shards from a replica. None: no copies."""
    local_every: int | None = None
    """Steps between emergency checkpoints, fewer than `every`."""

    def __post_init__(self):
        require_field(self, "checkpoint.every", self.every >= 1, "must be at least 1 step")
        require_each(
            self, "checkpoint", "every_minutes", lambda x: 0 < x < math.inf, "must be a positive number, or None"
        )
        require_field(self, "checkpoint.max_to_keep", self.max_to_keep >= 1, "keep at least 1")
        fix = f"must be a multiple of checkpoint.every = {self.every}: other steps are saved by chance only"
        require_each(self, "checkpoint", "keep_every", lambda x: x >= 1 and x % self.every == 0, fix)
        require_local(
            "checkpoint.local_dir", self.local_dir, "a disk or RAM disk of each host has emergency checkpoints"
        )
        fix = "name a directory of each host, or None"
        require_field(self, "checkpoint.local_dir", self.local_dir != "", fix)
        fix = "set both of checkpoint.local_dir and checkpoint.local_every, or neither"
        require_field(self, "checkpoint.local_every", (self.local_dir is None) == (self.local_every is None), fix)
        fix = f"must be at least 1 and fewer than checkpoint.every = {self.every}, whose checkpoints all hosts share"
        require_each(self, "checkpoint", "local_every", lambda x: 1 <= x < self.every, fix)


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
        require_between(self, "sample", "max_new_tokens", 1, MAX_SIZE)
        require_between(self, "sample", "temperature", 0, 100)


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
    directory, one of its checkpoints, or a URL: hf://ORG/NAME@REVISION, s3://… or gs://… (Hugging Face's layout)."""
    init_parts: Literal["params", "full_state"] = "params"
    """What init_from initializes: params (parameters and router biases), or full_state (of a run on the same data:
    also optimizer state, step and data position, so that this run continues that one)."""
    resume_step: int | None = field(None, resume="free")
    """Resume from the checkpoint of this step of the last stage that has checkpoints, instead of the newest. Newer ones
    are renamed to STEP.after_RESUME_STEP, and the same command again resumes from the newest that is left."""
    resume_changes: tuple[str, ...] = field((), resume="free")
    """Fields or sections of which the resumed run may have other values, such as training.steps or optimizer.schedule;
    optimizer state and data position are kept. Steps, epochs, batch size (unless epochs are set), microbatches and
    learning-rate schedule of the newest stage, data.weights and rl.kl_coef can change so. history.jsonl has the changes
    and recipes before."""
    model_from: Literal["recipe", "init_from"] = "recipe"
    """Where `model` and `data.tokenizer` come from. init_from: each command that opens the recipe replaces them by the
    checkpoint's and lowers the sequence lengths of SFT, DPO and RL to what its max_position_embeddings allow; flags
    override both."""
    data: DataConfig = field(DataConfig(), full_state="equal", stage="pretrain")
    optimizer: OptimizerConfig = field(OptimizerConfig(), stage="pretrain")
    mesh: MeshConfig = field(MeshConfig(), resume="free")
    kernels: KernelConfig = KernelConfig()
    training: TrainingConfig = field(TrainingConfig(), stage="pretrain")
    task: TaskConfig = field(TaskConfig(), resume=("sft", "dpo", "rl", "rejection"))
    lora: LoRAConfig = field(LoRAConfig(), resume=("sft", "dpo", "rl", "rejection"))
    sft: SFTConfig = field(SFTConfig(), resume=("sft", "dpo", "rl", "rejection"), stage="sft")
    dpo: DPOConfig = field(DPOConfig(), resume=("dpo", "rl", "rejection"), stage="dpo")
    rl: RLConfig = field(RLConfig(), resume=("rl", "rejection"), stage="rl")
    rejection: RejectionConfig = field(RejectionConfig(), resume=("rejection",), stage="rejection")
    checkpoint: CheckpointConfig = field(CheckpointConfig(), resume="free")
    sample: SampleConfig = field(SampleConfig(), resume="free")
    track: tuple[Literal["wandb", "trackio", "mlflow"], ...] = field((), resume="free")
    """Trackers of experiments that also get recipe, metrics, samples and report; each is an extra of the package."""
    profile: ProfileConfig = field(ProfileConfig(), resume="free")

    def __post_init__(self):
        require_run_dir(self.run_dir)
        require_path("init_from", self.init_from)
        for name, leaf in leaves(self).items():
            require_number(name, leaf.value)
        require_field(self, "seed", 0 <= self.seed < 1 << 31, "must be in [0, 2**31)")
        require_between(self, "", "resume_step", 1, MAX_SIZE)
        stated = [name for name, leaf in leaves(self).items() if leaf.may_be_stated]
        for name in self.resume_changes:
            known = any(f"{leaf}.".startswith(f"{name}.") for leaf in stated)
            require(known, "resume_changes", name, f"cannot change in a run; those that can are {', '.join(stated)}")
        limit = self.model.max_position_embeddings if self.model_from == "recipe" else MAX_SIZE
        message = f"must be at most model.max_position_embeddings = {limit}"
        if self.training.active:
            require_field(self.training, "training.sequence_length", self.training.sequence_length <= limit, message)
        if self.rl.steps or self.rejection.steps:
            length = self.rl.max_prompt_tokens + self.rl.max_new_tokens
            require(length <= limit, "rl.max_prompt_tokens + rl.max_new_tokens", length, message)
            fix = "is for `mla-moe eval`: a reward needs one format; name it"
            require_field(self.task, "task.answer_format", self.task.answer_format != "auto", fix)
        if self.fine_tunes:
            require_field(self.sft, "sft.sequence_length", self.sft.sequence_length <= limit, message)
        if self.dpo.active:
            ok = self.dpo.sequence_length <= 2 * limit
            require_field(
                self.dpo, "dpo.sequence_length", ok, f"must be at most 2 model.max_position_embeddings = {2 * limit}"
            )
        streams, sizes = self.data.streams or 1, {"training": self.training.batch_size}
        sizes |= {"sft": self.sft.batch_size} if self.fine_tunes else {}
        sizes |= {"dpo": self.dpo.batch_size} if self.dpo.active else {}
        for section, batch_size in sizes.items():
            message = f"must divide {section}.batch_size = {batch_size}"
            require(batch_size % streams == 0, "data.streams", streams, message)
        fix = "is for SFT and the fine-tuning of rejection sampling, of which the recipe has neither; set 0"
        require(self.fine_tunes or not self.lora.dropout, "lora.dropout", self.lora.dropout, fix)
        if self.init_parts == "full_state":
            ok = self.init_from is not None
            require_field(self, "init_parts", ok, "set init_from to the checkpoint of a run")
            message = "resumes pretraining, which training.steps = 0 skips; set init_parts = 'params'"
            require_field(self, "init_parts", self.training.active, message)
        message = "each source has its own epochs with data.weights; set training.steps"
        ok = self.training.epochs is None or not self.data.weights
        require(ok, "training.epochs", self.training.epochs, message)

    @property
    def fine_tunes(self) -> bool:
        """Whether a stage fine-tunes as configured in `sft`: SFT itself, or rejection sampling."""
        return self.sft.active or self.rejection.steps > 0

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read the text of a `recipe.json`, of this or an older format version. Raises `ConfigError` for a newer
        version, and for a field that is unknown, missing or of a wrong type."""
        try:
            value = json.loads(text.removeprefix("\ufeff"))  # a byte order mark
        except (ValueError, RecursionError) as error:
            raise ConfigError("recipe", str(error), "write it as JSON") from None
        return structure(cls, migrate_recipe(value) if isinstance(value, dict) else value, "recipe")


def with_overrides(recipe: Recipe, flags: Sequence[str], prog: str, description: str = "") -> Recipe:
    """The recipe with the fields that the command-line flags `--section.field VALUE …` override. Raises `ConfigError`
    for an invalid value of a field. Prints a message and raises `SystemExit` for `--help`, an unknown flag, and a flag
    by the old name of a field."""
    import tyro

    if renamed := renamed_flag(flags):
        print(f"{renamed[0]}: renamed; use {renamed[1]}", file=sys.stderr)
        raise SystemExit(2)
    markers = tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff
    return parse_flags(
        lambda: tyro.cli(Recipe, default=recipe, args=flags, prog=prog, description=description, config=markers)
    )


def load_recipe(path: str | Path) -> Recipe:
    """The `recipe` that a Python file defines, or the recipe in a `recipe.json`. A Python file is executed: it is
    trusted as code. Raises `ConfigError` for any other file, and for one that raises an error or exits."""
    require_local("recipe", path)
    path = Path(path)
    require(path.exists(), "recipe", str(path), "no such file; try configs/quickstart.py")
    require(path.is_file(), "recipe", str(path), "is not a file; name a recipe's .py or .json file")
    require(path.stat().st_size <= _MAX_BYTES, "recipe", str(path), f"is larger than {_MAX_BYTES >> 20} MB: no recipe")
    if path.suffix == ".json":
        try:
            return Recipe.from_json(path.read_bytes().decode(errors="replace"))
        except ConfigError as error:
            raise ConfigError(error.field, error.value, f"{error.message} (in {path})") from None
    try:
        recipe = runpy.run_path(str(path)).get("recipe")
        if not isinstance(recipe, Recipe):
            raise ConfigError("recipe", str(path), "the file must bind `recipe = Recipe(…)`")
        return structure(Recipe, dataclasses.asdict(recipe), "recipe")  # Python itself does not check field types
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also of sys.exit
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
        line = error.lineno if isinstance(error, SyntaxError) else line
        where = f"line {line}: " if line else ""
        fix = "a recipe is a Python file that binds `recipe = Recipe(…)`; correct it"
        raise ConfigError("recipe", str(path), f"{where}{type(error).__name__}: {error}; {fix}") from error
