"""The programs of a recipe's stages, traced for devices that need not exist."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Traced

from mla_moe.config import ModelConfig, Recipe, require
from mla_moe.inference import model_runner
from mla_moe.inference.model_runner import empty_slots
from mla_moe.inference.weights import ModelGraph, decode_sharding, inference_layout
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.kernels import resolve_kernels
from mla_moe.nn.kv_cache import cache_shape, cache_sharding, round_up_capacity
from mla_moe.nn.model_costs import count_parameters, train_flops_per_token
from mla_moe.nn.param import Precision
from mla_moe.ops import attention, cached_attention
from mla_moe.ops.experts import block_size
from mla_moe.parallel.expert_parallel import dispatch_plan, expected_device_fraction
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.parallel.sharding import check_divisible, rules_with_overrides
from mla_moe.plan.flops import ExpectedRouting
from mla_moe.plan.topology import Topology
from mla_moe.rl.learner_programs import LearnerPrograms
from mla_moe.rl.objectives import kl_coefficient
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import abstract_state, make_train_step


class StageProgram(NamedTuple):
    """A program before it is compiled, and what is known of it without."""

    traced: Traced
    mesh: Mesh
    kinds: dict[str, float]
    """Bytes of one device that live throughout, by what they are for."""
    useful: float
    """FLOPs of one device that the mathematics needs."""
    recomputed: float
    """FLOPs of one device that a backward pass does again on purpose."""
    expected: ExpectedRouting
    row_share: float
    """How full the expert exchange's buffers are, if the routing is even."""
    tokens: int
    """Read in one run, over all devices."""
    held: dict[str, float]
    """Bytes of one device that live beside the program, by what they are for."""
    sampling: float
    """Bytes of one device that live while answers are sampled, where the stage does that too."""


def train(recipe: Recipe, topology: Topology) -> StageProgram:
    """The step of `training.step`, as `train.py` runs it."""
    mesh = make_mesh(recipe.mesh, topology.devices)
    check_divisible(recipe, mesh)
    training, cfg = recipe.training, recipe.model
    abstract_model = make_abstract_model(recipe, mesh)
    tx = make_optimizer(recipe.optimizer, training.steps, abstract_model)
    state = abstract_state(abstract_model, tx, mesh)
    shape = training.batch_size, training.sequence_length
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
    traced = make_train_step(abstract_model, tx, training, mesh).trace(state, batch)

    kinds = {
        "parameters": bytes_of(state.params) + bytes_of(state.biases),
        "optimizer": bytes_of(state.optimizer),
        "batch": bytes_of(batch),
        "gradients": bytes_of(state.params),
    }
    return _gradients(traced, recipe, abstract_model, cfg, mesh, shape, training.gradient_accumulation_steps, kinds)


