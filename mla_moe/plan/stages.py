"""The programs of a recipe's stages, traced for devices that need not be attached."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered, Traced

from mla_moe.checkpoint.reader import read_model_config
from mla_moe.config import LoRAConfig, ModelConfig, OptimizerConfig, Recipe, TrainingConfig, require
from mla_moe.inference.decode import ProgramOptions, empty_batch
from mla_moe.inference.programs import decode as decode_program
from mla_moe.inference.weights import ModelGraph, decode_sharding, inference_layout
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.kv_cache import cache_shape, cache_sharding, round_up_capacity
from mla_moe.nn.model_costs import active_matmul_weights, train_flops_per_token
from mla_moe.nn.param import resolve_kernels
from mla_moe.ops import attention, cached_attention
from mla_moe.ops.experts import block_size
from mla_moe.parallel.dispatch_plan import dispatch_plan, expected_device_fraction
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.parallel.sharding import (
    DECODE_BATCH_AXES,
    bytes_per_device,
    check_divisible,
    check_model_divisible,
)
from mla_moe.plan.flops import ExpectedRouting
from mla_moe.plan.topology import Topology
from mla_moe.rl.learner import Learner
from mla_moe.rl.objectives import kl_coefficient
from mla_moe.rl.teacher import abstract_teacher, check_teacher
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.run_context import make_abstract_model
from mla_moe.training.step import abstract_state, make_train_step

TEMPORARIES = ("gradients", "layer inputs")
"""Entries of `StageProgram.memory` that are temporaries of the program; the others are arguments."""


class StageProgram(NamedTuple):
    """A traced program, and what is known of it without compiling, of one device and as in `Plan`."""

    traced: Traced
    mesh: Mesh
    memory: dict[str, float]
    useful_flops: float
    recomputed_flops: float
    """FLOPs that the backward pass repeats by rematerialisation."""
    expected: ExpectedRouting
    tokens: int
    resident: dict[str, float]
    sampling_bytes: float
    bubble_fraction: float = 0.0


class DecodeOptions(NamedTuple):
    """The decode stage: `batch` sequences with `context` cached tokens each."""

    batch: int = 128
    context: int = 4096
    int8_kv_cache: bool = False


def trace_stage(recipe: Recipe, topology: Topology, stage: str, options: DecodeOptions | None = None) -> StageProgram:
    """Trace `stage` (`train`, `sft`, `rl` or `decode`, with its options) of a recipe. Raises `ConfigError` for a
    mesh that the topology or the recipe cannot be sharded over."""
    with jax.default_device(topology.devices[0]):  # kernels are chosen for it (`ops.kernel_choice`)
        if stage == "decode":
            return decode(recipe, topology, options or DecodeOptions())
        return {"train": train, "sft": sft, "rl": rl}[stage](recipe, topology)


def lower_stage(recipe: Recipe, topology: Topology, stage: str, options: DecodeOptions | None = None) -> Lowered:
    """`trace_stage`, lowered for the topology's platform."""
    return lower(trace_stage(recipe, topology, stage, options), topology)


def lower(program: StageProgram, topology: Topology) -> Lowered:
    """Lower a traced program for the topology's platform."""
    with jax.default_device(topology.devices[0]):
        return program.traced.lower(lowering_platforms=(topology.platform,))


def train(recipe: Recipe, topology: Topology) -> StageProgram:
    """The training step of `training.step`, as pretraining runs it."""
    return _next_token(recipe, topology, recipe.training, recipe.optimizer, LoRAConfig())


def sft(recipe: Recipe, topology: Topology) -> StageProgram:
    """The training step of SFT, with LoRA of its adapters."""
    require(recipe.sft.active, "sft.steps", recipe.sft.steps, "has no SFT stage to plan; set a positive number")
    training = recipe.sft.training(recipe.training, max(recipe.sft.steps, 1))
    return _next_token(recipe, topology, training, recipe.sft.optimizer, recipe.lora)


