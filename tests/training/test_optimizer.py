import dataclasses
import math
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mla_moe.config import ConfigError, MeshConfig, OptimizerConfig, ScheduleConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.optimizer import MUON_RMS, learning_rate, make_optimizer, parameter_groups, scale_by_layered_muon


def test_schedule_has_warmup_constant_decay_and_constant_tail():
    rate = learning_rate(
        ScheduleConfig(peak_lr=2.0, warmup_fraction=0.1, decay_fraction=0.5, final_lr_fraction=0.25, tail_fraction=0.2),
        100,
    )
    rates = [float(rate(step)) for step in range(100)]
    assert 0 < rates[0] < rates[5] < rates[9] < 2.0
    np.testing.assert_allclose(rates[10:29], 2.0)
    assert rates[55] == pytest.approx(1.25, abs=0.02)
    np.testing.assert_allclose(rates[80:], 0.5, rtol=1e-5)


def test_schedule_without_warmup_starts_at_the_peak():
    assert float(learning_rate(ScheduleConfig(peak_lr=1.0, warmup_fraction=0.0, decay_fraction=0.0), 10)(0)) == 1.0


@pytest.fixture(scope="module")
def abstract_model(cfg):
    return AbstractModel(cfg)


@pytest.fixture(scope="module")
def params(abstract_model):
    arrays = abstract_model.init(0, make_mesh(MeshConfig(), jax.devices()[:1]))
    return {path: arrays[path] for path in abstract_model.param_paths}


def first_update(optimizer, abstract_model, params, grads):
    tx = make_optimizer(optimizer, 10, abstract_model)
    return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads)


FLAT = ScheduleConfig(peak_lr=1.0, warmup_fraction=0.0, decay_fraction=0.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_applies_to_matrices_only(abstract_model, params, name):
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = first_update(OptimizerConfig(name, FLAT, weight_decay=0.5), abstract_model, params, zeros)
    for path, variable in ((p, abstract_model.variables[p]) for p in params):
        decay = 0.0 if variable.get_metadata("role") == "scale" else 0.5
        np.testing.assert_allclose(updates[path], -decay * params[path], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.smoke
def test_muon_orthogonalizes_each_matrix_of_a_stack_separately(abstract_model, params):
    grads = {p: jax.random.normal(jax.random.key(i), x.shape) for i, (p, x) in enumerate(params.items())}
    updates = first_update(OptimizerConfig("muon", FLAT, weight_decay=0.0), abstract_model, params, grads)
    matrices = {
        "moe_layers/moe/gate_up": updates["moe_layers/moe/gate_up"][1, 3, :, 1],
        "moe_layers/moe/down": updates["moe_layers/moe/down"][0, 7],
        "moe_layers/attention/q_b": updates["moe_layers/attention/q_b"][1].reshape(24, -1),
        "moe_layers/attention/o": updates["moe_layers/attention/o"][1].reshape(-1, 32),
        "mtp/project": updates["mtp/project"],
    }
    for path, update in matrices.items():
        singular = np.linalg.svd(update / (MUON_RMS * max(update.shape) ** 0.5), compute_uv=False)
        assert singular.min() > 0.3, path
        assert singular.max() < 1.4, path
    for path in params:
        if abstract_model.variables[path].get_metadata("role") != "matrix":  # Adam's first step is the sign
            np.testing.assert_allclose(updates[path], -np.sign(grads[path]), atol=0.02)


@pytest.mark.slow
def test_layered_muon_equals_optax_muon(abstract_model, params):
    """Momentum too, after two updates with different gradients."""
    dimensions = {
        "moe_layers/moe/gate_up": MuonDimensionNumbers((2,), (4,)),
        "moe_layers/attention/q_b": MuonDimensionNumbers((1,), (2, 3)),
        "mtp/project": MuonDimensionNumbers((0,), (1,)),
    }
    matrices = {path: params[path] for path in dimensions}
    layered = scale_by_layered_muon(0.9, abstract_model.variables)
    reference = scale_by_muon(beta=0.9, weight_dimension_numbers=dimensions)

    @partial(jax.jit, static_argnums=0)
    def two_updates(tx):
        _, state = tx.update(matrices, tx.init(matrices))
        return tx.update(jax.tree.map(jnp.cos, matrices), state)

    (ours, state), (theirs, their_state) = two_updates(layered), two_updates(reference)
    for path, axes in dimensions.items():
        inputs, outputs = (math.prod(matrices[path].shape[i] for i in side) for side in axes)
        rms = MUON_RMS * max(inputs, outputs) ** 0.5
        np.testing.assert_allclose(ours[path], rms * theirs[path], rtol=1e-4, atol=1e-5, err_msg=path)
        np.testing.assert_allclose(state.mu[path], their_state.mu[path], rtol=1e-6, err_msg=path)
    assert state.count == their_state.count == 2


def test_every_parameter_is_in_a_parameter_group(abstract_model, params):
    assert {type(abstract_model.variables[path]) for path in params} == {nnx.Param}
    groups = parameter_groups({path: abstract_model.variables[path] for path in params})
    assert groups["moe_layers/moe/down"] == groups["moe_layers/moe/router/weight"] == "matrix"
    assert groups["embed"] == groups["head"] == "decayed"
    assert groups["moe_layers/attention/q_a_norm/scale"] == groups["norm/scale"] == "undecayed"
    ones = jax.tree.map(jnp.ones_like, params)
    updates = first_update(OptimizerConfig("muon", FLAT), abstract_model, params, ones)
    assert all(jnp.abs(u).max() > 0 for u in updates.values())


def test_gradient_clipping_scales_all_gradients(abstract_model, params):
    grads = jax.tree.map(jnp.ones_like, params)
    base = OptimizerConfig("adamw", FLAT, eps=1.0, weight_decay=0.0)
    norm = sum(x.size for x in params.values()) ** 0.5
    clipped = first_update(dataclasses.replace(base, max_grad_norm=0.1), abstract_model, params, grads)
    loose = first_update(dataclasses.replace(base, max_grad_norm=1e9), abstract_model, params, grads)
    wanted = (0.1 / norm) / (0.1 / norm + 1.0)
    np.testing.assert_allclose(-clipped["embed"], wanted, rtol=1e-3)
    np.testing.assert_allclose(-loose["embed"], 0.5, rtol=1e-3)


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("1-sqrt", 1 - 0.5**0.5)])
def test_wsd_decays_from_the_peak_to_the_final_rate(decay, half):
    schedule = ScheduleConfig(2.0, warmup_fraction=0.0, decay_fraction=0.4, final_lr_fraction=0.1, decay_shape=decay)
    rate = learning_rate(schedule, 100)
    assert [float(rate(step)) for step in (0, 60, 100, 120)] == pytest.approx([2.0, 2.0, 0.2, 0.2])
    assert float(rate(80)) == pytest.approx(0.2 + 1.8 * half)


