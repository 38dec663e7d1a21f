"""Preference optimization: DPO (arXiv 2305.18290) and IPO (arXiv 2310.12036), as a loss of packed pairs and a step."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped
from jaxtyping import Array, Float, Int

from mla_moe.config import DPOConfig, TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.nn.loss import Batch, target_mask
from mla_moe.nn.moe import RouterStats
from mla_moe.parallel.compiler_options import mesh_compiler_options
from mla_moe.parallel.mesh import BATCH_SPEC
from mla_moe.training.step import TrainState, accumulate_gradients, state_shardings, update_state


class PreferenceSums(NamedTuple):
    """Sums over the pairs of a microbatch: those of several microbatches add up to those of the batch."""

    loss: Float[Array, ""]
    chosen: Float[Array, ""]
    """Rewards `β · log(π / π_ref)` of the chosen completions."""
    rejected: Float[Array, ""]
    correct: Float[Array, ""]
    """Pairs whose chosen completion has the larger reward."""
    chosen_logprob: Float[Array, ""]
    """Log-probabilities of the chosen completions, in nats."""
    rejected_logprob: Float[Array, ""]
    pairs: Float[Array, ""]


def preference_sums(
    logprob_BT: Float[Array, "B T"],
    reference_logprob_BT: Float[Array, "B T"],
    batch: Batch,
    dpo: DPOConfig,
) -> PreferenceSums:
    """Loss of packed pairs, to be differentiated with respect to `logprob_BT` of the policy, and its metrics. The
    sides of pair k are segments 2 k − 1 (chosen) and 2 k (rejected) of a packed sequence.

    With `r = log π(y | x) − log π_ref(y | x)` of the chosen and of the rejected completion, of n tokens each, the loss
    of a pair is, as TRL 1.16 has it (`sigmoid`, `sigmoid_norm` and `ipo`):

        dpo        −log σ(β (r_chosen − r_rejected))
        dpo_norm   −log σ(β (r_chosen / n_chosen − r_rejected / n_rejected))
        ipo        (r_chosen / n_chosen − r_rejected / n_rejected − 1 / (2 β))²
    """
    mask_BT, segment_BT, beta = target_mask(batch), batch["segment_ids"], dpo.beta
    most = segment_BT.shape[1] // 2  # pairs of a packed sequence: a side has a token at least

    def by_side(x_BT: Array) -> Float[Array, "B P 2"]:
        x_BT = jnp.where(mask_BT, x_BT, 0).astype(jnp.float32)
        total = jax.vmap(lambda x_T, s_T: jax.ops.segment_sum(x_T, s_T, 2 * most + 1))(x_BT, segment_BT)
        return total[:, 1:].reshape(-1, most, 2)

    length_BP2 = by_side(jnp.ones_like(logprob_BT))
    logprob_BP2 = by_side(logprob_BT)
    ratio_BP2 = logprob_BP2 - by_side(reference_logprob_BT)
    real_BP = (length_BP2 > 0).all(axis=-1)
    score_BP2 = ratio_BP2 if dpo.loss == "dpo" else ratio_BP2 / jnp.maximum(length_BP2, 1)
    margin_BP = score_BP2[..., 0] - score_BP2[..., 1]
    ipo_BP, dpo_BP = (margin_BP - 1 / (2 * beta)) ** 2, -jax.nn.log_sigmoid(beta * margin_BP)
    losses_BP = ipo_BP if dpo.loss == "ipo" else dpo_BP
    reward_BP2 = beta * jax.lax.stop_gradient(ratio_BP2)

    def total(x_BP: Array) -> Float[Array, ""]:
        return jnp.where(real_BP, x_BP, 0).sum(dtype=jnp.float32)

    return PreferenceSums(
        loss=total(losses_BP),
        chosen=total(reward_BP2[..., 0]),
        rejected=total(reward_BP2[..., 1]),
        correct=total(reward_BP2[..., 0] > reward_BP2[..., 1]),
        chosen_logprob=total(logprob_BP2[..., 0]),
        rejected_logprob=total(logprob_BP2[..., 1]),
        pairs=total(jnp.ones_like(margin_BP)),
    )


class RouterSums(NamedTuple):
    """The policy's router statistics, summed over microbatches."""

    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    load_LE: Int[Array, "L E"]
    dropped: Int[Array, ""]


