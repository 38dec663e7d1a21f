"""AdamW, and Muon for the matrices inside the layers, from Optax, with the parameter groups of the papers."""

import math
from collections.abc import Hashable

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mla_moe import recipe
from mla_moe.nn.param import BATCH_AXES, Matrix, Scale, logical_axes
from mla_moe.nn.skeleton import Skeleton

# Muon's update is brought to the RMS that AdamW's usually has, so that both take one learning rate and one decay
# (Moonlight, arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2


def learning_rate(schedule: recipe.Schedule, steps: int, peak: float | None = None) -> optax.Schedule:
    """The rate of step 0, 1, …: linear from 0 to the peak, constant, cosine to `final` · peak, constant."""
    peak = peak or schedule.peak
    warmup, decay, tail = (round(share * steps) for share in (schedule.warmup, schedule.decay, schedule.tail))
    pieces = [
        optax.linear_schedule(peak / (warmup + 1), peak, warmup),  # the first step already learns
        optax.constant_schedule(peak),
        optax.cosine_decay_schedule(peak, max(decay, 1), alpha=schedule.final),
    ]
    return optax.join_schedules(pieces, [warmup, max(steps - decay - tail, warmup)])


def make_optimizer(cfg: recipe.Optimizer, steps: int, skeleton: Skeleton) -> optax.GradientTransformation:
    """An optimizer of the dictionary of parameters by path."""
    variables = {path: skeleton.variables[path] for path in skeleton.param_paths}
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
    rate = optax.scale_by_learning_rate(learning_rate(cfg.schedule, steps))
    decay = optax.add_decayed_weights(cfg.weight_decay)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "adamw": optax.chain(adam, decay, rate),
        "undecayed": optax.chain(adam, rate),
    }
    if cfg.name == "muon":
        dimensions = {path: _muon_dimensions(v) for path, v in variables.items() if isinstance(v, Matrix)}
        groups["muon"] = optax.chain(
            scale_by_muon(beta=cfg.muon_momentum, weight_dimension_numbers=lambda u: _like(u, dimensions)),
            optax.stateless(lambda u, _: _scale_to_rms(u, dimensions)),
            decay,
            optax.scale_by_learning_rate(learning_rate(cfg.schedule, steps, cfg.muon_peak)),
        )

    def group(variable):
        if isinstance(variable, Scale):
            return "undecayed"
        return "muon" if cfg.name == "muon" and isinstance(variable, Matrix) else "adamw"

    labels = {path: group(v) for path, v in variables.items()}
    return optax.chain(optax.clip_by_global_norm(cfg.clip), optax.partition(groups, labels))


def _muon_dimensions(variable: Matrix) -> MuonDimensionNumbers:
    """Which axes are a matrix's input and output. Layers, experts and gate/up index separate matrices."""
    axes, contracts = logical_axes(variable), variable.get_metadata("contracts")
    inputs = tuple(i for i, axis in enumerate(axes) if axis in contracts)
    outputs = tuple(i for i, axis in enumerate(axes) if axis not in contracts and axis not in BATCH_AXES)
    return MuonDimensionNumbers(inputs, outputs)


def _scale_to_rms(updates, dimensions):
    """An orthogonal matrix has an RMS of 1 / √max(in, out); Optax's own scaling is not public yet."""

    def scale(path, u):
        widths = (math.prod(u.shape[i] for i in axes) for axes in dimensions[path])
        return u * (MUON_RMS * math.sqrt(max(widths)))

    return {path: scale(path, u) if jax.tree.leaves(u) else u for path, u in updates.items()}


def _like(updates, dimensions):
    """`dimensions` in the structure of `updates`, in which Optax has masked the other groups' leaves."""
    return {path: dimensions[path] if jax.tree.leaves(u) else u for path, u in updates.items()}