def test_frozen_parameters_stay_and_do_not_count_for_clipping(abstract_model, params):
    params = {path: params[path] for path in ("embed", "head", "norm/scale", "moe_layers/moe/down")}
    variables = {path: abstract_model.variables[path] for path in params}
    abstract_model = types.SimpleNamespace(param_paths=list(params), variables=variables)
    freeze = ("embed", "moe_layers/*")
    optimizer = OptimizerConfig("adamw", FLAT, eps=1.0, max_grad_norm=1.0, weight_decay=0.0, freeze=freeze)
    grads = {path: jnp.full_like(x, 1e3 if path == "embed" else 1e-6) for path, x in params.items()}
    updates = first_update(optimizer, abstract_model, params, grads)
    for path, update in updates.items():
        is_frozen = path == "embed" or path.startswith("moe_layers/")
        assert bool((update == 0).all()) == is_frozen, path
    np.testing.assert_allclose(updates["head"], -1e-6, rtol=1e-3, err_msg="not scaled down by the norm of embed")
    state = jax.eval_shape(make_optimizer(optimizer, 10, abstract_model).init, params)
    trained = sum(x.size for path, x in params.items() if path in ("head", "norm/scale"))
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * trained, "none of frozen parameters"
    for pattern in ("dense/*", "*"):
        with pytest.raises(ConfigError, match=r"optimizer\.freeze"):
            make_optimizer(OptimizerConfig(freeze=(pattern,)), 10, abstract_model)


def test_indexers_keep_their_weights(dsa_cfg):
    """No gradient reaches them, and weight decay would shrink them."""
    abstract = AbstractModel(dsa_cfg)
    arrays = abstract.init(0, make_mesh(MeshConfig(), jax.devices()[:1]))
    params = {path: arrays[path] for path in abstract.param_paths}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), 10, abstract)
    zeros = partial(jax.tree.map, jnp.zeros_like)
    updates = jax.jit(lambda p: optimizer.update(zeros(p), optimizer.init(p), p)[0])(params)
    changed = {path for path, update in updates.items() if np.any(update)}
    assert "moe_layers/attention/q_b" in changed
    assert not any("indexer" in path for path in changed)
