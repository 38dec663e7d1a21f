"""A model without its arrays. Training carries dictionaries of arrays by parameter path, and merges them to compute.

Paths such as `moe_layers/attention/q_b` are the keys of gradients, optimizer state and checkpoints.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from mla_moe.config import KernelConfig, LoRAConfig, ModelConfig
from mla_moe.nn.lora import adaptable, add_adapters
from mla_moe.nn.param import Precision, RouterBias
from mla_moe.nn.quantized import quantizable, quantize_shapes
from mla_moe.nn.transformer import Remat, Transformer
from mla_moe.parallel.mesh import MeshView
from mla_moe.parallel.sharding import TRAINING_RULES, ShardingRules, logical_axes, partition_spec, set_sharding_rules

Arrays = dict[str, jax.Array]
"""Arrays by parameter path."""


class AbstractModel:
    """Structure, shapes, dtypes and shardings of a `Transformer`, from `nnx.eval_shape`: no array is allocated."""

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        precision: Precision | None = None,
        kernels: KernelConfig = KernelConfig(),
        remat: Remat = "none",
        rules: ShardingRules = TRAINING_RULES,
        lora: LoRAConfig = LoRAConfig(),
    ):
        """With `lora` only the adapters are trained (`param_paths`), and the matrices beside them are stored in the
        compute dtype, in which they are used."""
        self.cfg, self.precision, self.rules = cfg, precision or Precision.default(), rules
        self.kernels, self.lora = kernels, lora

        def create() -> Transformer:
            model = Transformer(cfg, rngs=nnx.Rngs(0), precision=self.precision, kernels=kernels, remat=remat)
            if lora.rank:
                add_adapters(model, lora, rngs=nnx.Rngs(0))
            return model

        model = nnx.eval_shape(create)
        self.formats = lora.formats("/".join(map(str, path)) for path, _ in quantizable(model))
        """Formats of the quantized matrices, by path."""
        quantize_shapes(model, self.formats)
        if rules != TRAINING_RULES:
            set_sharding_rules(model, rules)
        self.adaptable_paths = ["/".join(map(str, path)) for path, _ in adaptable(model)]
        self.graph, self.variables = nnx.graphdef(model), model_variables(model)
        params = [p for p, v in self.variables.items() if isinstance(v, nnx.Param)]
        self.adapter_paths = [path for path in params if is_adapter(path)]
        self.param_paths = self.adapter_paths or params
        """Those that are trained."""
        self.frozen_paths = [path for path in params if path not in self.param_paths]
        for path in self.frozen_paths:
            if path in self.formats:
                continue
            self.variables[path] = _in_dtype(self.variables[path], self.precision.compute)
        self.bias_paths = [p for p, v in self.variables.items() if isinstance(v, RouterBias)]

    def init(self, seed: int, mesh: Mesh, paths: Sequence[str] | None = None) -> Arrays:
        """Initialise parameters, or those of `paths`; each device receives its own shard only.

        NumPy draws them on the host, matrix by matrix, from the seed, the path and the matrix's index: they are the
        same on every mesh and platform, and nothing compiles (a random kernel per parameter takes 10 s on two cores).
        """
        shardings = self.shardings(mesh)

        def initialize(path: str, variable: nnx.Variable) -> jax.Array:
            abstract = variable.get_value()
            if (fill := variable.get_metadata("fill", None)) is not None:
                return jax.device_put(np.full(abstract.shape, fill, abstract.dtype), shardings[path])
            shard = partial(_random_shard, [seed, zlib.crc32(path.encode())], variable, abstract)
            return jax.make_array_from_callback(abstract.shape, shardings[path], shard)

        return {path: initialize(path, self.variables[path]) for path in (self.variables if paths is None else paths)}

    def merge(self, arrays: Mapping[str, jax.Array]) -> Transformer:
        """The model with these arrays as its parameters."""
        filled = [(tuple(path.split("/")), v.replace(arrays[path])) for path, v in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(filled))

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """The sharding of each parameter, from the model's sharding rules."""
        view = MeshView(mesh)
        return {
            path: view.sharding(partition_spec(logical_axes(v), v.get_value().shape, view, self.rules))
            for path, v in self.variables.items()
        }

    def abstract(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings: what a checkpoint is restored into."""
        shardings = self.shardings(mesh)
        return {path: v.get_value().update(sharding=shardings[path]) for path, v in self.variables.items()}


def model_arrays(model: Transformer) -> Arrays:
    """A model's arrays by path, the inverse of `AbstractModel.merge`."""
    return {path: v.get_value() for path, v in model_variables(model).items()}


def model_variables(model: Transformer) -> dict[str, nnx.Variable]:
    """A model's NNX variables by path."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}


def is_adapter(path: str) -> bool:
    """Whether a parameter path is that of a LoRA adapter's factor (`nn.lora`)."""
    return "/lora/" in path


def _in_dtype(variable: nnx.Variable, dtype: DTypeLike) -> nnx.Variable:
    """A matrix in another dtype. Norms stay as they are, and what is used in float32: routers, weights of an index."""
    is_float32 = {"router", "index_weights"} & set(variable.get_metadata("out_sharding"))
    used_in_it = variable.get_metadata("role", None) in ("matrix", "embedding") and not is_float32
    return variable.replace(variable.get_value().update(dtype=dtype)) if used_in_it else variable


def _random_shard(
    seeds: list[int], variable: nnx.Variable, abstract: jax.ShapeDtypeStruct, index: tuple[slice, ...] | None
) -> np.ndarray:
    """The shard `index` of a parameter: full matrices (its last two axes) are drawn, then sliced. Its metadata `bound`
    is that of a uniform distribution, or `std` that of a normal one."""
    assert index is not None
    bound, std = (variable.get_metadata(name, None) for name in ("bound", "std"))
    shape, dtype = abstract.shape, abstract.dtype
    matrices = np.arange(math.prod(shape[:-2])).reshape(shape[:-2])[index[:-2]]
    sizes = (len(range(*i.indices(n))) for i, n in zip(index[-2:], shape[-2:], strict=True))
    shard = np.empty((matrices.size, *sizes), dtype)
    for position, matrix_index in enumerate(matrices.flat):
        random = np.random.Generator(np.random.Philox([*seeds, matrix_index]))
        if bound is None:
            values = std * random.standard_normal(shape[-2:], np.float32)
        else:
            values = bound * (2 * random.random(shape[-2:], np.float32) - 1)
        shard[position] = values[index[-2:]].astype(dtype)
    return shard.reshape(*matrices.shape, *shard.shape[1:])