def rl(recipe: Recipe, topology: Topology) -> StageProgram:
    """Gradients of `rl.micro_batch_size` rows of answers, the largest program of `rl.update`; beside it lie the moments, the
    reference and the sampler's cache."""
    require(recipe.rl.steps > 0, "rl.steps", recipe.rl.steps, "the recipe has no reinforcement learning to plan")
    mesh, cfg, settings = make_mesh(recipe.mesh, topology.devices), recipe.model, recipe.rl
    check_divisible(recipe, mesh)
    abstract_model = make_abstract_model(recipe, mesh)
    tx = make_optimizer(settings.optimizer, settings.steps * settings.minibatches, abstract_model)
    state = abstract_state(abstract_model, tx, mesh)
    shape = settings.micro_batch_size, settings.packed_row_length
    place = NamedSharding(mesh, BATCH_SPEC)
    part: Any = dict.fromkeys(
        ("tokens", "targets", "segment_ids", "positions", "answer_BT"),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place),
    )
    numbers = ["sampler_logprob_BT", "advantage_BT", "weight_BT"]
    numbers += ["old_logprob_BT"] * (settings.minibatches > 1) + ["reference_logprob_BT"] * (
        kl_coefficient(settings) > 0
    )
    part |= dict.fromkeys(numbers, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place))
    if settings.routing_replay and cfg.num_moe_layers:
        chosen = *shape, cfg.num_moe_layers, cfg.num_experts_per_tok
        part["replay"] = jax.ShapeDtypeStruct(chosen, jnp.int16, sharding=place)
    programs = LearnerPrograms(abstract_model, tx, recipe, mesh)
    total = programs.abstract_total(state, part)
    traced = programs.add.trace(state.params, state.biases, part, total)

    parameters = bytes_of(state.params) + bytes_of(state.biases)
    kinds = {"parameters": parameters, "batch": bytes_of(part), "sum of gradients": bytes_of(total.gradient)}
    weights, cache = sampler(
        recipe, abstract_model, mesh, settings.max_num_seqs, settings.max_prompt_tokens + settings.max_new_tokens
    )
    held = {"optimizer": bytes_of(state.optimizer), "sampler's cache": bytes_of(cache)}
    if kl_coefficient(settings):
        held["reference"] = bytes_of(state.params)
    trained = replace(cfg, num_nextn_predict_layers=0)
    kinds |= {"gradients": bytes_of(state.params)}
    stage = _gradients(traced, recipe, abstract_model, trained, mesh, shape, 1, kinds)
    return stage._replace(held=held, sampling=parameters + sum(held.values()) + bytes_of(weights))


def _gradients(
    traced: Traced,
    recipe: Recipe,
    abstract_model: AbstractModel,
    cfg: ModelConfig,
    mesh: Mesh,
    shape: tuple[int, int],
    parts: int,
    kinds: dict[str, float],
) -> StageProgram:
    """A program that differentiates `shape` tokens, rows by length, in so many parts; `cfg` is what it runs of the
    model."""
    (_, length), tokens, devices, full = shape, math.prod(shape), mesh.size, recipe.training.remat == "full"
    useful = train_flops_per_token(cfg, length) * tokens / devices
    head = 6 * cfg.vocab_size * cfg.hidden_size * (1 + cfg.num_nextn_predict_layers) * tokens / devices
    local = tokens // parts // devices
    if full:
        item = jnp.dtype(abstract_model.precision.compute).itemsize
        kinds = kinds | {"layer inputs": float(cfg.num_hidden_layers * local * cfg.hidden_size * item)}
    expected, row_share = even_routing(recipe, mesh, local)
    expected = replace(expected, blocks=length / attention.block_size(length) / 2)  # on and below the diagonal
    # Attention's derivative makes the scores again, and a rematerialised layer all of its forward pass.
    layers = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    width = cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    recomputed = layers * width * (length + 1) * tokens / devices + ((useful - head) / 3 if full else 0.0)
    return StageProgram(traced, mesh, kinds, useful, recomputed, expected, row_share, tokens, held={}, sampling=0.0)


