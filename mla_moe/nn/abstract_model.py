"""A model without its arrays. Training carries dictionaries of arrays by parameter path, and merges them to compute.

Paths such as `moe_layers/attention/q_b` are the keys of gradients, optimizer state and checkpoints.
"""

import math
import zlib
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.param import Precision, RouterBias
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
    ):
        self.cfg, self.precision, self.rules = cfg, precision or Precision.default(), rules
        self.kernels = kernels
        model = nnx.eval_shape(
            lambda: Transformer(cfg, rngs=nnx.Rngs(0), precision=self.precision, kernels=kernels, remat=remat)
        )
        if rules != TRAINING_RULES:
            set_sharding_rules(model, rules)
        self.graph, self.variables = nnx.graphdef(model), model_variables(model)
        self.param_paths = [p for p, v in self.variables.items() if isinstance(v, nnx.Param)]
        self.bias_paths = [p for p, v in self.variables.items() if isinstance(v, RouterBias)]

    def init(self, seed: int, mesh: Mesh) -> Arrays:
        """Initialise parameters; each device receives its own shard only.

        NumPy draws them on the host, matrix by matrix, from the seed, the path and the matrix's index: they are the
        same on every mesh and platform, and nothing compiles (a random kernel per parameter takes 10 s on two cores).
        """
        shardings = self.shardings(mesh)

        def initialize(path: str, variable: nnx.Variable) -> jax.Array:
            abstract = variable.get_value()
            if (fill := variable.get_metadata("fill", None)) is not None:
                return jax.device_put(np.full(abstract.shape, fill, abstract.dtype), shardings[path])
            shard = partial(_normal_shard, [seed, zlib.crc32(path.encode())], variable.get_metadata("std"), abstract)
            return jax.make_array_from_callback(abstract.shape, shardings[path], shard)

        return {path: initialize(path, variable) for path, variable in self.variables.items()}

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


def _normal_shard(
    seeds: list[int], std: float, abstract: jax.ShapeDtypeStruct, index: tuple[slice, ...] | None
) -> np.ndarray:
    """The shard `index` of a parameter: full matrices (its last two axes) are drawn, then sliced."""
    assert index is not None
    shape, dtype = abstract.shape, abstract.dtype
    matrices = np.arange(math.prod(shape[:-2])).reshape(shape[:-2])[index[:-2]]
    sizes = (len(range(*i.indices(n))) for i, n in zip(index[-2:], shape[-2:], strict=True))
    shard = np.empty((matrices.size, *sizes), dtype)
    for position, matrix_index in enumerate(matrices.flat):
        random = np.random.Generator(np.random.Philox([*seeds, matrix_index]))
        shard[position] = (std * random.standard_normal(shape[-2:], np.float32))[index[-2:]].astype(dtype)
    return shard.reshape(*matrices.shape, *shard.shape[1:])
