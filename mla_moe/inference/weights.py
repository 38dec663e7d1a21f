"""A model's arrays as decoding wants them: in the compute type, and laid out so that no step copies them."""

import jax
from flax import nnx
from jax.sharding import Mesh

from mla_moe.nn.param import Embedding, Matrix
from mla_moe.nn.transformer import Transformer, unstacked
from mla_moe.ops.chosen_experts import packed


class Structure:
    """A model without its arrays, as a static argument. Its hash is taken once: hashing a graph takes 2 ms."""

    def __init__(self, graph: nnx.GraphDef[Transformer]):
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.graph == other.graph)

    def merge(self, state: nnx.State) -> Transformer:
        return nnx.merge(self.graph, state)


def for_inference(model: Transformer) -> tuple[Structure, nnx.State]:
    """The same model with matrices in the compute type; on one CPU, its layers one by one.

    Routers stay in float32, and on one CPU experts in as many bytes as they have: reading them from memory is what
    takes the time there. Arrays that need no change are shared with `model`.
    """
    one_cpu = mesh_of(model) is None and jax.default_backend() == "cpu"
    graph, state = nnx.split(model)
    cast = jax.jit(lambda x: x.astype(model.precision.compute))

    def convert(variable):
        if one_cpu and "experts" in variable.get_metadata("axes"):
            return variable.replace(packed(variable.get_value()))
        return variable.replace(cast(variable.get_value())) if in_compute_type(variable) else variable

    model = nnx.merge(graph, jax.tree.map(convert, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))
    graph, state = nnx.split(unstacked(model) if one_cpu else model)
    return Structure(graph), state


def in_compute_type(variable: nnx.Variable) -> bool:
    """Whether decoding holds it in the type of computation."""
    return isinstance(variable, Matrix | Embedding) and "router" not in variable.get_metadata("axes")


def mesh_of(model: Transformer) -> Mesh | None:
    """The mesh that the model lies on, if it is more than one device."""
    sharding = model.embed.get_value().sharding
    mesh = getattr(sharding, "mesh", None)
    return mesh if mesh is not None and mesh.size > 1 else None