def _next_token(
    recipe: Recipe, topology: Topology, training: TrainingConfig, optimizer: OptimizerConfig, lora: LoRAConfig
) -> StageProgram:
    mesh = make_mesh(recipe.mesh, topology.devices)
    check_divisible(recipe, mesh)
    abstract_model = make_abstract_model(recipe, mesh, lora)
    tx = make_optimizer(optimizer, training.steps, abstract_model)
    state = abstract_state(abstract_model, tx, mesh)
    shape = training.batch_size, training.sequence_length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), tokens)
    traced = make_train_step(abstract_model, tx, training, mesh).trace(state, batch)

    memory = {"parameters": bytes_per_device(state.arrays)}
    memory |= {
        "optimizer": bytes_per_device(state.optimizer),
        "batch": bytes_per_device(batch),
        "gradients": bytes_per_device(state.params),
    }
    count = training.gradient_accumulation_steps
    return _gradient_program(traced, recipe, abstract_model, recipe.model, mesh, shape, count, memory)


def rl(recipe: Recipe, topology: Topology) -> StageProgram:
    """The gradient of one microbatch (`rl.micro_batch_size` packed sequences), the largest program of `rl.learner`.
    The optimizer state, the reference policy and the sampler's KV cache are resident meanwhile."""
    require(recipe.rl.steps > 0, "rl.steps", recipe.rl.steps, "has no RL stage to plan; set a positive number")
    mesh, cfg, settings = make_mesh(recipe.mesh, topology.devices), recipe.model, recipe.rl
    check_divisible(recipe, mesh)
    abstract_model = make_abstract_model(recipe, mesh, recipe.lora)
    tx = make_optimizer(settings.optimizer, settings.steps * settings.minibatches, abstract_model)
    state = abstract_state(abstract_model, tx, mesh)
    shape = settings.micro_batch_size, settings.packed_sequence_length
    sharding = NamedSharding(mesh, BATCH_SPEC)
    integers = "tokens", "targets", "segment_ids", "positions", "completion_BT"
    floats = ["sampler_logprob_BT", "advantage_BT", "weight_BT"]
    floats += ["old_logprob_BT"] * (settings.minibatches > 1)
    floats += ["reference_logprob_BT"] * (kl_coefficient(settings) > 0)
    floats += ["teacher_logprob_BT"] * (settings.teacher_is_endpoint and not settings.teacher_top_k)
    microbatch: Any = dict.fromkeys(integers, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding))
    microbatch |= dict.fromkeys(floats, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding))
    if settings.teacher_top_k:
        top = *shape, settings.teacher_top_k
        for name, dtype in (("teacher_ids_BTk", jnp.int32), ("teacher_logprob_BTk", jnp.float32)):
            microbatch[name] = jax.ShapeDtypeStruct(top, dtype, sharding=sharding)
    if settings.routing_replay and cfg.num_moe_layers:
        selected = *shape, cfg.num_moe_layers, cfg.num_experts_per_tok
        microbatch["replay"] = jax.ShapeDtypeStruct(selected, jnp.int16, sharding=sharding)
    teacher = None
    if settings.teacher is not None and not settings.teacher_is_endpoint:
        cfg_of_teacher = read_model_config(Path(settings.teacher))
        check_teacher(cfg_of_teacher, "rl.teacher", settings.teacher, recipe)
        check_model_divisible(cfg_of_teacher, mesh, "rl.teacher")
        teacher = abstract_teacher(cfg_of_teacher, abstract_model)
    learner = Learner(abstract_model, tx, recipe, mesh, teacher)
    fixed = state.fixed, teacher.abstract(mesh) if teacher else {}
    sums = learner.zeros.eval_shape(state.params, *fixed, microbatch)
    traced = learner.accumulate.trace(state.params, *fixed, microbatch, sums)

    parameters = bytes_per_device(state.arrays)
    memory = {"parameters": parameters, "batch": bytes_per_device(microbatch)}
    memory |= {"teacher": bytes_per_device(fixed[1])} if teacher else {}
    memory |= {"accumulated gradients": bytes_per_device(sums.gradient), "gradients": bytes_per_device(state.params)}
    max_model_len = settings.max_prompt_tokens + settings.max_new_tokens
    sampled = recipe.lora if recipe.lora.quantize_base else LoRAConfig()  # otherwise adapters are merged
    weights, cache = sampler_arrays(
        recipe, make_abstract_model(recipe, mesh, sampled), mesh, settings.max_num_seqs, max_model_len
    )
    resident = {"optimizer": bytes_per_device(state.optimizer), "sampler's KV cache": bytes_per_device(cache)}
    if kl_coefficient(settings):
        resident["reference"] = bytes_per_device(state.params)
    trained = replace(cfg, num_nextn_predict_layers=0)
    program = _gradient_program(traced, recipe, abstract_model, trained, mesh, shape, 1, memory)
    sampling_bytes = parameters + memory.get("teacher", 0) + sum(resident.values()) + bytes_per_device(weights)
    if teacher:  # a forward pass, a third of what training takes
        forward = train_flops_per_token(teacher.cfg, shape[1]) * math.prod(shape) / mesh.size / 3
        program = program._replace(useful_flops=program.useful_flops + forward)
    return program._replace(resident=resident, sampling_bytes=sampling_bytes)


