"""Run context: what all stages of a run share, such as recipe, mesh, tokenizer and the abstract model."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mla_moe.checkpoint.reader import open_checkpoint
from mla_moe.checkpoint.tokenizer_files import tokenizer_file
from mla_moe.config import LoRAConfig, Recipe, require
from mla_moe.data import SkipMalformed, TokenFormat, open_documents
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.model_costs import count_parameters
from mla_moe.nn.param import Precision, resolve_kernels
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.parallel.sharding import bytes_per_device, check_divisible, rules_with_overrides
from mla_moe.text.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mla_moe.text.isolated import text_worker
from mla_moe.text.tokenizer import Tokenizer, load_tokenizer
from mla_moe.training.console import Console, bytes_, si
from mla_moe.training.run_directory import add_summary
from mla_moe.training.step import TrainState

logger = logging.getLogger(__name__)
_CACHE_ERROR = "Error writing persistent compilation cache"


def enable_compile_cache() -> None:
    """Keep compiled programs on disk, so that a restart does not compile again: in `JAX_COMPILATION_CACHE_DIR` if it is
    set, else in `mla_moe/xla` of the user's cache directory. That it cannot be written, as on a full disk, is logged
    once, not for each of some hundred programs."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "mla_moe" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    show, failed = warnings.showwarning, False

    def show_once(message: Warning | str, *args: Any) -> None:
        nonlocal failed
        if _CACHE_ERROR not in str(message):
            show(message, *args)
        elif not failed:
            failed = True
            logger.warning("%s; a restart will compile again", message)

    warnings.showwarning = show_once  # ty: ignore[invalid-assignment]


