"""A model without its arrays. Training carries plain dictionaries of arrays by path, and merges them where it computes.

Paths such as `moe_layers/attention/q_b` are the keys of gradients, optimizer state and checkpoints.
"""

import math
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.param import Precision, RouterBias, Scale, logical_axes
from mla_moe.nn.transformer import Remat, Transformer
from mla_moe.parallel.sharding import TRAINING_RULES, partition_spec

Arrays = dict[str, jax.Array]


class AbstractModel:
    """Structure, types and shapes of a `Transformer`; nothing is allocated."""

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        precision: Precision | None = None,
        kernels: KernelConfig = KernelConfig(),
        remat: Remat = "none",
        rules: Mapping[str, str | None] = TRAINING_RULES,
    ):
        self.cfg, self.precision, self.rules = cfg, precision or Precision.default(), rules
        how: dict[str, Any] = {"precision": self.precision, "kernels": kernels, "remat": remat}
        model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), **how))
        if rules != TRAINING_RULES:
            for _, variable in nnx.iter_graph(model):
                if isinstance(variable, nnx.Variable):
                    variable.set_metadata("rules", tuple(rules.items()))
        self.graph, state = nnx.split(model)
        self.variables: dict[str, nnx.Variable] = dict(_flat(state))
        self.param_paths = [p for p, v in self.variables.items() if isinstance(v, nnx.Param)]
        self.bias_paths = [p for p, v in self.variables.items() if isinstance(v, RouterBias)]

    def init(self, seed: int, mesh: Mesh) -> Arrays:
        """Fresh parameters, each device given its own part only.

        Drawn by NumPy on the host, matrix by matrix, from the seed, the path and the matrix's index: every mesh and
        platform gets the same numbers, and nothing compiles (a random kernel per parameter takes 10 s on two cores).
        """
        shardings = self.shardings(mesh)

        def make(path, variable):
            shape, dtype = variable.get_value().shape, variable.get_value().dtype
            if isinstance(variable, Scale | RouterBias):
                fill = 1 if isinstance(variable, Scale) else 0
                return jax.device_put(np.full(shape, fill, dtype), shardings[path])
            std = variable.get_metadata("std")
            draw = partial(_normal, seed=seed, path=path, shape=shape, std=std, dtype=dtype)
            return jax.make_array_from_callback(shape, shardings[path], draw)

        return {path: make(path, variable) for path, variable in self.variables.items()}

    def merge(self, arrays: Mapping[str, jax.Array]) -> Transformer:
        """The model that has these arrays."""
        filled = [(tuple(path.split("/")), v.replace(arrays[path])) for path, v in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(filled))

    def shardings(self, mesh: Mesh) -> dict[str, jax.sharding.NamedSharding]:
        return {
            path: NamedSharding(mesh, partition_spec(logical_axes(v), v.get_value().shape, mesh, self.rules))
            for path, v in self.variables.items()
        }

    def abstract(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and shardings: what a checkpoint is restored into."""
        shardings = self.shardings(mesh)
        return {
            path: jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype, sharding=shardings[path])
            for path, v in self.variables.items()
        }


def model_arrays(model: Transformer) -> Arrays:
    """A model's arrays by path; `Skeleton.merge` is the way back."""
    return {path: v.get_value() for path, v in model_variables(model).items()}


def model_variables(model: Transformer) -> dict[str, nnx.Variable]:
    return dict(_flat(nnx.state(model)))


def _flat(state):
    return [("/".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]


def _normal(index, *, seed, path, shape, std, dtype) -> np.ndarray:
    """The part `index` of a parameter: whole matrices (its last two axes) are drawn, then cut."""
    stacked = np.arange(math.prod(shape[:-2])).reshape(shape[:-2])[index[:-2]]
    part = np.empty(
        (stacked.size, *(len(range(*i.indices(n))) for i, n in zip(index[-2:], shape[-2:], strict=True))), dtype
    )
    for place, number in enumerate(stacked.flat):
        random = np.random.Generator(np.random.Philox([seed, zlib.crc32(path.encode()), number]))
        part[place] = (std * random.standard_normal(shape[-2:], np.float32))[index[-2:]].astype(dtype)
    return part.reshape(*stacked.shape, *part.shape[1:])
