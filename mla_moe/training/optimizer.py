"""AdamW, and Muon for the matrices inside the layers, from Optax, with the parameter groups of the papers."""

import math
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, cast

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mla_moe.config import OptimizerConfig, ScheduleConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.param import BATCH_AXES, Matrix, Scale, logical_axes

# Muon's update is brought to the RMS that AdamW's usually has, so that both take one learning rate and one decay
# (Moonlight, arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2

# Five steps with the coefficients of Keller Jordan's Muon. Given for each step, Optax loops over them; given once, it
# unrolls, which takes longer to compile and holds more at once.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def learning_rate(schedule: ScheduleConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """The rate of step 0, 1, …: linear from 0 to the peak, constant, cosine to `final` · peak, constant."""
    peak = peak or schedule.peak_lr
    warmup, decay, tail = (
        round(share * steps) for share in (schedule.warmup_fraction, schedule.decay_fraction, schedule.tail_fraction)
    )
    pieces = [
        optax.linear_schedule(peak / (warmup + 1), peak, warmup),  # the first step already learns
        optax.constant_schedule(peak),
        optax.cosine_decay_schedule(peak, max(decay, 1), alpha=schedule.final_lr_fraction),
    ]
    return optax.join_schedules(pieces, [warmup, max(steps - decay - tail, warmup)])


def make_optimizer(cfg: OptimizerConfig, steps: int, abstract_model: AbstractModel) -> optax.GradientTransformation:
    """An optimizer of the dictionary of parameters by path."""
    variables = {path: abstract_model.variables[path] for path in abstract_model.param_paths}
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
    rate = optax.scale_by_learning_rate(learning_rate(cfg.schedule, steps))
    decay = optax.add_decayed_weights(cfg.weight_decay)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "adamw": optax.chain(adam, decay, rate),
        "undecayed": optax.chain(adam, rate),
    }
    if cfg.name == "muon":
        groups["muon"] = optax.chain(
            scale_by_layered_muon(cfg.muon_momentum, variables),
            decay,
            optax.scale_by_learning_rate(learning_rate(cfg.schedule, steps, cfg.muon_peak_lr)),
        )

    def group(variable):
        if isinstance(variable, Scale):
            return "undecayed"
        return "muon" if cfg.name == "muon" and isinstance(variable, Matrix) else "adamw"

    labels = {path: group(v) for path, v in variables.items()}
    return optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), optax.partition(groups, labels))


def scale_by_layered_muon(momentum: float, variables: Mapping[str, nnx.Variable]) -> optax.GradientTransformation:
    """Optax's `scale_by_muon` in a loop over the layers of each stack, brought to AdamW's RMS: what it computes on the
    way is several times as large as the matrices, and exists for one layer at a time.

    An orthogonal matrix has an RMS of 1 / √max(in, out).
    """
    whole = scale_by_muon(NEWTON_SCHULZ, beta=momentum)

    def update(updates, state, params=None):
        del params
        new, mu = dict(updates), dict(state.mu)

        def layer(axes, gradient_and_moment):
            gradient, moment = gradient_and_moment
            muon = scale_by_muon(NEWTON_SCHULZ, beta=momentum, weight_dimension_numbers=axes)
            orthogonal, after = cast(Any, muon.update(gradient, state._replace(mu=moment)))
            widths = (math.prod(gradient.shape[i] for i in side) for side in axes)
            return orthogonal * (MUON_RMS * math.sqrt(max(widths))), after.mu

        for path in (path for path, u in updates.items() if jax.tree.leaves(u)):  # other groups' are masked
            run = partial(layer, _matrix_axes(variables[path]))
            if "layers" in logical_axes(variables[path]):
                run = partial(jax.lax.map, run)
            new[path], mu[path] = run((updates[path], state.mu[path]))
        return new, state._replace(count=optax.safe_increment(state.count), mu=mu)

    return optax.GradientTransformation(whole.init, update)


def _matrix_axes(variable: nnx.Variable) -> MuonDimensionNumbers:
    """Which axes of one layer's weight are a matrix's input and output. Experts and gate/up index separate matrices."""
    axes, contracts = variable.get_metadata("axes"), variable.get_metadata("contracts")
    inputs = tuple(i for i, axis in enumerate(axes) if axis in contracts)
    outputs = tuple(i for i, axis in enumerate(axes) if axis not in contracts and axis not in BATCH_AXES)
    return MuonDimensionNumbers(inputs, outputs)
