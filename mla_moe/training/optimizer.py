"""Optimizers from Optax: AdamW, or Muon for the matrices in the layers and AdamW for the rest."""

import fnmatch
import math
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.bridge.variables import NNXMeta
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mla_moe.config import ConfigError, OptimizerConfig, ScheduleConfig, require
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.param import BATCH_AXES, STACK_AXES, RouterBias
from mla_moe.parallel.sharding import TRAINING_RULES, is_weight, logical_axes

# RMS to which Muon's updates are scaled. It is typical of AdamW's, so that both share learning rate and weight decay
# (Moonlight, arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2

# Five Newton-Schulz steps with the coefficients of Keller Jordan's Muon. Optax loops over coefficients that are given
# per step, and unrolls the loop otherwise, which takes longer to compile and uses more memory.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def learning_rate(schedule: ScheduleConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """The learning rate of step 0, 1, …: linear warmup to the peak, constant, decay to `final_lr_fraction` of the peak
    in the shape `decay_shape`, constant."""
    peak = peak or schedule.peak_lr
    fractions = schedule.warmup_fraction, schedule.decay_fraction, schedule.tail_fraction
    warmup, decay, tail = (round(fraction * steps) for fraction in fractions)
    final, decay_steps = peak * schedule.final_lr_fraction, max(decay, 1)

    def one_minus_sqrt(count: Any) -> Any:
        return final + (peak - final) * (1 - jnp.sqrt(jnp.clip(count / decay_steps, 0, 1)))

    shapes: Mapping[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=schedule.final_lr_fraction),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "1-sqrt": one_minus_sqrt,
    }
    pieces = [
        optax.linear_schedule(peak / (warmup + 1), peak, warmup),  # not 0 in the first step
        optax.constant_schedule(peak),
        shapes[schedule.decay_shape],
    ]
    return optax.join_schedules(pieces, [warmup, max(steps - decay - tail, warmup)])


Group = Literal["matrix", "decayed", "undecayed", "frozen"]


def parameter_groups(weights: Any) -> Any:
    """The parameter group of each weight, in a tree like `weights`, for `optax.partition` or for masks.

    - `matrix`: a matrix between activations of this package's modules, which Muon is made for.
    - `decayed`: embedding and output head, and any other weight with two or more axes.
    - `undecayed`: the scale of a norm, and any other weight with one axis, such as a bias.
    - `frozen`: a router bias or a weight of an indexer, which have no gradient, and which weight decay would change.

    `weights` is a module, its `nnx.state`, Linen's `params`, or a tree that contains them. Flax's metadata say what a
    weight is, so give the tree before it is converted to plain arrays.
    """
    return jax.tree.map(_group, weights, is_leaf=is_weight)


def grouped_optimizer(
    weights: Any, cfg: OptimizerConfig = OptimizerConfig(), *, steps: int
) -> optax.GradientTransformation:
    """AdamW, or Muon for matrices and AdamW for the rest, with gradient clipping, the schedule of `cfg` over `steps`
    steps, no weight decay for `undecayed` weights (`parameter_groups`), and no update of those in `cfg.freeze`.

    A transform for trees with the same keys as `weights`: states of NNX, Linen's `params`, dictionaries of plain
    arrays, nested or with paths such as `attention/q_b` as keys, and the parameters of an Equinox module. Raises
    `ConfigError` for a weight that is not in `weights`, for a pattern of `cfg.freeze` that matches none, if none is
    left to train, and if Muon would have no matrix.
    """
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
    rate = optax.scale_by_learning_rate(learning_rate(cfg.schedule, steps))
    decay = optax.add_decayed_weights(cfg.weight_decay)
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "adamw": optax.chain(adam, decay, rate),
        "undecayed": optax.chain(adam, rate),
    }
    if cfg.name == "muon":
        muon_rate = optax.scale_by_learning_rate(learning_rate(cfg.schedule, steps, cfg.muon_peak_lr))
        matrices = scale_by_layered_muon(cfg.muon_momentum, weights)
        transforms["muon"] = optax.chain(matrices, decay, muon_rate)
    names: Mapping[Group, str] = {"matrix": cfg.name, "decayed": "adamw", "undecayed": "undecayed", "frozen": "frozen"}
    labels = {_name(path): names[_group(weight)] for path, weight in _flatten(weights)[0]}
    fix = "no weight is in the group matrix; give weights with Flax's metadata, before they become plain arrays"
    require(cfg.name != "muon" or "muon" in labels.values(), "optimizer.name", "muon", fix)
    labels |= dict.fromkeys(_matching(cfg.freeze, list(labels)), "frozen")
    clip, some_frozen = optax.clip_by_global_norm(cfg.max_grad_norm), "frozen" in labels.values()
    if some_frozen:
        transforms["frozen"] = optax.set_to_zero()

    def label(path: tuple[Any, ...], _: Any) -> str:
        if _name(path) not in labels:
            raise ConfigError("weights", _name(path), "is not among them; give all weights that the optimizer updates")
        return labels[_name(path)]

    def label_tree(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_weight)

    if some_frozen:

        def trained_tree(params: Any) -> Any:
            return jax.tree.map(lambda label: "frozen" if label == "frozen" else "trained", label_tree(params))

        clip = optax.partition({"trained": clip, "frozen": optax.set_to_zero()}, trained_tree)
    return optax.chain(clip, optax.partition(transforms, label_tree))


def make_optimizer(cfg: OptimizerConfig, steps: int, abstract_model: AbstractModel) -> optax.GradientTransformation:
    """`grouped_optimizer` for a model's parameters in a dictionary by path."""
    weights = {path: abstract_model.variables[path] for path in abstract_model.param_paths}
    return grouped_optimizer(weights, cfg, steps=steps)