def _gradient_program(
    traced: Traced, recipe: Recipe, abstract_model: AbstractModel, cfg: ModelConfig, mesh: Mesh,
    shape: tuple[int, int], accumulation_steps: int, memory: dict[str, float],
) -> StageProgram:  # fmt: skip
    """A program that computes gradients of a batch `[B, T]`. `cfg` is the part of the model that is differentiated."""
    (_, length), tokens, devices, remat = shape, math.prod(shape), mesh.size, recipe.training.remat
    stages = mesh.shape["pipeline"]
    microbatches = max(accumulation_steps, stages)
    ticks = microbatches + stages - 1
    frozen = bool(abstract_model.lora.rank)
    passes = 2 if frozen else 3  # as long as the forward pass; with LoRA no gradients of weights
    useful = train_flops_per_token(cfg, length, frozen=frozen) * tokens / devices
    head = 2 * passes * cfg.vocab_size * cfg.hidden_size * (1 + cfg.num_nextn_predict_layers) * tokens / devices
    local_tokens = tokens // microbatches // (devices // stages)
    if remat in ("full", "stage"):
        token_bytes = cfg.hidden_size * jnp.dtype(abstract_model.precision.compute).itemsize
        layers = cfg.num_hidden_layers // cfg.layers_per_moe
        if stages > 1:  # the layers of a stage have those of every tick in memory, or one of the stage and one tick's
            own = cfg.num_moe_layers // stages
            layers = ticks * own if remat == "full" else ticks + own
            outside = cfg.first_k_dense_replace + cfg.num_moe_layers % stages
            layers += outside * microbatches // stages
        memory = memory | {"layer inputs": float(layers * local_tokens * token_bytes)}
    key_blocks = length / attention.block_size(length) / 2  # on and below the diagonal
    query_blocks = key_blocks / mesh.shape["context"]
    expected = replace(even_routing(recipe, mesh, local_tokens), key_blocks=key_blocks, query_blocks=query_blocks)
    # The backward pass computes the attention scores again, and with full rematerialisation each layer's forward pass,
    # of a pipeline's stage twice.
    forwards = {"full": 1, "stage": 2}.get(remat, 0)
    layers = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    width = cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    recomputed = layers * width * (length + 1) * tokens / devices + forwards * (useful - head) / passes
    bubble = (stages - 1) / ticks
    return StageProgram(traced, mesh, memory, useful, recomputed, expected, tokens, {}, 0.0, bubble)


