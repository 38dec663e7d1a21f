"""Any mesh computes the loss and gradients of one device, and its collectives send no more bytes than needed."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from mla_moe import ConfigError, MLAttention, ModelConfig, MoE
from mla_moe.config import KernelConfig, MeshConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.nn.loss import LossSums, loss_counts
from mla_moe.nn.moe import RouterStats
from mla_moe.parallel.dispatch_plan import dispatch_plan, expected_device_fraction
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.parallel.sharding import TRAINING_RULES, ShardingRules, rules_with_overrides
from mla_moe.plan.hlo import first_group

Batch = dict[str, np.ndarray]
Program = tuple[Compiled, Callable[[dict[int, float]], Any]]
Compile = Callable[[Mesh], Program]
B, T = 8, 16
MESHES = [
    MeshConfig(data=1, expert=8),
    MeshConfig(data=2, expert=4),
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, context=4, expert=2),
    MeshConfig(pipeline=2, data=1, context=2, expert=2),
    MeshConfig(pipeline=2, data=1, fsdp=2, expert=2),
]
LONG = (MESHES[0], MESHES[1], *MESHES[3:])


def packed_batch() -> Batch:
    """Documents of random lengths, and padding at the end of most packed sequences."""
    random = np.random.default_rng(0)
    batch = {key: np.zeros((B, T), np.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
    for b in range(B):
        start = segment = 0
        while start < T - 2 and segment < 3:
            n, segment = min(int(random.integers(1, 9)), T - start), segment + 1
            document = random.integers(0, 64, n + 1)
            batch["tokens"][b, start : start + n], batch["targets"][b, start : start + n] = document[:-1], document[1:]
            batch["segment_ids"][b, start : start + n] = segment
            batch["positions"][b, start : start + n] = np.arange(n)
            start += n
    return batch


def compile_loss(cfg: ModelConfig, mesh: Mesh, batch: Batch, rules: ShardingRules = TRAINING_RULES) -> Program:
    """The loss and gradients compiled for a mesh, and a function from router biases by expert to their values."""
    abstract_model = AbstractModel(cfg, rules=rules)
    arrays = abstract_model.init(0, mesh)
    batch = jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))
    params = {path: arrays[path] for path in abstract_model.param_paths}
    biases = {path: arrays[path] for path in abstract_model.bias_paths}

    def loss(params: Arrays, biases: Arrays, batch: Batch) -> tuple[jax.Array, LossSums]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = abstract_model.merge(params | biases)
            s, n = model.loss_sums(batch, chunk=8, mtp=cfg.num_nextn_predict_layers > 0), loss_counts(batch)
        router = 0.01 * s.aux_loss / n.sequences + 0.01 * s.z_loss / n.tokens_without_padding
        return s.nats / n.targets + 0.3 * s.mtp_nats / n.mtp_targets + router, s

    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, biases, batch).compile()

    def run(by_expert: dict[int, float]) -> Any:
        changed = dict(biases)
        for path, bias in biases.items():
            for expert, value in by_expert.items():
                changed[path] = jax.device_put(changed[path].at[..., expert].set(value), bias.sharding)
        return jax.device_get(program(params, changed, batch))

    return program, run


@pytest.fixture(scope="module")
def small(cfg: ModelConfig) -> ModelConfig:
    """Sizes by which an array of the compiled program is recognised."""
    return dataclasses.replace(cfg, vocab_size=208, moe_intermediate_size=22)


@pytest.fixture(scope="module")
def compiled(small: ModelConfig) -> Compile:
    """`compile_loss` by mesh, each compiled once."""
    return functools.cache(lambda mesh: compile_loss(small, mesh, packed_batch()))


def assert_same_gradients(grads: Batch, expected: Batch) -> None:
    for path, grad in expected.items():
        assert np.abs(grads[path] - grad).max() <= 1e-5 * np.abs(grad).max(), path


ROUTING = {"of the router": {}, "half of the tokens to one expert, none to some": {0: 9.0, 1: 9.0, 6: -9.0}}
ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize(
    "sizes", [pytest.param(sizes, marks=[pytest.mark.slow] * (sizes in LONG)) for sizes in MESHES], ids=str
)
def test_loss_and_gradients_equal_those_of_one_device(compiled: Compile, sizes: MeshConfig, routing: str) -> None:
    (loss, s), grads = compiled(ONE_DEVICE)[1](ROUTING[routing])
    (other_loss, other), other_grads = compiled(make_mesh(sizes))[1](ROUTING[routing])
    assert other_loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_array_equal(other.load_LE, s.load_LE)
    assert other.aux_loss == pytest.approx(s.aux_loss, rel=1e-5)
    assert other.z_loss == pytest.approx(s.z_loss, rel=1e-5)
    assert other.dropped == 0
    assert_same_gradients(other_grads, grads)
    if ROUTING[routing]:
        assert (s.load_LE == 0).any()
        assert s.load_LE.max() * 2 == s.load_LE.sum(axis=1).max()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [pytest.param(MESHES[2], marks=pytest.mark.thorough), MESHES[1]], ids=str)
def test_a_tied_head_has_the_loss_and_gradients_of_one_device(small: ModelConfig, sizes: MeshConfig) -> None:
    """The embedding's gradient is the sum of its uses as a table and as the heads of the model and its MTP module."""
    tied = dataclasses.replace(small, tie_word_embeddings=True)
    (expected, _), wanted = compile_loss(tied, ONE_DEVICE, packed_batch())[1]({})
    (loss, _), grads = compile_loss(tied, make_mesh(sizes), packed_batch())[1]({})
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(grads, wanted)
    assert "head" not in grads


