"""RL objectives against PyTorch's autograd (golden/make_rl.py) and against the papers' formulas in plain loops."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mla_moe.config import MeshConfig, RLConfig
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.rl.objectives import (
    ObjectiveSums,
    TokenInputs,
    add_sums,
    advantages,
    clip_range,
    distillation_sums,
    is_informative,
    kl_coefficient,
    objective_sums,
    overlong_penalty,
    per_token,
    token_weights,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "rl_objective.npz")
LENGTHS = [int(n) for n in GOLDEN["length_N"]]
N = len(LENGTHS)
OBJECTIVES = ("grpo", "dr_grpo", "dapo", "gspo")
NAMES = ("logprob", "old", "sampler", "reference")


def settings(objective, case):
    rl = RLConfig(objective=objective, kl_coef=float(GOLDEN["beta"]), max_new_tokens=int(GOLDEN["max_new_tokens"]))
    limits = {"off_policy_mask_threshold": "off_policy_limit", "tis_clip": "importance_limit"}  # names in the file
    limits = {field: float(GOLDEN[name]) if case == "corrected" else None for field, name in limits.items()}
    return dataclasses.replace(rl, **limits)


def inputs(objective):
    return {name: GOLDEN[f"{objective}/{name}"] for name in NAMES}, GOLDEN[f"{objective}/advantage"]


def packing(order, B=4, T=64):
    """Indices [B, T] of the tokens, by completion, if completions are packed in this order, each after a prompt."""
    indices, row, time = {}, 0, 0
    for n, completion in enumerate(order):
        prompt, length = n % 3 + 1, LENGTHS[completion]
        if time + prompt + length > T:
            row, time = row + 1, 0
        assert row < B
        indices[completion] = [(row, time + prompt + t) for t in range(length)]
        time += prompt + length
    rows, times = np.array([index for completion in range(N) for index in indices[completion]]).T
    return (rows, times), (B, T)


PACKED = packing(range(N))


def packed(values, A, rl, layout=PACKED):
    """Packed sequences; prompts and padding are NaN, as they must not matter."""
    index, shape = layout

    def pack(flat, fill):
        out = np.full(shape, fill, np.asarray(fill).dtype)
        out[index] = flat
        return jnp.asarray(out)

    completion_BT = pack(np.repeat(np.arange(N), LENGTHS), np.int32(-1))
    weight_BT = jnp.asarray(per_token(token_weights(rl, np.array(LENGTHS)), np.asarray(completion_BT)))
    advantage_BT = pack(np.repeat(A, LENGTHS), np.float32(np.nan))
    logprob, old, sampler, reference = (pack(values[name], np.float32(np.nan)) for name in NAMES)
    return logprob, TokenInputs(completion_BT, weight_BT, advantage_BT, sampler, old, reference)


def loss_and_gradient(logprob, tokens, rl):
    def loss(logprob):
        s = objective_sums(logprob, jnp.where(tokens.completion_BT < 0, jnp.nan, 2.0), tokens, rl, N)
        return s.loss, s

    (_, s), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logprob)
    return s, gradient


def transcription(theta, values, A, rl):
    """−J by the papers' formulas, in float64; GSPO's ratio is per completion, as in its equation 7."""
    low, high = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}[rl.objective]
    total, start = 0.0, 0
    for i, length in enumerate(LENGTHS):
        span = range(start, start + length)
        old, sampler, reference = (values[name].astype(np.float64) for name in NAMES[1:])
        s_i = np.exp(sum(theta[t] - old[t] for t in span) / length)
        drift = sum(sampler[t] - theta[t] for t in span) / length
        masked = rl.off_policy_mask_threshold is not None and A[i] < 0 and drift > rl.off_policy_mask_threshold
        objective = 0.0
        for t in span:
            ratio = s_i if rl.objective == "gspo" else np.exp(theta[t] - old[t])
            surrogate = min(ratio * A[i], min(max(ratio, 1 - low), 1 + high) * A[i])
            if rl.tis_clip is not None:
                surrogate *= min(np.exp(old[t] - sampler[t]), rl.tis_clip)
            r = np.exp(reference[t] - theta[t])
            kl = 0.0 if rl.objective == "dapo" else rl.kl_coef * (r - np.log(r) - 1)
            objective += (0.0 if masked else surrogate) - kl
        if rl.objective == "dr_grpo":
            total += objective / rl.max_new_tokens / N
        elif rl.objective == "dapo":
            total += objective / sum(LENGTHS)
        else:
            total += objective / length / N
        start += length
    return -total


@pytest.mark.parametrize("case", ["plain", "corrected"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_match_pytorch(objective, case):
    rl = settings(objective, case)
    values, _ = inputs(objective)
    A = advantages(GOLDEN["reward_GS"], objective).ravel()
    np.testing.assert_allclose(A, GOLDEN[f"{objective}/advantage"], rtol=1e-12)
    s, gradient = loss_and_gradient(*packed(values, A, rl), rl)
    wanted = GOLDEN[f"{objective}/{case}/gradient"]
    np.testing.assert_allclose(s.loss, GOLDEN[f"{objective}/{case}/loss"], atol=1e-6)
    np.testing.assert_allclose(gradient[PACKED[0]], wanted, atol=3e-6 * np.abs(wanted).max())
    assert np.count_nonzero(gradient) <= wanted.size
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("case", ["plain", "corrected"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_match_the_formulas(objective, case):
    rl = settings(objective, case)
    if objective == "gspo":  # TIS per token is defined for GSPO-token only, not for a ratio per completion
        rl = dataclasses.replace(rl, tis_clip=None)
    values, A = inputs(objective)
    s, gradient = loss_and_gradient(*packed(values, A, rl), rl)
    theta, step = values["logprob"].astype(np.float64), 1e-6
    np.testing.assert_allclose(s.loss, transcription(theta, values, A, rl), atol=1e-6)
    slopes = []
    for t in range(len(theta)):
        nearby = [theta + sign * step * (np.arange(len(theta)) == t) for sign in (1, -1)]
        up, down = (transcription(x, values, A, rl) for x in nearby)
        slopes.append((up - down) / (2 * step))
    np.testing.assert_allclose(gradient[PACKED[0]], slopes, atol=1e-5 * np.abs(slopes).max())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logged_metrics(objective):
    rl = settings(objective, "corrected")
    values, A = inputs(objective)
    s, _ = loss_and_gradient(*packed(values, A, rl), rl)
    low, high = clip_range(rl)
    theta, old, sampler = (np.split(values[name], np.cumsum(LENGTHS)[:-1]) for name in NAMES[:3])
    ratios = [np.exp(a - b) for a, b in zip(theta, old, strict=True)]
    if objective == "gspo":
        ratios = [np.full(len(r), np.exp(np.log(r).mean())) for r in ratios]
    sampler_logprob_diff = values["old"] - values["sampler"]
    weights = np.exp(sampler_logprob_diff)
    off = values["reference"] - values["logprob"]
    wanted = ObjectiveSums(
        loss=s.loss,
        tokens=sum(LENGTHS),
        entropy=2.0 * sum(LENGTHS),
        kl=np.sum(np.exp(off) - off - 1),
        clipped_low=sum((r < 1 - low).sum() for r, a in zip(ratios, A, strict=True) if a < 0),
        clipped_high=sum((r > 1 + high).sum() for r, a in zip(ratios, A, strict=True) if a > 0),
        sampler_logprob_diff=np.abs(sampler_logprob_diff).sum(),
        sampler_logprob_diff_max=np.abs(sampler_logprob_diff).max(),
        tis_weight=np.minimum(weights, rl.tis_clip).sum(),
        tis_clipped=(weights > rl.tis_clip).sum(),
        off_policy_masked=sum(
            a < 0 and (p - q).mean() > rl.off_policy_mask_threshold for p, q, a in zip(sampler, theta, A, strict=True)
        ),
    )
    for name, got, value in zip(ObjectiveSums._fields, s, wanted, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-5, err_msg=name)
    assert min(s.clipped_low, s.clipped_high, s.tis_clipped, s.off_policy_masked) > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_microbatches_add_up_to_the_minibatch(objective):
    rl = settings(objective, "corrected")
    logprob, tokens = packed(*inputs(objective), rl)
    full, full_gradient = loss_and_gradient(logprob, tokens, rl)
    total, gradients = jax.tree.map(jnp.zeros_like, full), []
    for row in range(len(logprob)):
        microbatch = jax.tree.map(lambda x, row=row: x[row : row + 1], tokens)
        s, gradient = loss_and_gradient(logprob[row : row + 1], microbatch, rl)
        total = add_sums(total, s)
        gradients.append(gradient)
    for name, got, wanted in zip(ObjectiveSums._fields, total, full, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(jnp.concatenate(gradients), full_gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_does_not_depend_on_the_packing(objective):
    rl = settings(objective, "corrected")
    values, A = inputs(objective)
    other = packing(np.random.default_rng(1).permutation(N), B=5, T=70)
    s, gradient = loss_and_gradient(*packed(values, A, rl), rl)
    other_s, other_gradient = loss_and_gradient(*packed(values, A, rl, other), rl)
    np.testing.assert_allclose(other_s, s, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other_gradient[other[0]], gradient[PACKED[0]], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
def test_loss_is_the_same_on_a_mesh(objective):
    """With packed sequences and their tokens sharded over devices."""
    rl = settings(objective, "corrected")
    logprob, tokens = packed(*inputs(objective), rl)
    wanted, wanted_gradient = loss_and_gradient(logprob, tokens, rl)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=1, expert=2, context=2))
    logprob, tokens = jax.device_put((logprob, tokens), NamedSharding(mesh, BATCH_SPEC))
    s, gradient = loss_and_gradient(logprob, tokens, rl)
    np.testing.assert_allclose(s, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_advantage_has_no_policy_gradient(objective):
    rl = dataclasses.replace(settings(objective, "corrected"), kl_coef=0.0)
    s, gradient = loss_and_gradient(*packed(inputs(objective)[0], np.zeros(N), rl), rl)
    assert s.loss == 0
    assert (gradient == 0).all()
    assert s.clipped_low == s.clipped_high == s.off_policy_masked == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_on_policy_is_the_advantage(objective):
    rl = settings(objective, "corrected")
    values, A = inputs(objective)
    logprob, tokens = packed(dict.fromkeys(NAMES, values["logprob"]), A, rl)
    s, gradient = loss_and_gradient(logprob, tokens, rl)
    wanted = jnp.where(tokens.completion_BT < 0, 0, -tokens.weight_BT * tokens.advantage_BT)
    np.testing.assert_allclose(s.loss, wanted.sum(), atol=1e-6)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)
    assert s.tis_weight == s.tokens
    assert (
        s.sampler_logprob_diff == s.kl == s.clipped_low == s.clipped_high == s.tis_clipped == s.off_policy_masked == 0
    )


def test_no_kl_without_a_reference_policy():
    rl = dataclasses.replace(settings("grpo", "plain"), kl_coef=0.0)
    logprob, tokens = packed(*inputs("grpo"), rl)
    s, gradient = loss_and_gradient(logprob, tokens._replace(reference_logprob_BT=None), rl)
    wanted, wanted_gradient = loss_and_gradient(logprob, tokens, rl)
    assert (s.loss, s.kl) == (wanted.loss, 0)
    np.testing.assert_array_equal(gradient, wanted_gradient)


def test_without_old_logprobs_the_current_policy_is_the_old_one():
    rl = settings("gspo", "corrected")
    values, A = inputs("gspo")
    logprob, tokens = packed(values | {"old": values["logprob"]}, A, rl)
    s, gradient = loss_and_gradient(logprob, tokens._replace(old_logprob_BT=None), rl)
    wanted, wanted_gradient = loss_and_gradient(logprob, tokens, rl)
    np.testing.assert_allclose(s, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-6)


def test_token_weights_by_objective():
    lengths = np.array([3, 1, 1])
    per_completion = [1 / 9, 1 / 3, 1 / 3]
    wanted = {"grpo": per_completion, "dr_grpo": [1 / 30] * 3, "dapo": [1 / 5] * 3, "gspo": per_completion}
    for objective in OBJECTIVES:
        weights = token_weights(RLConfig(objective=objective, max_new_tokens=10), lengths)
        np.testing.assert_allclose(weights, wanted[objective])
    weight_BT = per_token(weights, np.array([[-1, 0, 0, 0, -1, 2], [1, -1, -1, -1, -1, -1]]))
    np.testing.assert_allclose(weight_BT, [[0, 1 / 9, 1 / 9, 1 / 9, 0, 1 / 3], [1 / 3, 0, 0, 0, 0, 0]], rtol=1e-6)


def test_advantages_are_group_relative():
    rewards = np.array([[0.0, 1.0, 1.0, 2.0], [0.1, 0.1, 0.1, 0.1], [5.0, 5.0, 5.0, 9.0]])
    for objective in OBJECTIVES:
        got = advantages(rewards, objective)
        np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-12)
        assert (got[1] == 0).all()
        np.testing.assert_array_equal(got[2:], advantages(rewards[2:], objective))
    np.testing.assert_allclose(advantages(rewards, "dr_grpo")[0], [-1, 0, 0, 1])
    np.testing.assert_allclose(advantages(rewards, "grpo")[[0, 2]].std(axis=1), 1, rtol=1e-5)
    assert [is_informative(group) for group in rewards] == [True, False, True]
    assert not is_informative([1.0, 1.0])


def test_equal_rewards_have_zero_advantage_despite_rounding():
    rewards = np.full((1, 3), 0.1)
    assert (rewards - rewards.mean() != 0).any()
    assert (advantages(rewards, "grpo") == 0).all()


def test_overlong_penalty_is_linear():
    lengths = [0, 80, 81, 90, 99, 100, 130]
    assert [overlong_penalty(n, 100, 20) for n in lengths] == [0, 0, -0.05, -0.5, -0.95, -1, -1]
    assert overlong_penalty(100, 100, 0) == 0


def test_clip_range_and_kl_coefficient_by_objective():
    published = [(0.2, 0.2), (0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4)]
    assert [clip_range(RLConfig(objective=o)) for o in OBJECTIVES] == published
    assert clip_range(RLConfig(objective="gspo", clip_ratio_high=0.1)) == (3e-4, 0.1)
    assert [kl_coefficient(RLConfig(objective=o, kl_coef=0.5)) for o in OBJECTIVES] == [0.5, 0.5, 0.0, 0.5]


def test_distillation_is_the_mean_kl_over_the_tokens():
    """In packed sequences, and in two microbatches; NaN at prompts and padding must not matter."""
    rl = RLConfig(objective="distillation", teacher="teacher")
    values, A = inputs("grpo")
    logprob, tokens = packed(values, A, rl)
    real, kl = tokens.completion_BT >= 0, np.random.default_rng(0).exponential(size=logprob.shape)
    kl = jnp.where(real, kl, jnp.nan)

    def loss(kl, logprob, tokens):
        s = distillation_sums(logprob, jnp.where(tokens.completion_BT < 0, jnp.nan, 2.0), kl, tokens)
        return s.loss, s

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))
    halves = [jax.tree.map(lambda x, rows=rows: x[rows], (kl, logprob, tokens)) for rows in (np.s_[:2], np.s_[2:])]
    ((_, first), first_gradient), ((_, second), second_gradient) = (found(*half) for half in halves)
    s, gradient = add_sums(first, second), jnp.concatenate([first_gradient, second_gradient])
    np.testing.assert_allclose(s.loss, np.mean(kl[real]), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.where(real, 1 / sum(LENGTHS), 0), rtol=1e-6)
    assert s.tokens == sum(LENGTHS)
    np.testing.assert_allclose(s.kl / s.tokens, s.loss, rtol=1e-5)
    np.testing.assert_allclose(s.entropy, 2.0 * sum(LENGTHS), rtol=1e-6)
    diff = np.abs(values["old"] - values["sampler"])
    np.testing.assert_allclose(
        (s.sampler_logprob_diff, s.sampler_logprob_diff_max), (diff.sum(), diff.max()), rtol=1e-5
    )