def decode(recipe: Recipe, topology: Topology, options: DecodeOptions) -> StageProgram:
    """The engine's decode loop, of which one step is counted: one token for each sequence."""
    batch, context, int8_kv_cache = options
    fix = "decoding is planned for TPU and GPU only; on a CPU the engine runs other code"
    require(topology.accelerator is not None, "topology", topology.name, fix)
    mesh, cfg = make_mesh(recipe.mesh, topology.devices), recipe.model
    shards = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    fix = f"must be a multiple of {shards}: sequences over {' x '.join(BATCH_SPEC[0])}"
    require(batch % shards == 0, "batch", batch, fix)
    abstract_model = make_abstract_model(recipe, mesh)
    state, cache = sampler_arrays(recipe, abstract_model, mesh, batch, context, int8_kv_cache)
    replicated = NamedSharding(mesh, PartitionSpec())
    slots = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), empty_batch(batch))
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        graph = ModelGraph(abstract_model.graph)
        program_options = ProgramOptions(mesh=mesh)
        traced = decode_program.trace(graph, state, cache, slots, steps, False, program_options)
    weights = active_matmul_weights(cfg)
    width = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    attention = 2 * cfg.num_hidden_layers * cfg.num_attention_heads * width * min(context, cfg.index_topk or context)
    if cfg.index_topk is not None:
        attention += 2 * cfg.shared_indexers.count(False) * cfg.index_n_heads * cfg.index_head_dim * context
    useful = batch / mesh.size * (2 * weights + attention)
    memory = {"parameters": bytes_per_device(state), "KV cache": bytes_per_device(cache)}
    key_blocks = cache.shape[2] / cached_attention.BLOCK
    if not cfg.has_experts:
        expected = ExpectedRouting(key_blocks=key_blocks)
        return StageProgram(traced, mesh, memory, useful, 0.0, expected, batch, {}, 0.0)
    # The devices along `expert` have the same tokens; a few experts are selected by no token.
    local_batch = batch // math.prod(mesh.shape[axis] for axis in DECODE_BATCH_AXES)
    K = cfg.num_experts_per_tok
    e = cfg.n_routed_experts // mesh.shape["expert"]
    active = e * (1 - (1 - K / cfg.moe.router_width) ** local_batch)
    kernel = resolve_kernels(recipe.kernels, mesh.devices.flat[0].platform).grouped_matmul
    block = block_size(local_batch * min(K, e), e, kernel)
    rows = active * block * math.ceil(local_batch * K / cfg.moe.router_width / block)
    expected = ExpectedRouting(1.0, rows, active, key_blocks=key_blocks)
    return StageProgram(traced, mesh, memory, useful, 0.0, expected, batch, {}, 0.0)


def sampler_arrays(
    recipe: Recipe, abstract_model: AbstractModel, mesh: Mesh, slots: int, context: int, int8_kv_cache: bool = False
) -> tuple[nnx.State, jax.ShapeDtypeStruct]:
    """Shapes and shardings of an engine's weights and KV cache."""
    compute, cfg = jnp.dtype(abstract_model.precision.compute), recipe.model

    def abstract(v: nnx.Variable) -> nnx.Variable:
        x = jax.eval_shape(lambda x: inference_layout(v.replace(x), compute, mesh), v.get_value())
        return v.replace(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=decode_sharding(v, mesh)))

    state = nnx.from_flat_state([(tuple(path.split("/")), abstract(v)) for path, v in abstract_model.variables.items()])
    dtype, capacity = jnp.int8 if int8_kv_cache else compute, round_up_capacity(context)
    sharding = cache_sharding(mesh, slots)
    return state, cache_shape(cfg.attention, slots, capacity, dtype, layers=cfg.num_hidden_layers, sharding=sharding)


def even_routing(recipe: Recipe, mesh: Mesh, tokens: int) -> ExpectedRouting:
    """The experts' work and the token dispatch for `tokens` tokens per device."""
    cfg, devices = recipe.model, mesh.shape["expert"]
    if not cfg.has_experts:
        return ExpectedRouting()
    kernels = resolve_kernels(recipe.kernels, mesh.devices.flat[0].platform)
    local_experts = cfg.n_routed_experts // devices
    pairs = tokens * cfg.num_experts_per_tok * cfg.n_routed_experts / cfg.moe.router_width
    if devices == 1:
        block = block_size(tokens * cfg.num_experts_per_tok, local_experts, kernels.grouped_matmul)
        return ExpectedRouting(expert_rows=pairs + local_experts * (block - 1) / 2)
    plan = dispatch_plan(cfg.moe, tokens, devices, kernels)
    block = block_size(plan.max_pairs, local_experts, kernels.grouped_matmul)
    rows = pairs / plan.num_chunks + local_experts * (block - 1) / 2
    exchanges = plan.num_chunks + (plan.dispatch == "ragged")  # and an empty one, see `_over_chunks`
    fill = tokens * expected_device_fraction(cfg.moe, devices) / (exchanges * plan.chunk_capacity)
    return ExpectedRouting(plan.num_chunks, rows, dispatch_fill=fill)
