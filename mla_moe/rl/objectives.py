"""RL objectives: GRPO, Dr. GRPO, DAPO and GSPO, from rewards to a loss, as pure functions on arrays.

    grpo      arXiv 2402.03300 (and R1)   importance ratio per token; mean over a completion, then over completions
    dr_grpo   arXiv 2503.20783            advantages not divided by the standard deviation, sums not by the length
    dapo      arXiv 2503.14476            clip-higher; mean over all tokens; no KL
    gspo      arXiv 2507.18071            one ratio per completion, the geometric mean over its tokens

and distillation on the student's own completions (GKD, arXiv 2306.13649), which needs no rewards.

Advantages are computed per group on the host. The loss runs on packed sequences `[B, T]`, in one or more microbatches
(gradient accumulation): each token's loss weight is computed beforehand over the whole minibatch (`token_weights`), so
that the sums of the microbatches add up to those of the minibatch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_moe.config import RLConfig

CLIP_RATIO = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}
"""Published clip ratios, low and high."""


def advantages(reward_GS: Float[np.ndarray, "G S"], objective: str) -> Float[np.ndarray, "G S"]:
    """Group-relative advantages: `(r − mean) / (std + 1e-6)` within each group of S completions of one prompt.

    The standard deviation is the population's (ddof 0), as in the paper, so that a group's advantages have variance 1
    at any size. TRL and verl use ddof 1, which makes advantages smaller by `√(1 − 1/S)`: 3 % with 16 completions, 13 %
    with 4. `dr_grpo` does not divide. A group with equal rewards has advantages of exactly 0.
    """
    reward_GS = np.asarray(reward_GS, np.float64)
    differ_G1 = np.ptp(reward_GS, axis=1, keepdims=True) > 0
    centered_GS = np.where(differ_G1, reward_GS - reward_GS.mean(axis=1, keepdims=True), 0.0)
    return centered_GS if objective == "dr_grpo" else centered_GS / (reward_GS.std(axis=1, keepdims=True) + 1e-6)


def is_informative(rewards: Sequence[float] | np.ndarray) -> bool:
    """Whether the values of a group's completions differ. Of equal rewards all advantages are 0. Dynamic sampling
    (DAPO) compares `Reward.filter_metric`: accuracy, or the reward if `task.accuracy_weight` is 0."""
    return bool(max(rewards) > min(rewards))


def overlong_penalty(length: int, max_new_tokens: int, buffer: int) -> float:
    """DAPO's soft overlong penalty (section 3.4), added to the reward of a completion of `length` tokens: 0 up to
    `max_new_tokens − buffer` tokens, then linearly down to −1. With a buffer of 0 there is no penalty."""
    return max(min((max_new_tokens - buffer - length) / buffer, 0.0), -1.0) if buffer else 0.0


def clip_range(rl: RLConfig) -> tuple[float, float]:
    """Clip ratios low and high: the recipe's, or the objective's published ones."""
    low, high = CLIP_RATIO[rl.objective]
    return rl.clip_ratio_low or low, rl.clip_ratio_high or high


def kl_coefficient(rl: RLConfig) -> float:
    """Coefficient of the KL term: `rl.kl_coef`, or 0 for DAPO and distillation. At 0 no reference policy is kept."""
    return 0.0 if rl.objective in ("dapo", "distillation") else rl.kl_coef


def token_weights(rl: RLConfig, length_N: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Weight in the loss of one token of each completion, for a minibatch of N completions of these lengths.

    `grpo` and `gspo`: 1 / (N · length). `dr_grpo`: 1 / (N · max_new_tokens), a constant. `dapo` and
    `distillation`: 1 / all tokens.
    """
    N = len(length_N)
    if rl.objective == "dr_grpo":
        return np.full(N, 1 / (N * rl.max_new_tokens))
    if rl.objective in ("dapo", "distillation"):
        return np.full(N, 1 / max(length_N.sum(), 1))
    return 1 / (N * np.maximum(length_N, 1))


