"""Learner: from scored groups to new parameters, with one optimizer update per minibatch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mla_moe.config import Recipe
from mla_moe.nn import loss as losses
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.nn.layers import Activations
from mla_moe.nn.moe import RouterStats
from mla_moe.nn.transformer import Transformer
from mla_moe.parallel.compiler_options import mesh_compiler_options
from mla_moe.rl import objectives
from mla_moe.rl.group_sampling import GroupBatch
from mla_moe.rl.objectives import ObjectiveSums, TokenInputs
from mla_moe.rl.packing import PackedSequences, microbatches, pack_completions
from mla_moe.training.run_context import put_batch
from mla_moe.training.step import TrainState, state_shardings, update_state

Microbatch = dict[str, jax.Array]
"""`rl.micro_batch_size` packed sequences of a minibatch on the devices, with the arrays that `TokenInputs` names."""


class GradientSums(NamedTuple):
    """Accumulated over the microbatches of a minibatch."""

    gradient: Arrays
    sums: ObjectiveSums
    load_LE: Int[Array, "L E"]
    """Tokens per expert."""
    dropped: Int[Array, ""]
    """(Token, expert) pairs dropped at capacity."""


class Learner:
    """Gradient accumulation over microbatches of `rl.micro_batch_size` packed sequences: the activations of one
    microbatch exist at a time. All microbatches have one shape, so each of the compiled programs compiles once, at any
    number and length of completions."""

    def __init__(
        self,
        abstract_model: AbstractModel,
        tx: optax.GradientTransformation,
        recipe: Recipe,
        mesh: Mesh,
        teacher: AbstractModel | None = None,
    ):
        """With the objective distillation there is a `teacher`, unless it is behind an endpoint."""
        self.abstract_model, self.tx, self.mesh, self.teacher = abstract_model, tx, mesh, teacher
        self.rl, self.loss_chunk = recipe.rl, recipe.training.loss_chunk
        self.num_completions = self.rl.prompts_per_step * self.rl.group_size // self.rl.minibatches
        of_model = abstract_model.shardings(mesh)
        options = mesh_compiler_options(mesh, abstract_model.kernels)
        replicated: Any = NamedSharding(mesh, P())  # for what the host reads
        # Each gradient is sharded like its parameter (reduce-scattered).
        gradient: Any = {path: of_model[path] for path in abstract_model.param_paths}
        sums = GradientSums(gradient, replicated, replicated, replicated)
        state = state_shardings(abstract_model, tx, mesh)
        self.logprobs = jax.jit(self._logprobs, compiler_options=options)
        self.zeros = jax.jit(self._zeros, out_shardings=sums)
        self.accumulate = jax.jit(self._accumulate, donate_argnums=4, out_shardings=sums, compiler_options=options)
        self.apply_gradients = jax.jit(self._apply_gradients, donate_argnums=0, out_shardings=(state, replicated))

    def update_policy(
        self, state: TrainState, reference: Arrays, groups: GroupBatch, teacher: Arrays
    ) -> tuple[TrainState, dict[str, Any]]:
        """One update per minibatch of groups. `reference`: parameters of the reference policy; `teacher`: arrays of
        the teacher, empty without one. Donates the state."""
        count, size = self.rl.minibatches, self.rl.micro_batch_size
        packed = [self.pack(groups, slice(first, None, count)) for first in range(count)]
        minibatches = [[put_batch(batch, size, self.mesh) for batch in microbatches(one, size)] for one in packed]
        for microbatch in (microbatch for minibatch in minibatches for microbatch in minibatch):
            # With one minibatch the current policy is the old one: its log-probabilities come with the gradient.
            if self.rl.minibatches > 1:
                microbatch["old_logprob_BT"] = self.logprobs(state.params, state.fixed, microbatch)
            if objectives.kl_coefficient(self.rl):
                microbatch["reference_logprob_BT"] = self.logprobs(reference, state.fixed, microbatch)
        updates = []
        for minibatch in minibatches:
            total = self.zeros(state.params, state.fixed, teacher, minibatch[0])
            for microbatch in minibatch:
                total = self.accumulate(state.params, state.fixed, teacher, microbatch, total)
            state, metrics = self.apply_gradients(state, total)
            updates.append(metrics)
        return state, learner_metrics(jax.device_get(updates), distillation=self.rl.objective == "distillation")

    def pack(self, groups: GroupBatch, which: slice = slice(None)) -> PackedSequences:
        """Packed sequences of some groups, with the advantage and the loss weight of each token."""
        completions = [scored.completion for group in groups.completions[which] for scored in group]
        packed = pack_completions(completions, self.rl.packed_sequence_length, self.rl.micro_batch_size)
        advantage_N = objectives.advantages(groups.reward_GS[which], self.rl.objective).ravel()
        weight_N = objectives.token_weights(self.rl, np.array([len(c.tokens) for c in completions]))
        packed["advantage_BT"] = objectives.per_token(advantage_N, packed["completion_BT"])
        packed["weight_BT"] = objectives.per_token(weight_N, packed["completion_BT"])
        if groups.teacher_logprobs is not None:
            packed["teacher_logprob_BT"] = np.zeros(packed["completion_BT"].shape, np.float32)
            scores = [completion for group in groups.teacher_logprobs[which] for completion in group]
            for index, of_completion in enumerate(scores):
                packed["teacher_logprob_BT"][packed["completion_BT"] == index] = of_completion
        if groups.teacher_top is not None:
            shape = *packed["completion_BT"].shape, self.rl.teacher_top_k
            # Elsewhere some distribution, so that the KL, whose weight is 0 there, is finite.
            packed["teacher_ids_BTk"] = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape).copy()
            packed["teacher_logprob_BTk"] = np.full(shape, -np.log(2 * shape[-1]), np.float32)
            for index, top in enumerate(top for group in groups.teacher_top[which] for top in group):
                place_BT = packed["completion_BT"] == index
                packed["teacher_ids_BTk"][place_BT], packed["teacher_logprob_BTk"][place_BT] = top
        return packed

    def _token_logprobs(
        self, params: Arrays, fixed: Arrays, microbatch: Microbatch
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"], RouterStats | None]:
        """Log-probability of each target at the sampling temperature, entropy, and statistics of the routers."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            model = self.abstract_model.merge(params | fixed)
            h_BTD, stats = _hidden(model, microbatch)
            return *self._of_targets(model, h_BTD, microbatch), stats

    def _of_targets(
        self, model: Transformer, h_BTD: Activations, microbatch: Microbatch
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        targets_BT, temperature = microbatch["targets"], self.rl.temperature
        return model.token_logprobs(h_BTD, targets_BT, chunk=self.loss_chunk, temperature=temperature)

    def _distillation_sums(
        self, params: Arrays, fixed: Arrays, teacher: Arrays, microbatch: Microbatch, tokens: TokenInputs
    ) -> tuple[ObjectiveSums, RouterStats | None]:
        """The teacher's routers choose its experts: routing replay is of the student alone."""
        assert self.teacher is not None
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            of_teacher = self.teacher.merge(teacher)
            teacher_BTE, _ = _hidden(of_teacher, {k: x for k, x in microbatch.items() if k != "replay"})
            model = self.abstract_model.merge(params | fixed)
            h_BTD, stats = _hidden(model, microbatch)
            heads_and_hidden = h_BTD, model.head_DV, teacher_BTE, of_teacher.head_DV
            kl_BT = losses.reverse_kl(*heads_and_hidden, chunk=self.loss_chunk, temperature=self.rl.temperature)
            logprob_BT, entropy_BT = self._of_targets(model, h_BTD, microbatch)
        return objectives.distillation_sums(logprob_BT, entropy_BT, kl_BT, tokens), stats

    def _top_distillation_sums(
        self, params: Arrays, fixed: Arrays, microbatch: Microbatch, tokens: TokenInputs
    ) -> tuple[ObjectiveSums, RouterStats | None]:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            model = self.abstract_model.merge(params | fixed)
            h_BTD, stats = _hidden(model, microbatch)
            top = microbatch["teacher_ids_BTk"], microbatch["teacher_logprob_BTk"]
            kl_BT = losses.top_reverse_kl(h_BTD, model.head_DV, *top, chunk=self.loss_chunk)
            logprob_BT, entropy_BT = self._of_targets(model, h_BTD, microbatch)
        return objectives.distillation_sums(logprob_BT, entropy_BT, kl_BT, tokens), stats

    def _logprobs(self, params: Arrays, fixed: Arrays, microbatch: Microbatch) -> Float[Array, "B T"]:
        return self._token_logprobs(params, fixed, microbatch)[0]

    def _gradient_sums(self, params: Arrays, fixed: Arrays, teacher: Arrays, microbatch: Microbatch) -> GradientSums:
        def loss(params: Arrays) -> tuple[Array, tuple[ObjectiveSums, RouterStats | None]]:
            tokens = TokenInputs(**{name: microbatch[name] for name in TokenInputs._fields if name in microbatch})
            if self.teacher is not None:
                sums, stats = self._distillation_sums(params, fixed, teacher, microbatch, tokens)
                return sums.loss, (sums, stats)
            if self.rl.teacher_top_k:
                sums, stats = self._top_distillation_sums(params, fixed, microbatch, tokens)
                return sums.loss, (sums, stats)
            logprob_BT, entropy_BT, stats = self._token_logprobs(params, fixed, microbatch)
            if self.rl.teacher_is_endpoint:
                sums = objectives.sampled_distillation_sums(logprob_BT, entropy_BT, tokens, self.rl.tis_clip)
            else:
                sums = objectives.objective_sums(logprob_BT, entropy_BT, tokens, self.rl, self.num_completions)
            return sums.loss, (sums, stats)

        gradient, (sums, stats) = jax.grad(loss, has_aux=True)(params)
        if stats is None:
            return GradientSums(gradient, sums, jnp.zeros((0, 0), jnp.int32), jnp.int32(0))
        return GradientSums(gradient, sums, stats.load_E, stats.dropped.sum())

    def _zeros(self, params: Arrays, fixed: Arrays, teacher: Arrays, microbatch: Microbatch) -> GradientSums:
        shapes = jax.eval_shape(self._gradient_sums, params, fixed, teacher, microbatch)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def _accumulate(
        self, params: Arrays, fixed: Arrays, teacher: Arrays, microbatch: Microbatch, before: GradientSums
    ) -> GradientSums:
        """Donates the sums."""
        new = self._gradient_sums(params, fixed, teacher, microbatch)
        added = jax.tree.map(jnp.add, before, new)
        return added._replace(sums=objectives.add_sums(before.sums, new.sums))

    def _apply_gradients(self, state: TrainState, total: GradientSums) -> tuple[TrainState, dict[str, Any]]:
        """Donates the state."""
        gradient, sums, load_LE, dropped = total
        bias_update_rate = self.rl.router_bias_update_rate
        state, metrics = update_state(state, self.tx, gradient, sums.loss, load_LE, bias_update_rate, mtp=False)
        return state, metrics | {"sums": sums, "load_LE": load_LE, "dropped": dropped}


def _hidden(model: Transformer, microbatch: Microbatch) -> tuple[Activations, RouterStats | None]:
    replay = microbatch["replay"].astype(jnp.int32) if "replay" in microbatch else None
    return model.hidden(*(microbatch[name] for name in ("tokens", "segment_ids", "positions")), replay)


def learner_metrics(updates: Sequence[dict[str, Any]], *, distillation: bool = False) -> dict[str, Any]:
    """Metrics of a step, over completion tokens, and its `load_LE`, from what `apply_gradients` returns per update."""
    sums = [update["sums"] for update in updates]
    tokens = sum(int(s.tokens) for s in sums)

    def per_token(name: str) -> float:
        return sum(float(getattr(s, name)) for s in sums) / max(tokens, 1)

    load_LE = np.sum([update["load_LE"] for update in updates], axis=0)
    metrics: dict[str, Any] = {
        "loss": float(np.mean([s.loss for s in sums])),
        "grad_norm": float(np.mean([update["grad_norm"] for update in updates])),
        "skipped": sum(int(update["skipped"]) for update in updates),
        "entropy": per_token("entropy"),
        "sampler_logprob_diff": per_token("sampler_logprob_diff"),
        "sampler_logprob_diff_max": float(max(s.sampler_logprob_diff_max for s in sums)),
    }
    if distillation:
        metrics["distillation/reverse_kl"] = per_token("kl")
    else:
        metrics |= {
            "kl": per_token("kl"),
            "clip_ratio/low": per_token("clipped_low"),
            "clip_ratio/high": per_token("clipped_high"),
            "tis_weight": per_token("tis_weight"),
            "tis_clipped": per_token("tis_clipped"),
            "off_policy_masked": sum(int(s.off_policy_masked) for s in sums),
        }
    if load_LE.size:
        metrics["moe/load_max"] = float((load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9)).max())
        metrics["moe/dropped"] = sum(int(update["dropped"]) for update in updates)
    return metrics | {"load_LE": load_LE}
