"""Optimizers from Optax: AdamW, or Muon for the matrices in the layers and AdamW for the rest."""

import math
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, cast

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mla_moe.config import OptimizerConfig, ScheduleConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.nn.param import BATCH_AXES, Matrix, Scale, logical_axes

# RMS to which Muon's updates are scaled. It is typical of AdamW's, so that both share learning rate and weight decay
# (Moonlight, arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2

# Five Newton-Schulz steps with the coefficients of Keller Jordan's Muon. Optax loops over coefficients that are given
# per step, and unrolls the loop otherwise, which takes longer to compile and uses more memory.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def learning_rate(schedule: ScheduleConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """The learning rate of step 0, 1, …: linear warmup to the peak, constant, cosine decay to `final_lr_fraction` of
    the peak, constant."""
    peak = peak or schedule.peak_lr
    warmup, decay, tail = (
        round(fraction * steps)
        for fraction in (schedule.warmup_fraction, schedule.decay_fraction, schedule.tail_fraction)
    )
    pieces = [
        optax.linear_schedule(peak / (warmup + 1), peak, warmup),  # not 0 in the first step
        optax.constant_schedule(peak),
        optax.cosine_decay_schedule(peak, max(decay, 1), alpha=schedule.final_lr_fraction),
    ]
    return optax.join_schedules(pieces, [warmup, max(steps - decay - tail, warmup)])


def make_optimizer(cfg: OptimizerConfig, steps: int, abstract_model: AbstractModel) -> optax.GradientTransformation:
    """An optimizer for parameters in a dictionary by path. Scales of RMSNorm have no weight decay."""
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

    def group(variable: nnx.Variable) -> str:
        if isinstance(variable, Scale):
            return "undecayed"
        return "muon" if cfg.name == "muon" and isinstance(variable, Matrix) else "adamw"

    labels = {path: group(v) for path, v in variables.items()}
    return optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), optax.partition(groups, labels))


def scale_by_layered_muon(momentum: float, variables: Mapping[str, nnx.Variable]) -> optax.GradientTransformation:
    """Optax's `scale_by_muon` in a loop over stacked layers, scaled to `MUON_RMS`. Its temporaries are several times
    the size of the matrices; the loop allocates them for one layer at a time.

    An orthogonal matrix has an RMS of 1 / √max(in, out).
    """
    stacked = scale_by_muon(NEWTON_SCHULZ, beta=momentum)

    def update(updates: Arrays, state: Any, params: Arrays | None = None) -> tuple[Arrays, Any]:
        del params
        new, mu = dict(updates), dict(state.mu)

        def layer(axes: Any, gradient_and_moment: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
            gradient, moment = gradient_and_moment
            muon = scale_by_muon(NEWTON_SCHULZ, beta=momentum, weight_dimension_numbers=axes)
            orthogonal, after = cast(Any, muon.update(gradient, state._replace(mu=moment)))
            widths = (math.prod(gradient.shape[i] for i in side) for side in axes)
            return orthogonal * (MUON_RMS * math.sqrt(max(widths))), after.mu

        for path in (path for path, u in updates.items() if jax.tree.leaves(u)):  # updates of other groups are masked
            run = partial(layer, _matrix_axes(variables[path]))
            if "layers" in logical_axes(variables[path]):
                run = partial(jax.lax.map, run)
            new[path], mu[path] = run((updates[path], state.mu[path]))
        return new, state._replace(count=optax.safe_increment(state.count), mu=mu)

    return optax.GradientTransformation(stacked.init, cast(Any, update))


def _matrix_axes(variable: nnx.Variable) -> MuonDimensionNumbers:
    """Input and output axes of the matrix in one layer's weight. Experts, and gate and up, are separate matrices."""
    axes, contracts = variable.get_metadata("axes"), variable.get_metadata("contracts")
    inputs = tuple(i for i, axis in enumerate(axes) if axis in contracts)
    outputs = tuple(i for i, axis in enumerate(axes) if axis not in contracts and axis not in BATCH_AXES)
    return MuonDimensionNumbers(inputs, outputs)
