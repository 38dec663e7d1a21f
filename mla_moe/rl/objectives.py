"""From rewards to a loss: GRPO and its kin, as pure functions on arrays.

    grpo      arXiv 2402.03300 (and R1)   ratio by token; mean over an answer's tokens, then over answers
    dr_grpo   arXiv 2503.20783            advantages are not divided by a deviation, nor sums by a length
    dapo      arXiv 2503.14476            clips higher above than below; mean over all tokens; no KL
    gspo      arXiv 2507.18071            one ratio an answer, the geometric mean of its tokens'

A group's rewards become advantages on the host. An update then has a minibatch of answers, packed into rows `[B, T]`,
and may go through the rows in parts: what a token counts in the loss is settled before, over the whole minibatch
(`token_weights`), so that the sums of the parts add up to the minibatch's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_moe.config import RLConfig

EPS = 1e-6
"""Added to the deviation of a group's rewards."""

CLIP = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}
"""How far a ratio may go below and above 1, as published."""


def advantages(reward_GS: Float[np.ndarray, "G S"], objective: str) -> Float[np.ndarray, "G S"]:
    """What each answer is worth beside the others to its question: `(r − mean) / (std + 1e-6)`, within the group.

    A row holds a whole group. The deviation is the group's own (ddof 0), as the formula has it, so that a group's
    advantages have variance 1 whatever its size; TRL and verl take ddof 1, which makes them smaller by `√(1 − 1/S)`:
    3 % with 16 answers, 13 % with 4. `dr_grpo` does not divide. Where all rewards are equal, advantages are 0 exactly.
    """
    reward_GS = np.asarray(reward_GS, np.float64)
    differ_G1 = np.ptp(reward_GS, axis=1, keepdims=True) > 0
    above_GS = np.where(differ_G1, reward_GS - reward_GS.mean(axis=1, keepdims=True), 0.0)
    return above_GS if objective == "dr_grpo" else above_GS / (reward_GS.std(axis=1, keepdims=True) + EPS)


def is_informative(rewards: Sequence[float] | np.ndarray) -> bool:
    """Whether a group's answers differ in what they earned. Others teach nothing: DAPO samples other questions in
    their place (`Reward.measure`)."""
    return bool(max(rewards) > min(rewards))


def overlong_penalty(length: int, max_new_tokens: int, zone: int) -> float:
    """Added to the reward of an answer of so many tokens: 0 up to `max_new_tokens − zone`, then down to −1, linearly
    (DAPO, section 3.4). Without a zone there is none."""
    return max(min((max_new_tokens - zone - length) / zone, 0.0), -1.0) if zone else 0.0


def clip_range(rl: RLConfig) -> tuple[float, float]:
    """How far a ratio may go below and above 1: the recipe's, or else the objective's own."""
    low, high = CLIP[rl.objective]
    return rl.clip_ratio_low or low, rl.clip_ratio_high or high


def kl_coefficient(rl: RLConfig) -> float:
    """Weight of the divergence from the reference: `rl.kl_coef`, but DAPO has none. At 0 no reference is needed."""
    return 0.0 if rl.objective == "dapo" else rl.kl_coef