def put_batch(batch: Mapping[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch of `batch_size` packed sequences, sharded over the mesh. `batch` has all of them, or those on this
    process's devices."""
    put = partial(jax.make_array_from_process_local_data, NamedSharding(mesh, BATCH_SPEC))
    return {name: put(values, (batch_size, *values.shape[1:])) for name, values in batch.items()}


def make_abstract_model(recipe: Recipe, mesh: Mesh, lora: LoRAConfig = LoRAConfig()) -> AbstractModel:
    """The recipe's model with the kernels and the dtypes of the mesh's platform, whose devices may be absent."""
    training, platform = recipe.training, mesh.devices.flat[0].platform
    auto = jnp.float32 if platform == "cpu" else jnp.bfloat16
    precision = Precision(compute=auto if training.compute_dtype == "auto" else jnp.dtype(training.compute_dtype))
    kernels, rules = resolve_kernels(recipe.kernels, platform), rules_with_overrides(recipe.mesh.rules)
    options = {"kernels": kernels, "remat": training.remat, "rules": rules, "lora": lora}
    return AbstractModel(recipe.model, precision=precision, **options)


def open_tokenizer(recipe: Recipe, run_dir: Path) -> Tokenizer:
    """The recipe's tokenizer, which a new run trains or copies into `run_dir` if it is `bpe:SIZE`. Raises `ConfigError`
    for one that does not fit the recipe's model."""
    spec = recipe.data.tokenizer
    text, inherited = (), None
    if spec.startswith("bpe:") and not (run_dir / "tokenizer.json").exists():
        if recipe.init_from is None:
            text = cast(Sequence[str], open_split(recipe, "train", None))  # which refuses token ids
        else:
            inherited = tokenizer_file(open_checkpoint(recipe.init_from).directory)
            fix = "has no tokenizer, and its model does not know the ids of a new one; name the model's own"
            require(inherited is not None, "data.tokenizer", spec, f"{recipe.init_from} {fix}")
    tokenizer = load_tokenizer(spec, run_dir, text, inherited)
    text_worker().end()  # it has opened the tokenizer, which takes up to 0.3 GB; most runs need it no more
    size = recipe.model.vocab_size
    fix = f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens; give the model as many or more"
    require(tokenizer.vocab_size <= size, "model.vocab_size", size, fix)
    return tokenizer


def open_chat_tokenizer(recipe: Recipe, run_dir: Path, tokenizer: Tokenizer) -> ChatTokenizer:
    """The tokenizer with the chat template and the stop tokens that are beside its file."""
    spec = recipe.data.tokenizer
    is_file = spec != "byte" and not spec.startswith(("bpe:", "ids:"))
    return load_chat_tokenizer(Path(tokenizer.name).parent if is_file else run_dir, tokenizer)


@dataclass(frozen=True)
class RunContext:
    recipe: Recipe
    run_dir: Path
    console: Console
    mesh: Mesh
    tokenizer: Tokenizer
    lora: LoRAConfig = LoRAConfig()
    """The adapters that the stage trains."""

    @classmethod
    def create(cls, recipe: Recipe, run_dir: Path, console: Console, lora: LoRAConfig = LoRAConfig()) -> "RunContext":
        """Raises `ConfigError` for a mesh, a text or a tokenizer that does not fit the recipe's model."""
        fix = "is for the commands, which take the model from the checkpoint; give the recipe its model"
        require(recipe.model_from == "recipe", "model_from", recipe.model_from, fix)
        mesh = make_mesh(recipe.mesh)
        check_divisible(recipe, mesh)
        return cls(recipe, run_dir, console, mesh, open_tokenizer(recipe, run_dir), lora)

    @cached_property
    def abstract_model(self) -> AbstractModel:
        return make_abstract_model(self.recipe, self.mesh, self.lora)

    @cached_property
    def chat_tokenizer(self) -> ChatTokenizer:
        return open_chat_tokenizer(self.recipe, self.run_dir, self.tokenizer)

    def write_result(self, title: str, rows: Mapping[str, str]) -> None:
        """Print the results of a stage, and add them to the summary for the report."""
        if jax.process_index() == 0:
            add_summary(self.run_dir, rows)
        self.console.result_table(title, list(rows.items()))

    def describe(self, state: TrainState) -> list[tuple[str, str]]:
        """Rows of the start-up table that every stage has; `state` may be abstract."""
        cfg, device = self.recipe.model, jax.devices()[0]
        count = count_parameters(cfg)
        mtp = f", {si(count.mtp)} in the MTP module" if count.mtp else ""
        trained = sum(x.size for x in state.params.values())
        adapters = [("adapters", f"{si(trained)} parameters; the others stay as they are")] if state.frozen else []
        axes = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
        zero = f" ({cfg.zero_expert_num} without computation)" if cfg.zero_expert_num else ""
        return [
            ("parameters", f"{si(count.total)}, {si(count.active)} active per token{mtp}"),
            *adapters,
            ("experts", f"{cfg.num_experts_per_tok} of {cfg.moe.router_width}{zero} and {cfg.n_shared_experts} shared"),
            ("mesh", " x ".join(f"{a} {n}" for a, n in axes.items()) or f"one device ({device.device_kind})"),
            ("state per device", f"{bytes_(bytes_per_device(state))}: parameters and optimizer"),
            ("compute", f"{jnp.dtype(self.abstract_model.precision.compute).name} on {device.platform}"),
            ("tokenizer", f"{self.tokenizer.name}, {self.tokenizer.vocab_size} tokens"),
        ]


def open_split(recipe: Recipe, split: Literal["train", "heldout"], tokenizer: Tokenizer | None) -> SkipMalformed:
    """The documents of `data.train` or `data.heldout`. Those of token ids need the tokenizer."""
    size, dtype = recipe.model.vocab_size, recipe.data.token_dtype
    return open_documents(
        getattr(recipe.data, split),
        field=f"data.{split}",
        text_field=recipe.data.text_field,
        max_malformed_fraction=recipe.data.max_malformed_fraction,
        max_record_bytes=recipe.data.max_record_bytes,
        tokens=None if tokenizer is None else TokenFormat(size, tokenizer.bos_id, tokenizer.eos_id, dtype),
    )