def per_token(x_N: Float[np.ndarray, "N"], completion_BT: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T"]:
    """The value of each completion at each of its tokens; 0 for prompts and padding."""
    return np.where(completion_BT >= 0, x_N[completion_BT], 0).astype(np.float32)


class TokenInputs(NamedTuple):
    """Constants of the loss per token of a microbatch of packed sequences. A completion is never split."""

    completion_BT: Int[Array, "B T"]
    """Index of the completion in the minibatch; −1 for prompts and padding."""
    weight_BT: Float[Array, "B T"]
    """Weight in the loss, from `token_weights`."""
    advantage_BT: Float[Array, "B T"]
    """Advantage of the token's completion."""
    sampler_logprob_BT: Float[Array, "B T"]
    """Log-probability under the sampling policy, computed by the engine."""
    old_logprob_BT: Float[Array, "B T"] | None = None
    """Log-probability under the same policy, recomputed by the trainer. None if it is the current policy: one update
    per rollout."""
    reference_logprob_BT: Float[Array, "B T"] | None = None
    """Log-probability under the reference policy; None if the KL coefficient is 0."""
    teacher_logprob_BT: Float[Array, "B T"] | None = None
    """Log-probability under the teacher of distillation, if that is behind an endpoint."""


class ObjectiveSums(NamedTuple):
    """Sums over the tokens of a microbatch, accumulated with `add_sums`. Zeros are the neutral element."""

    loss: Float[Array, ""]
    """The microbatch's term of the loss: over a minibatch these add up to the loss itself."""
    tokens: Int[Array, ""]
    """Completion tokens: the denominator of the means logged from the following sums."""
    entropy: Float[Array, ""]
    kl: Float[Array, ""]
    """KL from the reference policy (k3 estimator, as in the loss), 0 without one; of distillation the teacher's."""
    clipped_low: Int[Array, ""]
    """Tokens with a ratio below the clip range and a negative advantage: no gradient."""
    clipped_high: Int[Array, ""]
    """Tokens with a ratio above the clip range and a positive advantage: no gradient."""
    sampler_logprob_diff: Float[Array, ""]
    """Sampler/trainer log-probability difference, `|log π_old − log π_sampler|`: one policy, computed twice."""
    sampler_logprob_diff_max: Float[Array, ""]
    """The maximum, not the sum."""
    tis_weight: Float[Array, ""]
    """Weights of truncated importance sampling (TIS)."""
    tis_clipped: Int[Array, ""]
    """Tokens whose weight was truncated at `tis_clip`."""
    off_policy_masked: Int[Array, ""]
    """Completions masked by `off_policy_mask_threshold`."""


def add_sums(a: ObjectiveSums, b: ObjectiveSums) -> ObjectiveSums:
    largest = jnp.maximum(a.sampler_logprob_diff_max, b.sampler_logprob_diff_max)
    return jax.tree.map(jnp.add, a, b)._replace(sampler_logprob_diff_max=largest)


def objective_sums(
    logprob_BT: Float[Array, "B T"], entropy_BT: Float[Array, "B T"], tokens: TokenInputs, rl: RLConfig, N: int
) -> ObjectiveSums:
    """Loss of a microbatch, to be differentiated with respect to `logprob_BT` of the current policy, and its metrics.
    `N` is the number of completions of the minibatch.

        loss = Σ weight · (−m · w · min(ρ A, clip(ρ, 1 − low, 1 + high) A) + β · KL)

    ρ = π / π_old; for `gspo` the geometric mean over the completion, with a gradient through each token's own
    log-probability (GSPO-token, section 4.3: the same value and gradient), so that w can be applied per token.
    KL = π_ref / π − log(π_ref / π) − 1, the k3 estimator.
    w = min(π_old / π_sampler, `tis_clip`), truncated importance sampling (TIS): corrects for the difference between
    the numerics of sampler and trainer.
    m = 0 is the off-policy mask (DeepSeek-V3.2, section 3.1) of completions with A < 0 and mean log(π_sampler / π) >
    `off_policy_mask_threshold`. The sampler's log-probabilities stand for π_old there. Masked completions still count
    in the weights of the others.
    """
    real_BT = tokens.completion_BT >= 0

    def log_ratio(numerator_BT: Array, denominator_BT: Array) -> Array:
        return jnp.where(real_BT, numerator_BT - denominator_BT, 0)

    def total(x_BT: Array) -> Array:
        """Sum per completion [N]; index −1 is dropped, completions of other microbatches get 0."""
        return jax.ops.segment_sum(x_BT.astype(jnp.float32).ravel(), tokens.completion_BT.ravel(), N)

    def mean(x_BT: Array) -> Array:
        return total(x_BT) / jnp.maximum(total(real_BT), 1)

    old_BT = tokens.old_logprob_BT
    if old_BT is None:
        old_BT = jax.lax.stop_gradient(logprob_BT)
    log_rho_BT = log_ratio(logprob_BT, old_BT)
    if rl.objective == "gspo":
        fixed_BT = jax.lax.stop_gradient(log_rho_BT)
        log_rho_BT += mean(fixed_BT)[tokens.completion_BT] - fixed_BT
    rho_BT, A_BT = jnp.exp(log_rho_BT), jnp.where(real_BT, tokens.advantage_BT, 0)
    low, high = clip_range(rl)
    surrogate_BT = jnp.minimum(rho_BT * A_BT, jnp.clip(rho_BT, 1 - low, 1 + high) * A_BT)

    sampler_diff_BT = log_ratio(old_BT, tokens.sampler_logprob_BT)
    tis_weight_BT, tis_clipped_BT = jnp.ones_like(rho_BT), jnp.zeros_like(real_BT)
    if rl.tis_clip is not None:
        tis_weight_BT = jnp.exp(sampler_diff_BT)
        tis_clipped_BT = real_BT & (tis_weight_BT > rl.tis_clip)
        tis_weight_BT = jnp.minimum(tis_weight_BT, rl.tis_clip)

    masked_N = jnp.zeros(N, bool)
    if rl.off_policy_mask_threshold is not None:
        drift_N = mean(jax.lax.stop_gradient(log_ratio(tokens.sampler_logprob_BT, logprob_BT)))
        masked_N = (mean(A_BT) < 0) & (drift_N > rl.off_policy_mask_threshold)
    policy_loss_BT = -jnp.where(masked_N[tokens.completion_BT], 0, tis_weight_BT * surrogate_BT)

    kl_BT = jnp.zeros_like(rho_BT)
    if tokens.reference_logprob_BT is not None:
        reference_diff_BT = log_ratio(tokens.reference_logprob_BT, logprob_BT)
        kl_BT = jnp.expm1(reference_diff_BT) - reference_diff_BT

    return ObjectiveSums(
        loss=jnp.sum(tokens.weight_BT * (policy_loss_BT + kl_coefficient(rl) * kl_BT)),
        tokens=real_BT.sum(),
        entropy=jnp.sum(entropy_BT, where=real_BT),
        kl=kl_BT.sum(),
        clipped_low=((A_BT < 0) & (rho_BT < 1 - low)).sum(),
        clipped_high=((A_BT > 0) & (rho_BT > 1 + high)).sum(),
        sampler_logprob_diff=jnp.abs(sampler_diff_BT).sum(),
        sampler_logprob_diff_max=jnp.abs(sampler_diff_BT).max(),
        tis_weight=jnp.sum(tis_weight_BT, where=real_BT),
        tis_clipped=tis_clipped_BT.sum(),
        off_policy_masked=masked_N.sum(),
    )


def distillation_sums(
    logprob_BT: Float[Array, "B T"],
    entropy_BT: Float[Array, "B T"],
    reverse_kl_BT: Float[Array, "B T"],
    tokens: TokenInputs,
) -> ObjectiveSums:
    """Loss of a microbatch of on-policy distillation, to be differentiated with respect to `reverse_kl_BT`, and its
    metrics: `Σ weight · KL(π ‖ π_teacher)`, the mean over the completion tokens.

    The KL is that of the full distribution at each sampled token (GKD, arXiv 2306.13649, with λ = 1 and the reverse
    KL): what the advantage `log π_teacher − log π` of the sampled token estimates, without its variance. As there, the
    completions are constants.
    """
    real_BT = tokens.completion_BT >= 0
    old_BT = logprob_BT if tokens.old_logprob_BT is None else tokens.old_logprob_BT
    diff_BT = jnp.abs(jnp.where(real_BT, old_BT - tokens.sampler_logprob_BT, 0))
    kl_BT = jnp.where(real_BT, reverse_kl_BT, 0)
    zeros = ObjectiveSums(*[jnp.int32(0)] * len(ObjectiveSums._fields))
    return zeros._replace(
        loss=jnp.sum(tokens.weight_BT * kl_BT),
        tokens=real_BT.sum(),
        entropy=jnp.sum(entropy_BT, where=real_BT),
        kl=kl_BT.sum(),
        sampler_logprob_diff=diff_BT.sum(),
        sampler_logprob_diff_max=diff_BT.max(),
    )


def sampled_distillation_sums(
    logprob_BT: Float[Array, "B T"], entropy_BT: Float[Array, "B T"], tokens: TokenInputs, tis_clip: float | None
) -> ObjectiveSums:
    """The same for a teacher of which only the log-probabilities of the sampled tokens are known, to be differentiated
    with respect to `logprob_BT`: `Σ weight · (−w · ρ · (log π_teacher − log π_old))`.

    The log-ratio of a sampled token is an unbiased estimate of the reverse KL, and as the advantage of a policy
    gradient it has the gradient of that KL in expectation, with the variance that the full distribution avoids. ρ and
    the weight w (TIS) are those of `objective_sums`.
    """
    real_BT, fixed_BT = tokens.completion_BT >= 0, jax.lax.stop_gradient(logprob_BT)
    old_BT = fixed_BT if tokens.old_logprob_BT is None else tokens.old_logprob_BT
    assert tokens.teacher_logprob_BT is not None
    kl_BT = jnp.where(real_BT, old_BT - tokens.teacher_logprob_BT, 0)
    sampler_diff_BT = jnp.where(real_BT, old_BT - tokens.sampler_logprob_BT, 0)
    tis_weight_BT = jnp.ones_like(kl_BT) if tis_clip is None else jnp.minimum(jnp.exp(sampler_diff_BT), tis_clip)
    rho_BT = jnp.exp(jnp.where(real_BT, logprob_BT - old_BT, 0))
    sums = distillation_sums(fixed_BT, entropy_BT, kl_BT, tokens)
    return sums._replace(loss=jnp.sum(tokens.weight_BT * tis_weight_BT * rho_BT * kl_BT))