def token_weights(rl: RLConfig, length_N: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """What a token of each answer counts in the loss of a minibatch of answers of these lengths.

    `grpo` and `gspo`: 1 / (answers · tokens of its answer). `dr_grpo`: 1 / (answers · max_new_tokens), a constant.
    `dapo`: 1 / tokens of all answers.
    """
    answers = len(length_N)
    if rl.objective == "dr_grpo":
        return np.full(answers, 1 / (answers * rl.max_new_tokens))
    if rl.objective == "dapo":
        return np.full(answers, 1 / max(length_N.sum(), 1))
    return 1 / (answers * np.maximum(length_N, 1))


def per_token(x_N: Float[np.ndarray, "N"], answer_BT: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T"]:
    """Each answer's number at each of its tokens, 0 elsewhere."""
    return np.where(answer_BT >= 0, x_N[answer_BT], 0).astype(np.float32)


class TokenInputs(NamedTuple):
    """What an update holds fixed of a minibatch's tokens, or of a part of its rows. An answer is whole within one."""

    answer_BT: Int[Array, "B T"]
    """Which of the minibatch's answers a token belongs to; −1 for prompts and padding."""
    weight_BT: Float[Array, "B T"]
    """Its answer's, of `token_weights`."""
    advantage_BT: Float[Array, "B T"]
    """Its answer's."""
    sampler_logprob_BT: Float[Array, "B T"]
    """Of the model that sampled the answer, as the engine computed it."""
    old_logprob_BT: Float[Array, "B T"] | None = None
    """Of the same model, as the trainer computes it. None where that is the present one: one update a rollout."""
    reference_logprob_BT: Float[Array, "B T"] | None = None
    """None where `beta` is 0."""


class ObjectiveSums(NamedTuple):
    """Of a part of a minibatch; `add` puts parts together, and zeros are an empty part."""

    loss: Float[Array, ""]
    """The part's share of the loss: of the minibatch's parts, these add up to the loss itself."""
    tokens: Int[Array, ""]
    """Of answers: what the following sums are divided by for a mean."""
    entropy: Float[Array, ""]
    kl: Float[Array, ""]
    """Divergence from the reference, by the estimator in the loss; 0 where there is no reference."""
    clipped_low: Int[Array, ""]
    """Tokens that are held back, their ratio being too small already for an answer that is to become less likely."""
    clipped_high: Int[Array, ""]
    """The same for a ratio too large and an answer that is to become likelier."""
    sampler_logprob_diff: Float[Array, ""]
    """|log π_old − log π_sampler|: one model, computed twice."""
    sampler_logprob_diff_max: Float[Array, ""]
    """The largest of them."""
    importance: Float[Array, ""]
    """Weights for that mismatch."""
    truncated: Int[Array, ""]
    """Weights cut to `importance_limit`."""
    off_policy: Int[Array, ""]
    """Answers left out by `off_policy_limit`."""


def add_sums(a: ObjectiveSums, b: ObjectiveSums) -> ObjectiveSums:
    largest = jnp.maximum(a.sampler_logprob_diff_max, b.sampler_logprob_diff_max)
    return jax.tree.map(jnp.add, a, b)._replace(sampler_logprob_diff_max=largest)


def objective_sums(
    logprob_BT: Float[Array, "B T"], entropy_BT: Float[Array, "B T"], tokens: TokenInputs, rl: RLConfig, answers: int
) -> ObjectiveSums:
    """The loss of a part, to be differentiated by `logprob_BT`, the present model's; and what to log of it.

        loss = Σ weight · (−m · w · min(ρ A, clip(ρ, 1 − low, 1 + high) A) + β D)

    ρ = π / π_old, for `gspo` its geometric mean over the answer. Each token's own log-probability carries its share of
    that ratio's gradient (section 4.3 there, GSPO-token: the same value and gradient), so that w, too, goes by token.
    D = π_ref / π − log(π_ref / π) − 1.
    w = min(π_old / π_sampler, `importance_limit`) corrects for a sampler whose numerics differ from the trainer's.
    m = 0 leaves out answers with A < 0 that have become unlikely: mean log(π_sampler / π) > `off_policy_limit`
    (DeepSeek-V3.2, section 3.1, where π_old is the sampler's, so that its numerics count too). They still count in the
    weights of others.
    """
    real_BT = tokens.answer_BT >= 0

    def log_ratio(over_BT, under_BT):
        return jnp.where(real_BT, over_BT - under_BT, 0)

    def total(x_BT):
        """Over each answer; what is −1 is nobody's, and other parts' answers have no tokens here."""
        return jax.ops.segment_sum(x_BT.astype(jnp.float32).ravel(), tokens.answer_BT.ravel(), answers)

    def mean(x_BT):
        return total(x_BT) / jnp.maximum(total(real_BT), 1)

    old_BT = tokens.old_logprob_BT
    if old_BT is None:
        old_BT = jax.lax.stop_gradient(logprob_BT)
    log_rho_BT = log_ratio(logprob_BT, old_BT)
    if rl.objective == "gspo":
        fixed_BT = jax.lax.stop_gradient(log_rho_BT)
        log_rho_BT += mean(fixed_BT)[tokens.answer_BT] - fixed_BT
    rho_BT, A_BT = jnp.exp(log_rho_BT), jnp.where(real_BT, tokens.advantage_BT, 0)
    low, high = clip_range(rl)
    gain_BT = jnp.minimum(rho_BT * A_BT, jnp.clip(rho_BT, 1 - low, 1 + high) * A_BT)

    log_mismatch_BT = log_ratio(old_BT, tokens.sampler_logprob_BT)
    importance_BT, truncated_BT = jnp.ones_like(rho_BT), jnp.zeros_like(real_BT)
    if rl.tis_clip is not None:
        importance_BT = jnp.exp(log_mismatch_BT)
        truncated_BT = real_BT & (importance_BT > rl.tis_clip)
        importance_BT = jnp.minimum(importance_BT, rl.tis_clip)

    left_out_N = jnp.zeros(answers, bool)
    if rl.off_policy_mask_threshold is not None:
        drift_N = mean(jax.lax.stop_gradient(log_ratio(tokens.sampler_logprob_BT, logprob_BT)))
        left_out_N = (mean(A_BT) < 0) & (drift_N > rl.off_policy_mask_threshold)
    cost_BT = -jnp.where(left_out_N[tokens.answer_BT], 0, importance_BT * gain_BT)

    kl_BT = jnp.zeros_like(rho_BT)
    if tokens.reference_logprob_BT is not None:
        log_off_BT = log_ratio(tokens.reference_logprob_BT, logprob_BT)
        kl_BT = jnp.expm1(log_off_BT) - log_off_BT

    return ObjectiveSums(
        loss=jnp.sum(tokens.weight_BT * (cost_BT + kl_coefficient(rl) * kl_BT)),
        tokens=real_BT.sum(),
        entropy=jnp.sum(entropy_BT, where=real_BT),
        kl=kl_BT.sum(),
        clipped_low=((A_BT < 0) & (rho_BT < 1 - low)).sum(),
        clipped_high=((A_BT > 0) & (rho_BT > 1 + high)).sum(),
        sampler_logprob_diff=jnp.abs(log_mismatch_BT).sum(),
        sampler_logprob_diff_max=jnp.abs(log_mismatch_BT).max(),
        importance=jnp.sum(importance_BT, where=real_BT),
        truncated=truncated_BT.sum(),
        off_policy=left_out_N.sum(),
    )
