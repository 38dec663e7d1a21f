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

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.param import Precision, RouterBias, Scale, logical_axes
from mla_moe.nn.transformer import Remat, Transformer
from mla_moe.parallel.sharding import TRAINING_RULES, ShardingRules, partition_spec

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
        model = nnx.eval_shape(
            lambda: Transformer(cfg, rngs=nnx.Rngs(0), precision=self.precision, kernels=kernels, remat=remat)
        )
        if rules != TRAINING_RULES:
            for _, variable in nnx.iter_graph(model):
                if isinstance(variable, nnx.Variable):
                    variable.set_metadata("rules", tuple(rules.items()))
        self.graph, state = nnx.split(model)
        self.variables: dict[str, nnx.Variable] = _by_path(state)
        self.param_paths = [p for p, v in self.variables.items() if isinstance(v, nnx.Param)]
        self.bias_paths = [p for p, v in self.variables.items() if isinstance(v, RouterBias)]

    def init(self, seed: int, mesh: Mesh) -> Arrays:
        """Initialise parameters; each device receives its own shard only.

        NumPy draws them on the host, matrix by matrix, from the seed, the path and the matrix's index: they are the
        same on every mesh and platform, and nothing compiles (a random kernel per parameter takes 10 s on two cores).
        """
        shardings = self.shardings(mesh)

        def initialize(path: str, variable: nnx.Variable) -> jax.Array:
            shape, dtype = variable.get_value().shape, variable.get_value().dtype
            if isinstance(variable, Scale | RouterBias):
                fill = 1 if isinstance(variable, Scale) else 0
                return jax.device_put(np.full(shape, fill, dtype), shardings[path])
            std = variable.get_metadata("std")
            shard = partial(_normal_shard, seed=seed, path=path, shape=shape, std=std, dtype=dtype)
            return jax.make_array_from_callback(shape, shardings[path], shard)

        return {path: initialize(path, variable) for path, variable in self.variables.items()}

    def merge(self, arrays: Mapping[str, jax.Array]) -> Transformer:
        """The model with these arrays as its parameters."""
        filled = [(tuple(path.split("/")), v.replace(arrays[path])) for path, v in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(filled))

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """The sharding of each parameter, from the model's sharding rules."""
        return {
            path: NamedSharding(mesh, partition_spec(logical_axes(v), v.get_value().shape, mesh, self.rules))
            for path, v in self.variables.items()
        }

    def abstract(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings: what a checkpoint is restored into."""
        shardings = self.shardings(mesh)
        return {
            path: jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype, sharding=shardings[path])
            for path, v in self.variables.items()
        }


def model_arrays(model: Transformer) -> Arrays:
    """A model's arrays by path, the inverse of `AbstractModel.merge`."""
    return {path: v.get_value() for path, v in model_variables(model).items()}


def model_variables(model: Transformer) -> dict[str, nnx.Variable]:
    """A model's NNX variables by path."""
    return _by_path(nnx.state(model))


def _by_path(state: nnx.State) -> dict[str, nnx.Variable]:
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _normal_shard(
    index: tuple[slice, ...] | None, *, seed: int, path: str, shape: Sequence[int], std: float, dtype: DTypeLike
) -> np.ndarray:
    """The shard `index` of a parameter: full matrices (its last two axes) are drawn, then sliced."""
    assert index is not None
    matrices = np.arange(math.prod(shape[:-2])).reshape(shape[:-2])[index[:-2]]
    sizes = (len(range(*i.indices(n))) for i, n in zip(index[-2:], shape[-2:], strict=True))
    shard = np.empty((matrices.size, *sizes), dtype)
    for position, matrix_index in enumerate(matrices.flat):
        random = np.random.Generator(np.random.Philox([seed, zlib.crc32(path.encode()), matrix_index]))
        shard[position] = (std * random.standard_normal(shape[-2:], np.float32))[index[-2:]].astype(dtype)
    return shard.reshape(*matrices.shape, *shard.shape[1:])
