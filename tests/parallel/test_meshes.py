"""One device, or eight in any arrangement: the same loss and gradients, and no more bytes than needed."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe import ConfigError, MLAttention, MoE
from mla_moe.config import KernelConfig, MeshConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.parallel.expert_parallel import dispatch_plan, expected_device_fraction
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.parallel.sharding import TRAINING_RULES, rules_with_overrides
from mla_moe.training.loss import loss_counts, loss_sums

B, T = 8, 16
MESHES = [
    MeshConfig(data=1, expert=8),
    MeshConfig(data=2, expert=4),
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, context=4, expert=2),
]


def packed_batch():
    """Documents of random lengths, and padding at the end of most rows."""
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


def loss_over(cfg, mesh, batch, rules=TRAINING_RULES):
    """The compiled loss and gradients over a mesh, and a function from router biases to what they give."""
    abstract_model = AbstractModel(cfg, rules=rules)
    arrays = abstract_model.init(0, mesh)
    batch = jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))
    params = {path: arrays[path] for path in abstract_model.param_paths}
    biases = {path: arrays[path] for path in abstract_model.bias_paths}

    def loss(params, biases, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            s = loss_sums(abstract_model.merge(params | biases), batch, chunk=8, mtp=cfg.num_nextn_predict_layers > 0)
            size = loss_counts(batch)
        return s.nats / size.tokens + 0.3 * s.mtp_nats / size.mtp_tokens + 0.01 * s.balance / size.sequences, s

    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, biases, batch).compile()

    def run(by_expert):
        chosen = dict(biases)
        for path, bias in biases.items():
            for expert, value in by_expert.items():
                chosen[path] = jax.device_put(chosen[path].at[..., expert].set(value), bias.sharding)
        return jax.device_get(program(params, chosen, batch))

    return program, run


@pytest.fixture(scope="module")
def small(cfg):
    """Sizes that give an array away by its shape."""
    return dataclasses.replace(cfg, num_hidden_layers=2, vocab_size=208, moe_intermediate_size=22)


@pytest.fixture(scope="module")
def over(small):
    return functools.cache(lambda mesh: loss_over(small, mesh, packed_batch()))


ROUTING = {"as it comes": {}, "one expert has half, some have none": {0: 9.0, 1: 9.0, 6: -9.0}}
ONE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("sizes_", MESHES, ids=str)
def test_loss_and_every_gradient_are_those_of_one_device(over, sizes_, routing):
    (loss, s), grads = over(ONE)[1](ROUTING[routing])
    (other_loss, other), other_grads = over(make_mesh(sizes_))[1](ROUTING[routing])
    assert other_loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_array_equal(other.load_LE, s.load_LE)
    assert other.balance == pytest.approx(s.balance, rel=1e-5)
    assert other.dropped == 0
    for path, grad in grads.items():
        assert np.abs(other_grads[path] - grad).max() <= 1e-5 * np.abs(grad).max(), path
    if ROUTING[routing]:
        assert (s.load_LE == 0).any()
        assert s.load_LE.max() * 2 == s.load_LE.sum(axis=1).max()


def test_rules_say_where_weights_lie_and_whence_layers_gather_them(small, over):
    """Over `data` too, as of slices none of which has room for the model: a layer at a time."""
    rules = rules_with_overrides(["embed=data+fsdp+expert", "expert_hidden=tensor+data+fsdp", "vocab=", "heads="])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    abstract_model = AbstractModel(small, rules=rules)
    places = {path: place.spec for path, place in abstract_model.shardings(mesh).items()}
    assert places["moe_layers/moe/gate_up"] == P(None, "expert", ("data", "fsdp"), None, "tensor")
    assert places["moe_layers/moe/down"] == P(None, "expert", ("tensor", "data"), "fsdp")
    assert places["embed"] == P(None, ("data", "fsdp", "expert"))

    (loss, _), grads = over(ONE)[1]({0: 9.0})
    program, run = loss_over(small, mesh, packed_batch(), rules)
    (other_loss, _), other_grads = run({0: 9.0})
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for path, grad in grads.items():
        assert np.abs(other_grads[path] - grad).max() <= 1e-5 * np.abs(grad).max(), path
    gathered = [shape for kind, shapes in collectives(program) if kind == "all-gather" for shape in shapes]
    E, D, F = small.n_routed_experts, small.hidden_size, small.moe_intermediate_size
    assert {(E // 2, D // 2, 2 * F), (E // 2, D, 2 * F)} <= set(gathered), "over fsdp, and that over data"


@pytest.mark.parametrize(
    "changes",
    [
        ["heads=fsdp+tensor", "hidden=expert+tensor", "expert_hidden=fsdp+tensor"],
        ["vocab=fsdp", "embed=fsdp+expert", "heads=", "expert_hidden="],
        ["embed=tensor", "kv_latent=tensor", "v=expert"],
    ],
    ids=str,
)
def test_whatever_the_rules_the_numbers_are_those_of_one_device(small, over, changes):
    """`tensor` behind another axis, nowhere, or on an axis that no device computes a part of."""
    (loss, _), grads = over(ONE)[1]({})
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    (other_loss, _), other_grads = loss_over(small, mesh, packed_batch(), rules_with_overrides(changes))[1]({})
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for path, grad in grads.items():
        assert np.abs(other_grads[path] - grad).max() <= 1e-5 * np.abs(grad).max(), path


COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")


def collectives(program):
    """Kind, and the shapes of the result, of every collective in the program's text."""
    for line in program.as_text().splitlines():
        for kind in COLLECTIVES:
            result, found, _ = line.partition(f" {kind}(")
            if found and " = " in result:
                shapes = re.findall(r"\w+\[([\d,]*)\]", result.split(" = ")[1])
                yield kind, [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


@pytest.mark.parametrize("sizes_", [MESHES[0], MESHES[2]], ids=str)
def test_no_collective_moves_weights_of_experts_or_logits(small, over, sizes_):
    mesh = make_mesh(sizes_)
    F = small.moe_intermediate_size
    widths = {F, F // mesh.shape["tensor"]}
    kinds = set()
    for kind, shapes in collectives(over(mesh)[0]):
        kinds.add(kind)
        for shape in shapes:
            whole_experts = small.n_routed_experts in shape and widths & set(shape)
            assert not (kind == "all-gather" and whole_experts), f"experts' weights: {shape}"
            assert not (kind != "all-reduce" and small.vocab_size in shape and len(shape) > 2), f"logits: {shape}"
    assert {"all-gather", "all-to-all"} <= kinds


def mixture_over(cfg, mesh, kernels, rows, length):
    """A compiled expert layer with its gradient, and its arguments."""
    graph, state = nnx.split(MoE(cfg, rngs=nnx.Rngs(0), kernels=kernels))
    place = NamedSharding(mesh, BATCH_SPEC)
    x = jax.device_put(jax.random.normal(jax.random.key(0), (rows, length, cfg.hidden_size)), place)

    def loss(state, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            y, stats = nnx.merge(graph, state).with_stats(x)
        return jnp.sin(y).sum(), stats

    gradient = jax.grad(loss, argnums=1, has_aux=True)
    return jax.jit(gradient, in_shardings=(NamedSharding(mesh, P()), place)).lower(state, x).compile(), state, x


@pytest.mark.parametrize(("buffer", "drops"), [(1.0, True), (8.0, False)])
def test_a_small_buffer_drops_and_counts(cfg, buffer, drops):
    mesh = make_mesh(MeshConfig(data=1, expert=8))
    program, state, x = mixture_over(cfg, mesh, KernelConfig(capacity_factor=buffer), 8, 64)
    bias = state["router"]["bias"]
    state["router"]["bias"] = bias.replace(bias.get_value().at[:2].set(9.0))
    state = jax.device_put(state, NamedSharding(mesh, P()))
    _, stats = program(state, x)
    # Every token wants experts 0 and 1, on 2 of the 8 devices that share the buffers.
    choices = 8 * 64 * cfg.num_experts_per_tok
    share = math.ceil(64 * expected_device_fraction(cfg, 8))
    assert int(stats.dropped) == (choices - 2 * 8 * share if drops else 0)


@pytest.mark.parametrize(("devices", "groups"), [(2, 1), (4, 8), (8, 1), (8, 8)])
def test_the_exchange_moves_each_token_once_to_each_device_that_needs_it(cfg, devices, groups):
    """Elements of an even pass out of the program: the rounds foreseen, times what one of them sends."""
    cfg = dataclasses.replace(
        cfg, n_routed_experts=32, num_experts_per_tok=4, n_group=groups, topk_group=min(groups, 4), hidden_size=48
    )
    rows, length = 8, 512
    program, _, _ = mixture_over(
        cfg, make_mesh(MeshConfig(data=8 // devices, expert=devices)), KernelConfig(), rows, length
    )
    n = rows * length // 8
    share = n * expected_device_fraction(cfg, devices)
    rounds = math.ceil(share / dispatch_plan(cfg, n, devices, buffer=None, exchange=None, multiply=None).capacity)
    sent = [sum(map(math.prod, shapes)) for kind, shapes in collectives(program) if kind == "all-to-all"]
    assert len(sent) == 5  # there and back; there with token and gradient, and back
    ideal = devices * share * cfg.hidden_size
    for size in sent:
        assert ideal <= rounds * size <= 1.25 * ideal


def test_chance_is_what_random_routing_does(cfg):
    random = np.random.default_rng(0)
    for groups, chosen, devices in [(1, 1, 8), (8, 4, 8), (8, 4, 16), (8, 4, 2), (8, 4, 4)]:
        case = dataclasses.replace(cfg, n_routed_experts=64, num_experts_per_tok=6, n_group=groups, topk_group=chosen)
        score = random.random((4000, 64))
        kept = random.random((4000, groups)).argsort(axis=1) < chosen
        score[~np.repeat(kept, 64 // groups, axis=1)] = -1
        choice = np.argsort(-score, axis=1)[:, :6]
        needs = (choice[..., None] // (64 // devices) == np.arange(devices)).any(axis=1)
        assert needs.mean() == pytest.approx(expected_device_fraction(case, devices), rel=0.03)


def test_long_sequences_may_be_shared_by_many(small):
    """Blocks of attention across devices: 512 tokens over 4, against one device."""
    cfg = dataclasses.replace(small, num_nextn_predict_layers=0, max_position_embeddings=512)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 512)).astype(np.int32)
    segments = np.repeat([[1, 2]], [200, 312], axis=1).repeat(2, 0).astype(np.int32)
    positions = np.concatenate([np.arange(200), np.arange(312)])[None].repeat(2, 0).astype(np.int32)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": segments, "positions": positions}
    meshes = ONE, make_mesh(MeshConfig(data=1, context=4, expert=2))
    ((loss, _), grads), ((other_loss, _), other_grads) = (loss_over(cfg, mesh, batch)[1]({}) for mesh in meshes)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for path, grad in grads.items():
        assert np.abs(other_grads[path] - grad).max() <= 1e-5 * np.abs(grad).max(), path


def test_what_cannot_be_split_is_computed_all_the_same(small):
    """A user's own batch of one under a mesh, and logits that are those of one device."""
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    abstract_model = AbstractModel(small)
    tokens = jnp.arange(7)[None] % small.vocab_size
    logits = []
    for place in (ONE, mesh):
        with jax.set_mesh(place):
            logits.append(
                np.asarray(jax.jit(lambda m, t: m(t))(abstract_model.merge(abstract_model.init(0, place)), tokens))
            )
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "odd", "run"),
    [
        (MoE, {"moe_intermediate_size": 15}, lambda moe, x: moe(x)),
        (MoE, {"moe_intermediate_size": 15}, lambda moe, x: moe.extend(x)[0]),
        (MLAttention, {"num_attention_heads": 3}, lambda attention, x: attention(x)),
    ],
)
def test_modules_whose_width_tensor_does_not_divide_compute_the_same(cfg, kind, odd, run):
    module = kind(dataclasses.replace(cfg, **odd), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 4, cfg.hidden_size))
    wanted = jax.jit(run)(module, x)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2))):
        got = jax.jit(run)(module, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_experts_that_the_mesh_does_not_divide_are_named(cfg):
    moe = MoE(dataclasses.replace(cfg, n_routed_experts=6, n_group=1, topk_group=1), rngs=nnx.Rngs(0))
    x = jnp.ones((8, 4, cfg.hidden_size))
    with jax.set_mesh(make_mesh(MeshConfig(expert=4))):
        for run in (moe, moe.extend):
            with pytest.raises(ConfigError, match="n_routed_experts = 6: must be a multiple of 4"):
                run(x)