def decode(recipe: Recipe, topology: Topology, batch: int, context: int, int8_kv_cache: bool = False) -> StageProgram:
    """One token for each of `batch` sequences of `context` tokens: the engine's loop, of which one turn is counted."""
    fix = "plan decoding for an accelerator: on a CPU the engine takes the model apart"
    require(topology.chip is not None, "topology", topology.name, fix)
    mesh, cfg = make_mesh(recipe.mesh, topology.devices), recipe.model
    rows = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    require(batch % rows == 0, "batch", batch, f"must be a multiple of {rows}: sequences over data x fsdp x expert")
    abstract_model = make_abstract_model(recipe, mesh)
    state, cache = sampler(recipe, abstract_model, mesh, batch, context, int8_kv_cache)
    place = cache_sharding(mesh, batch)
    whole = NamedSharding(mesh, PartitionSpec())
    slots = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), empty_slots(batch))
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        structure = ModelGraph(abstract_model.graph)
        traced = model_runner.decode.trace(
            structure, state, cache, slots, number, False, record=False, tempered=False, place=place
        )
    weights = count_parameters(cfg).active - cfg.vocab_size * cfg.hidden_size
    width = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    useful = batch / mesh.size * (2 * weights + 2 * cfg.num_hidden_layers * cfg.num_attention_heads * width * context)
    kinds = {"parameters": bytes_of(state), "cache": bytes_of(cache)}
    # The devices of `expert` have the same tokens; of the experts a few are chosen by none.
    local, K, e = batch // (mesh.shape["data"] * mesh.shape["fsdp"]), cfg.num_experts_per_tok, experts_of(cfg, mesh)
    chosen = e * (1 - (1 - K / cfg.n_routed_experts) ** local)
    multiply = resolve_kernels(recipe.kernels, mesh.devices.flat[0].platform).grouped_matmul
    block = block_size(local * min(K, e), e, multiply)
    rows = chosen * block * math.ceil(local * K / cfg.n_routed_experts / block)
    expected = ExpectedRouting(blocks=cache.shape[2] / cached_attention.BLOCK, rows=rows, experts=chosen)
    return StageProgram(traced, mesh, kinds, useful, 0.0, expected, 1.0, batch, held={}, sampling=0.0)


def sampler(
    recipe: Recipe, abstract_model: AbstractModel, mesh: Mesh, slots: int, context: int, int8_kv_cache: bool = False
) -> tuple[nnx.State, Any]:
    """An engine's weights and cache, without arrays."""
    compute, cfg = jnp.dtype(abstract_model.precision.compute), recipe.model

    def held(v):
        x = jax.eval_shape(lambda x: inference_layout(v.replace(x), compute, mesh), v.get_value())
        return v.replace(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=decode_sharding(v, mesh)))

    state = nnx.from_flat_state([(tuple(path.split("/")), held(v)) for path, v in abstract_model.variables.items()])
    dtype, place = jnp.int8 if int8_kv_cache else compute, cache_sharding(mesh, slots)
    return state, cache_shape(cfg, slots, round_up_capacity(context), dtype, layers=cfg.num_hidden_layers, place=place)


def experts_of(cfg: ModelConfig, mesh: Mesh) -> int:
    """How many a device has."""
    return cfg.n_routed_experts // mesh.shape["expert"]


def make_abstract_model(recipe: Recipe, mesh: Mesh) -> AbstractModel:
    platform = mesh.devices.flat[0].platform
    chosen = recipe.training.compute_dtype
    auto = "float32" if platform == "cpu" else "bfloat16"
    return AbstractModel(
        recipe.model,
        precision=Precision(compute=jnp.dtype(auto if chosen == "auto" else chosen)),
        kernels=resolve_kernels(recipe.kernels, platform),
        remat=recipe.training.remat,
        rules=rules_with_overrides(recipe.mesh.rules),
    )


def even_routing(recipe: Recipe, mesh: Mesh, tokens: int) -> tuple[ExpectedRouting, float]:
    """What `tokens` of a device give its experts to do, and how full the exchange's buffers get."""
    cfg, devices = recipe.model, mesh.shape["expert"]
    kernels = resolve_kernels(recipe.kernels, mesh.devices.flat[0].platform)
    here = experts_of(cfg, mesh)
    choices = tokens * cfg.num_experts_per_tok
    if devices == 1:
        block = block_size(choices, here, kernels.grouped_matmul)
        return ExpectedRouting(rows=choices + here * (block - 1) / 2), 1.0
    s = dispatch_plan(
        cfg, tokens, devices, buffer=kernels.capacity_factor, exchange=kernels.dispatch, multiply=kernels.grouped_matmul
    )
    rounds, block = s.rounds, block_size(s.most, here, kernels.grouped_matmul)
    rows = choices / rounds + here * (block - 1) / 2
    return ExpectedRouting(rounds, rows), tokens * expected_device_fraction(cfg, devices) / (rounds * s.capacity)


def bytes_of(tree: Any) -> float:
    """Of one device."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))