def _matching(patterns: Sequence[str], paths: Sequence[str]) -> set[str]:
    """The parameters that match any of the globs."""
    matches = {pattern: set(fnmatch.filter(paths, pattern)) for pattern in patterns}
    for pattern, found in matches.items():
        fix = f"matches no parameter; there are {', '.join(paths)}"
        require(bool(found), "optimizer.freeze", pattern, fix)
    every = set().union(*matches.values())
    require(len(every) < len(paths), "optimizer.freeze", tuple(patterns), "leaves no parameter to train")
    return every


def scale_by_layered_muon(momentum: float, weights: Any) -> optax.GradientTransformation:
    """Optax's `scale_by_muon` in a loop over stacked layers, scaled to `MUON_RMS`. Its temporaries are several times
    the size of the matrices; the loop allocates them for one layer at a time.

    An orthogonal matrix has an RMS of 1 / √max(in, out). `weights` are those of `grouped_optimizer`; updates are of
    those in the group `matrix` only.
    """
    stacked = scale_by_muon(NEWTON_SCHULZ, beta=momentum)
    shapes = {_name(path): _matrix_shape(w) for path, w in _flatten(weights)[0] if _group(w) == "matrix"}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if jax.sharding.get_abstract_mesh().explicit_axes:  # XLA chooses how products of sharded matrices are sharded
            specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
            return jax.sharding.auto_axes(update, out_sharding=specs)(updates, state)

        def layer(axes: Any, gradient_and_moment: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
            gradient, moment = gradient_and_moment
            muon = scale_by_muon(NEWTON_SCHULZ, beta=momentum, weight_dimension_numbers=axes)
            orthogonal, after = cast(Any, muon.update(gradient, state._replace(mu=moment)))
            widths = (math.prod(gradient.shape[i] for i in side) for side in axes)
            return orthogonal * (MUON_RMS * math.sqrt(max(widths))), after.mu

        def orthogonalize(path: tuple[Any, ...], gradient: Any, moment: Any) -> tuple[Any, Any]:
            shape = shapes[_name(path)]
            run = partial(layer, shape.axes)
            for _ in range(shape.stacks):
                run = partial(jax.lax.map, run)
            (gradient,), tree = jax.tree.flatten(gradient)
            (moment,), moment_tree = jax.tree.flatten(moment)
            new, mu = run((gradient, moment))
            return tree.unflatten([new]), moment_tree.unflatten([mu])

        gradients, tree = _flatten(updates)  # updates of other groups are masked: they have no leaves
        moments = tree.flatten_up_to(state.mu)
        pairs = [orthogonalize(path, g, m) for (path, g), m in zip(gradients, moments, strict=True)]
        new, mu = (tree.unflatten(side) for side in zip(*pairs, strict=True)) if pairs else (updates, state.mu)
        return new, state._replace(count=optax.safe_increment(state.count), mu=mu)

    return optax.GradientTransformation(stacked.init, cast(Any, update))


class _MatrixShape(NamedTuple):
    """Where the matrix is in a weight. Experts, and gate and up, are separate matrices."""

    axes: MuonDimensionNumbers
    """Input and output axes in one layer's weight."""
    stacks: int
    """Leading axes, over layers that are stacked for a scan."""


def _matrix_shape(weight: Any) -> _MatrixShape:
    variable = weight.to_nnx_variable() if isinstance(weight, NNXMeta) else weight
    names, contracts = logical_axes(variable), variable.get_metadata("contracts")
    # A caller may stack layers under a name of his own.
    stacks = next(i for i, name in enumerate(names) if name not in STACK_AXES and name in TRAINING_RULES)
    inputs = tuple(i for i, name in enumerate(names[stacks:]) if name in contracts)
    outputs = tuple(i for i, name in enumerate(names[stacks:]) if name not in (*contracts, *BATCH_AXES))
    return _MatrixShape(MuonDimensionNumbers(inputs, outputs), stacks)


def _group(weight: Any) -> Group:
    metadata = weight.metadata if isinstance(weight, NNXMeta) else {}
    role = weight.get_metadata("role", None) if isinstance(weight, nnx.Variable) else metadata.get("role")
    bias = isinstance(weight, RouterBias) or (isinstance(weight, NNXMeta) and weight.var_type is RouterBias)
    if bias or (weight.get_metadata("frozen", False) if isinstance(weight, nnx.Variable) else metadata.get("frozen")):
        return "frozen"
    if role in ("matrix", "scale"):
        return "matrix" if role == "matrix" else "undecayed"
    (array,) = jax.tree.leaves(weight)
    return "decayed" if array.ndim > 1 else "undecayed"


def _flatten(tree: Any) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)


def _name(path: tuple[Any, ...]) -> str:
    """The path of a weight: the same in a state, a nested dictionary, and a dictionary with paths as keys."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
