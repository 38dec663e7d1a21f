"""Run context: what all stages of a run share, such as recipe, mesh, tokenizer and the abstract model."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mla_moe.checkpoint.reader import open_checkpoint
from mla_moe.checkpoint.tokenizer_files import tokenizer_file
from mla_moe.config import ConfigError, Recipe
from mla_moe.data import SkipMalformed, open_documents
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.model_costs import count_parameters
from mla_moe.nn.param import Precision, resolve_kernels
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.parallel.sharding import check_divisible, rules_with_overrides
from mla_moe.text.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mla_moe.text.tokenizer import Tokenizer, load_tokenizer
from mla_moe.training.console import Console, bytes_, si
from mla_moe.training.step import TrainState


def enable_compile_cache() -> None:
    """Keep compiled programs on disk, so that a restart does not compile again: in `JAX_COMPILATION_CACHE_DIR` if it is
    set, else in `mla_moe/xla` of the user's cache directory."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "mla_moe" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@dataclass(frozen=True)
class RunContext:
    recipe: Recipe
    run_dir: Path
    console: Console
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer

    @classmethod
    def create(cls, recipe: Recipe, run_dir: Path, console: Console) -> "RunContext":
        """Raises `ConfigError` for a mesh, a text or a tokenizer that does not fit the recipe's model."""
        mesh = make_mesh(recipe.mesh)
        check_divisible(recipe, mesh)
        spec = recipe.data.tokenizer
        text, inherited = (), None
        if spec.startswith("bpe:") and not (run_dir / "tokenizer.json").exists():
            if recipe.init_from is None:
                text = open_split(recipe, "train")
            else:
                inherited = _inherited_tokenizer(recipe.init_from, spec)
        tokenizer = load_tokenizer(spec, run_dir, text, inherited)
        if tokenizer.vocab_size > recipe.model.vocab_size:
            fix = f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens; give the model as many or more"
            raise ConfigError("model.vocab_size", recipe.model.vocab_size, fix)
        return cls(recipe, run_dir, console, mesh, tokenizer)

    @cached_property
    def abstract_model(self) -> AbstractModel:
        training = self.recipe.training
        chosen = {} if training.compute_dtype == "auto" else {"compute": jnp.dtype(training.compute_dtype)}
        precision = Precision(**chosen) if chosen else Precision.default()
        kernels = resolve_kernels(self.recipe.kernels, self.mesh.devices.flat[0].platform)
        rules = rules_with_overrides(self.recipe.mesh.rules)
        return AbstractModel(self.recipe.model, precision=precision, kernels=kernels, remat=training.remat, rules=rules)

    @cached_property
    def chat_tokenizer(self) -> ChatTokenizer:
        spec = self.recipe.data.tokenizer
        is_file = spec != "byte" and not spec.startswith("bpe:")
        return load_chat_tokenizer(Path(spec).parent if is_file else self.run_dir, self.tokenizer)

    def put(self, batch: Mapping[str, np.ndarray], batch_size: int, first: int = 0) -> dict[str, jax.Array]:
        """A global batch of `batch_size` packed sequences on the mesh, sharded over `BATCH_SPEC`. `batch` has this
        process's sequences, those from number `first` on."""
        sharding = NamedSharding(self.mesh, BATCH_SPEC)

        def put(values: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                start, stop, _ = index[0].indices(batch_size)
                return values[start - first : stop - first, index[1]]

            return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, shard)

        return {key: put(values) for key, values in batch.items()}

    def describe(self, state: TrainState) -> list[tuple[str, str]]:
        """Rows of the start-up table that every stage has; `state` may be abstract."""
        cfg, device = self.recipe.model, jax.devices()[0]
        count = count_parameters(cfg)
        mtp = f", {si(count.mtp)} in the MTP module" if count.mtp else ""
        shards = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
        axes = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
        return [
            ("parameters", f"{si(count.total)}, {si(count.active)} active per token{mtp}"),
            ("experts", f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} and {cfg.n_shared_experts} shared"),
            ("mesh", " x ".join(f"{a} {n}" for a, n in axes.items()) or f"one device ({device.device_kind})"),
            ("state per device", f"{bytes_(sum(shards))}: parameters and optimizer"),
            ("compute", f"{jnp.dtype(self.abstract_model.precision.compute).name} on {device.platform}"),
            ("tokenizer", f"{self.tokenizer.name}, {self.tokenizer.vocab_size} tokens"),
        ]


def _inherited_tokenizer(init_from: str, spec: str) -> Path:
    file = tokenizer_file(open_checkpoint(init_from).directory)
    if file is None:
        fix = f"{init_from} has no tokenizer, and its model does not know the ids of a new one; name the model's own"
        raise ConfigError("data.tokenizer", spec, fix)
    return file


def open_split(recipe: Recipe, split: Literal["train", "heldout"]) -> SkipMalformed:
    """The documents of `data.train` or `data.heldout`."""
    return open_documents(
        getattr(recipe.data, split),
        field=f"data.{split}",
        text_field=recipe.data.text_field,
        max_malformed_fraction=recipe.data.max_malformed_fraction,
    )