@pytest.mark.slow
def test_rules_set_the_sharding_of_weights_and_their_all_gathers(small: ModelConfig, compiled: Compile) -> None:
    """Weights sharded over `data` too, for a model that does not fit in one slice, are all-gathered layer by layer."""
    rules = rules_with_overrides(["embed=data+fsdp+expert", "expert_hidden=tensor+data+fsdp", "vocab=", "heads="])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    abstract_model = AbstractModel(small, rules=rules)
    specs = {path: sharding.spec for path, sharding in abstract_model.shardings(mesh).items()}
    assert specs["moe_layers/moe/gate_up"] == P(None, "expert", ("data", "fsdp"), None, "tensor")
    assert specs["moe_layers/moe/down"] == P(None, "expert", ("tensor", "data"), "fsdp")
    assert specs["embed"] == P(None, ("data", "fsdp", "expert"))

    (loss, _), grads = compiled(ONE_DEVICE)[1]({0: 9.0})
    program, run = compile_loss(small, mesh, packed_batch(), rules)
    (other_loss, _), other_grads = run({0: 9.0})
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(other_grads, grads)
    gathered = [shape for kind, shapes in collectives(program) if kind == "all-gather" for shape in shapes]
    E, D, F = small.n_routed_experts, small.hidden_size, small.moe_intermediate_size
    assert {(E // 2, D // 2, 2 * F), (E // 2, D, 2 * F)} <= set(gathered), "over fsdp, then over data"


@pytest.mark.parametrize(
    "overrides",
    [
        ["heads=fsdp+tensor", "hidden=expert+tensor", "expert_hidden=fsdp+tensor"],
        ["vocab=fsdp", "embed=fsdp+expert", "heads=", "expert_hidden="],
        ["embed=tensor", "kv_latent=tensor", "v=expert"],
    ],
    ids=str,
)
@pytest.mark.slow
def test_any_rules_compute_the_loss_and_gradients_of_one_device(
    small: ModelConfig, compiled: Compile, overrides: list[str]
) -> None:
    """`tensor` after another axis, unused, or on an axis whose activations are never sharded over it."""
    (loss, _), grads = compiled(ONE_DEVICE)[1]({})
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    (other_loss, _), other_grads = compile_loss(small, mesh, packed_batch(), rules_with_overrides(overrides))[1]({})
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(other_grads, grads)


COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")


def collectives(program: Compiled) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Kind and shapes of the result of every collective in the compiled program."""
    for line in program.as_text().splitlines():
        for kind in COLLECTIVES:
            result, found, _ = line.partition(f" {kind}(")
            if found and " = " in result:
                shapes = re.findall(r"\w+\[([\d,]*)\]", result.split(" = ")[1])
                yield kind, [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[2]], ids=str)
@pytest.mark.slow
def test_no_collective_moves_expert_weights_or_logits(small: ModelConfig, compiled: Compile, sizes: MeshConfig) -> None:
    mesh = make_mesh(sizes)
    F = small.moe_intermediate_size
    widths = {F, F // mesh.shape["tensor"]}
    kinds = set()
    for kind, shapes in collectives(compiled(mesh)[0]):
        kinds.add(kind)
        for shape in shapes:
            all_experts = small.n_routed_experts in shape and widths & set(shape)
            assert not (kind == "all-gather" and all_experts), f"experts' weights: {shape}"
            assert not (kind != "all-reduce" and small.vocab_size in shape and len(shape) > 2), f"logits: {shape}"
    assert {"all-gather", "all-to-all"} <= kinds


@pytest.mark.slow
def test_activations_alone_move_between_the_stages_of_a_pipeline(small: ModelConfig, compiled: Compile) -> None:
    """Microbatches by collective-permutes. No other collective of the scan over ticks leaves a stage, and no weights of
    the two layers are all-gathered between the two stages."""
    mesh = make_mesh(MESHES[-1])
    first_stage = {device.id for device in mesh.devices[0].flat}
    permuted = []
    for line in compiled(mesh)[0].as_text().splitlines():
        kind = next((kind for kind in COLLECTIVES if f" {kind}(" in line), None)
        if kind is None or set(first_group(line)) <= first_stage:
            continue
        shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", line.split(kind)[0])]
        if kind == "collective-permute":
            permuted += shapes
            continue
        assert "shard_map/while/body" not in line, line
        assert kind != "all-gather" or not any(len(shape) > 2 and shape[0] == 2 for shape in shapes), line
    assert set(permuted) == {(1, T, small.hidden_size)}
    assert len(permuted) >= 5, "to the next stage and to the one before, and their gradients"


def compile_moe(
    cfg: ModelConfig, mesh: Mesh, kernels: KernelConfig, batch: int, length: int
) -> tuple[Compiled, nnx.State, jax.Array]:
    """The gradient of an MoE layer compiled for a mesh, and its arguments."""
    graph, state = nnx.split(MoE(cfg, rngs=nnx.Rngs(0), kernels=kernels))
    tokens = NamedSharding(mesh, BATCH_SPEC)
    x = jax.device_put(jax.random.normal(jax.random.key(0), (batch, length, cfg.hidden_size)), tokens)

    def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, RouterStats]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            y, stats = nnx.merge(graph, state).with_stats(x)
        return jnp.sin(y).sum(), stats

    gradient = jax.grad(loss, argnums=1, has_aux=True)
    return jax.jit(gradient, in_shardings=(NamedSharding(mesh, P()), tokens)).lower(state, x).compile(), state, x


@pytest.mark.parametrize(("capacity_factor", "drops"), [(1.0, True), (8.0, False)])
def test_pairs_dropped_at_capacity_are_counted(cfg: ModelConfig, capacity_factor: float, drops: bool) -> None:
    mesh = make_mesh(MeshConfig(data=1, expert=8))
    program, state, x = compile_moe(cfg, mesh, KernelConfig(capacity_factor=capacity_factor), 8, 64)
    bias = state["router"]["bias"]
    state["router"]["bias"] = bias.replace(bias.get_value().at[:2].set(9.0))
    state = jax.device_put(state, NamedSharding(mesh, P()))
    _, stats = program(state, x)
    # Every token is assigned to experts 0 and 1, which are on 2 of the 8 devices.
    pairs = 8 * 64 * cfg.num_experts_per_tok
    device_capacity = math.ceil(64 * expected_device_fraction(cfg.moe, 8))
    assert int(stats.dropped) == (pairs - 2 * 8 * device_capacity if drops else 0)


@pytest.mark.parametrize(("devices", "groups"), [(2, 1), (4, 8), (8, 1), (8, 8)])
def test_dispatch_sends_each_token_once_to_each_device_of_its_experts(
    cfg: ModelConfig, devices: int, groups: int
) -> None:
    """Elements of an even routing's all-to-all in the compiled program: chunks times the elements of one chunk."""
    cfg = dataclasses.replace(
        cfg, n_routed_experts=32, num_experts_per_tok=4, n_group=groups, topk_group=min(groups, 4), hidden_size=48
    )
    batch, length = 8, 512
    mesh = make_mesh(MeshConfig(data=8 // devices, expert=devices))
    program, _, _ = compile_moe(cfg, mesh, KernelConfig(), batch, length)
    n = batch * length // 8
    even_tokens = n * expected_device_fraction(cfg.moe, devices)
    plan = dispatch_plan(cfg.moe, n, devices, KernelConfig())
    chunks = math.ceil(even_tokens / plan.chunk_capacity)
    sent = [sum(map(math.prod, shapes)) for kind, shapes in collectives(program) if kind == "all-to-all"]
    # Forward: dispatch and combine. Backward: tokens and gradients in one exchange, and combine.
    ideal = devices * even_tokens * cfg.hidden_size
    for size, parts in zip(sorted(sent), (1, 1, 1, 2), strict=True):
        assert parts * ideal <= chunks * size <= 1.25 * parts * ideal


def test_expected_device_fraction_equals_that_of_random_routings(cfg: ModelConfig) -> None:
    random = np.random.default_rng(0)
    for groups, topk_group, devices in [(1, 1, 8), (8, 4, 8), (8, 4, 16), (8, 4, 2), (8, 4, 4)]:
        case = dataclasses.replace(
            cfg, n_routed_experts=64, num_experts_per_tok=6, n_group=groups, topk_group=topk_group
        )
        score = random.random((4000, 64))
        selected = random.random((4000, groups)).argsort(axis=1) < topk_group
        score[~np.repeat(selected, 64 // groups, axis=1)] = -1
        expert = np.argsort(-score, axis=1)[:, :6]
        sent = (expert[..., None] // (64 // devices) == np.arange(devices)).any(axis=1)
        assert sent.mean() == pytest.approx(expected_device_fraction(case.moe, devices), rel=0.03)


@pytest.mark.slow
def test_context_parallelism_of_long_sequences(small: ModelConfig) -> None:
    """512 tokens over 4 devices, so that attention's blocks are on several devices, equal those on one device."""
    cfg = dataclasses.replace(small, num_nextn_predict_layers=0, max_position_embeddings=512)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 512)).astype(np.int32)
    segments = np.repeat([[1, 2]], [200, 312], axis=1).repeat(2, 0).astype(np.int32)
    positions = np.concatenate([np.arange(200), np.arange(312)])[None].repeat(2, 0).astype(np.int32)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": segments, "positions": positions}
    meshes = ONE_DEVICE, make_mesh(MeshConfig(data=1, context=4, expert=2))
    ((loss, _), grads), ((other_loss, _), other_grads) = (compile_loss(cfg, mesh, batch)[1]({}) for mesh in meshes)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(other_grads, grads)


@pytest.mark.slow
def test_selected_keys_are_those_of_one_device(small: ModelConfig) -> None:
    """DSA over context, tensor and FSDP parallelism; the last layer shares the keys of the one before."""
    dsa = {"model_type": "glm_moe_dsa", "index_topk": 5, "index_n_heads": 6, "index_head_dim": 10}
    types = ("full", "full", "shared")
    cfg = dataclasses.replace(small, **dsa, num_hidden_layers=3, indexer_types=types)
    meshes = ONE_DEVICE, make_mesh(MeshConfig(data=1, context=2, tensor=2, fsdp=2))
    ((loss, _), grads), ((other_loss, _), other_grads) = (compile_loss(cfg, m, packed_batch())[1]({}) for m in meshes)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(other_grads, grads)


@pytest.mark.slow
def test_a_batch_that_the_mesh_does_not_divide_is_computed(small: ModelConfig) -> None:
    """The logits of one sequence of 7 tokens equal those of one device."""
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    abstract_model = AbstractModel(small)
    tokens = jnp.arange(7)[None] % small.vocab_size
    logits = []
    for each in (ONE_DEVICE, mesh):
        with jax.set_mesh(each):
            model = abstract_model.merge(abstract_model.init(0, each))
            logits.append(np.asarray(jax.jit(lambda m, t: m(t))(model, tokens)))
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "odd", "run"),
    [
        (MoE, {"moe_intermediate_size": 15}, lambda moe, x: moe(x)),
        (MoE, {"moe_intermediate_size": 15}, lambda moe, x: moe.extend(x)[0]),
        (MLAttention, {"num_attention_heads": 3}, lambda attention, x: attention(x)),
    ],
)
def test_modules_whose_width_the_tensor_axis_does_not_divide(
    cfg: ModelConfig, kind: type[nnx.Module], odd: dict[str, int], run: Callable[[Any, jax.Array], jax.Array]
) -> None:
    module = kind(dataclasses.replace(cfg, **odd), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 4, cfg.hidden_size))
    expected = jax.jit(run)(module, x)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2))):
        y = jax.jit(run)(module, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_an_indivisible_number_of_experts_is_an_error(cfg: ModelConfig) -> None:
    moe = MoE(dataclasses.replace(cfg, n_routed_experts=6, n_group=1, topk_group=1), rngs=nnx.Rngs(0))
    x = jnp.ones((8, 4, cfg.hidden_size))
    with jax.set_mesh(make_mesh(MeshConfig(expert=4))):
        for run in (moe, moe.extend):
            with pytest.raises(ConfigError, match="num_experts = 6: must be a multiple of 4"):
                run(x)