def make_preference_step(
    abstract_model: AbstractModel,
    tx: optax.GradientTransformation,
    training: TrainingConfig,
    dpo: DPOConfig,
    mesh: Mesh,
) -> Wrapped:
    """The jitted step `(state, reference, batch) -> (state, metrics)`, which donates the state. `reference` has the
    arrays of the reference policy; those that it lacks are the policy's, with LoRA all but the adapters. The loss is
    the mean over the pairs of a batch, plus the auxiliary load-balancing loss and the router z-loss of the policy with
    their weights. The MTP module stays unchanged."""
    logprobs = _token_logprobs(abstract_model, training, mesh)

    @partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(state_shardings(abstract_model, tx, mesh), NamedSharding(mesh, P())),
        compiler_options=mesh_compiler_options(mesh, abstract_model.kernels),
    )
    def step(state: TrainState, reference: Arrays, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH_SPEC))
        pairs = jnp.maximum((batch["segment_ids"].max(axis=1) // 2).sum(), 1)
        tokens = (batch["segment_ids"] != 0).sum()
        of_microbatch = partial(gradient, state.params, state.fixed, reference, pairs, len(batch["tokens"]), tokens)
        grads, (sums, router) = accumulate_gradients(of_microbatch, batch, training.gradient_accumulation_steps)
        rate = training.router_bias_update_rate
        state, metrics = update_state(state, tx, grads, sums.loss, router.load_LE, rate, mtp=False)
        return state, metrics | preference_metrics(sums) | {
            "tokens": tokens,
            "load_LE": router.load_LE,
            "aux_loss": router.aux_loss / (len(batch["tokens"]) * max(router.load_LE.shape[0], 1)),
            "router_z_loss": router.z_loss / (tokens * max(router.load_LE.shape[0], 1)),
            "dropped": router.dropped,
        }

    def loss(
        params: Arrays,
        fixed: Arrays,
        reference: Arrays,
        pairs: Array,
        sequences: int,
        tokens: Array,
        microbatch: Batch,
    ) -> tuple[Array, tuple[PreferenceSums, RouterSums]]:
        """A microbatch's part of the loss, normalised by the pairs, sequences and tokens of the full batch."""
        reference_BT = jax.lax.stop_gradient(logprobs(fixed | reference, microbatch)[0])
        logprob_BT, stats = logprobs(params | fixed, microbatch)
        sums = preference_sums(logprob_BT, reference_BT, microbatch, dpo)
        if stats is None:
            router = RouterSums(jnp.float32(0), jnp.float32(0), jnp.zeros((0, 0), jnp.int32), jnp.int32(0))
        else:
            router = RouterSums(stats.aux_loss.sum(), stats.z_loss.sum(), stats.load_E, stats.dropped.sum())
        total = sums.loss / pairs + training.aux_loss_weight * router.aux_loss / sequences
        if training.router_z_loss_weight:
            total += training.router_z_loss_weight * router.z_loss / tokens
        return total, (sums, router)

    gradient = jax.grad(loss, has_aux=True)
    return step


def make_preference_eval_step(
    abstract_model: AbstractModel, training: TrainingConfig, dpo: DPOConfig, mesh: Mesh
) -> Callable[[TrainState, Arrays, Batch], PreferenceSums]:
    """The jitted evaluation `(state, reference, batch) -> sums`."""
    logprobs = _token_logprobs(abstract_model, training, mesh)

    @partial(
        jax.jit,
        out_shardings=NamedSharding(mesh, P()),
        compiler_options=mesh_compiler_options(mesh, abstract_model.kernels),
    )
    def step(state: TrainState, reference: Arrays, batch: Batch) -> PreferenceSums:
        policy, fixed = (logprobs(arrays, batch)[0] for arrays in (state.arrays, state.fixed | reference))
        return preference_sums(policy, fixed, batch, dpo)

    return step


def preference_metrics(sums: PreferenceSums) -> dict[str, Array]:
    """Means over the pairs, by TRL's names."""
    count = jnp.maximum(sums.pairs, 1)
    return {
        "loss": sums.loss / count,
        "rewards/chosen": sums.chosen / count,
        "rewards/rejected": sums.rejected / count,
        "rewards/margins": (sums.chosen - sums.rejected) / count,
        "rewards/accuracies": sums.correct / count,
        "logps/chosen": sums.chosen_logprob / count,
        "logps/rejected": sums.rejected_logprob / count,
        "pairs": sums.pairs,
    }


def _token_logprobs(
    abstract_model: AbstractModel, training: TrainingConfig, mesh: Mesh
) -> Callable[[Arrays, Batch], tuple[Float[Array, "B T"], RouterStats | None]]:
    """Log-probabilities of the targets of a batch, and router statistics, of a model with given arrays."""

    def logprobs(arrays: Arrays, batch: Batch) -> tuple[Float[Array, "B T"], RouterStats | None]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = abstract_model.merge(arrays)
            h_BTD, stats = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
            return model.token_logprobs(h_BTD, batch["targets"], chunk=training.loss_chunk)[0], stats

    return logprobs
