"""The programs of a recipe's stages, traced for devices that need not exist."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.stages import Traced

from mla_moe.counting import train_flops_per_token
from mla_moe.nn.kernels import resolve
from mla_moe.nn.param import Precision
from mla_moe.nn.skeleton import Skeleton
from mla_moe.ops.expert_exchange import chance, schedule
from mla_moe.ops.experts import block_size
from mla_moe.plan.flops import Expected
from mla_moe.plan.topology import Topology
from mla_moe.recipe import Recipe
from mla_moe.sharding import BATCH, check_divisible, make_mesh, rules_of
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import abstract_state, make_step

Name = Literal["train", "decode"]


class Stage(NamedTuple):
    """A program before it is compiled, and what is known of it without."""

    traced: Traced
    mesh: Mesh
    kinds: dict[str, float]
    """Bytes of one device that live throughout, by what they are for."""
    useful: float
    """FLOPs of one device that the mathematics needs."""
    recomputed: float
    """FLOPs of one device that a backward pass does again on purpose."""
    expected: Expected
    row_share: float
    """How full the expert exchange's buffers are, if the routing is even."""
    tokens: int
    """Read in one run, over all devices."""


def train(recipe: Recipe, topology: Topology) -> Stage:
    """The step of `training.step`, as `train.py` runs it."""
    mesh = make_mesh(recipe.mesh, topology.devices)
    check_divisible(recipe, mesh)
    training, cfg = recipe.training, recipe.model
    skeleton = make_skeleton(recipe, mesh)
    tx = make_optimizer(recipe.optimizer, training.steps, skeleton)
    state = abstract_state(skeleton, tx, mesh)
    shape = training.batch_size, training.sequence_length
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
    traced = make_step(skeleton, tx, training, mesh).trace(state, batch)

    tokens, devices = math.prod(shape), mesh.size
    useful = train_flops_per_token(cfg, training.sequence_length) * tokens / devices
    head = 6 * cfg.vocab_size * cfg.hidden_size * (1 + cfg.num_nextn_predict_layers) * tokens / devices
    local = tokens // training.accumulation // devices
    width = jnp.dtype(skeleton.precision.compute).itemsize
    kinds = {
        "parameters": bytes_of(state.params) + bytes_of(state.biases),
        "optimizer": bytes_of(state.optimizer),
        "batch": bytes_of(batch),
        "gradients": bytes_of(state.params),
    }
    if training.remat == "full":
        kinds["layer inputs"] = float(cfg.num_hidden_layers * local * cfg.hidden_size * width)
    expected, row_share = even_routing(recipe, skeleton, mesh, local)
    recomputed = (useful - head) / 3 if training.remat == "full" else 0.0
    return Stage(traced, mesh, kinds, useful, recomputed, expected, row_share, tokens)


def make_skeleton(recipe: Recipe, mesh: Mesh) -> Skeleton:
    platform = mesh.devices.flat[0].platform
    chosen = recipe.training.compute_dtype
    auto = "float32" if platform == "cpu" else "bfloat16"
    return Skeleton(
        recipe.model,
        precision=Precision(compute=jnp.dtype(auto if chosen == "auto" else chosen)),
        kernels=resolve(recipe.kernels, platform),
        remat=recipe.training.remat,
        rules=rules_of(recipe.mesh.rules),
    )


def even_routing(recipe: Recipe, skeleton: Skeleton, mesh: Mesh, tokens: int) -> tuple[Expected, float]:
    """What `tokens` of a device give its experts to do, and how full the exchange's buffers get."""
    cfg, devices = recipe.model, mesh.shape["expert"]
    kernels = resolve(recipe.kernels, mesh.devices.flat[0].platform)
    here = cfg.n_routed_experts // devices
    choices = tokens * cfg.num_experts_per_tok
    if devices == 1:
        block = block_size(choices, here)
        return Expected(rows=choices + here * (block - 1) / 2), 1.0
    s = schedule(
        cfg, tokens, devices, buffer=kernels.expert_buffer, exchange=kernels.exchange, multiply=kernels.grouped_matmul
    )
    rounds, block = s.rounds, block_size(s.most, here)
    rows = choices / rounds + here * (block - 1) / 2
    return Expected(rounds, rows), tokens * chance(cfg, devices) / (rounds * s.capacity)


def bytes_of(tree: Any) -> float:
    """Of one device."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))
