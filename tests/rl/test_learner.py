import numpy as np

from mla_moe.rl.learner import learner_metrics
from mla_moe.rl.objectives import ObjectiveSums


def update(tokens, load, **values):
    sums = {name: np.float32(values.get(name, 0)) for name in ObjectiveSums._fields} | {"tokens": np.int32(tokens)}
    other = {"grad_norm": np.float32(values["loss"] + 1), "skipped": values["loss"] > 3, "dropped": np.int32(2)}
    return {"sums": ObjectiveSums(**sums), "load_LE": np.array(load, np.int32)} | other


def test_metrics_of_a_step_combine_its_updates():
    first = {"kl": 5, "sampler_logprob_diff_max": 0.5, "clipped_low": 1, "tis_clipped": 2, "off_policy_masked": 3}
    second = {"kl": 7, "sampler_logprob_diff_max": 0.25, "clipped_high": 4, "tis_weight": 20, "off_policy_masked": 1}
    updates = [update(10, [[4, 0], [1, 3]], loss=1, **first), update(30, [[0, 4], [1, 3]], loss=4, **second)]
    metrics = learner_metrics(updates)
    np.testing.assert_array_equal(metrics.pop("load_LE"), [[4, 4], [2, 6]])
    assert metrics == {
        "loss": 2.5,
        "grad_norm": 3.5,
        "skipped": 1,
        "kl": 12 / 40,
        "entropy": 0,
        "clip_ratio/low": 1 / 40,
        "clip_ratio/high": 4 / 40,
        "sampler_logprob_diff": 0,
        "sampler_logprob_diff_max": 0.5,
        "tis_weight": 20 / 40,
        "tis_clipped": 2 / 40,
        "off_policy_masked": 4,
        "moe/load_max": 1.5,
        "moe/dropped": 4,
    }


def test_metrics_without_tokens_or_experts():
    empty = update(0, np.zeros((0, 0)), loss=0)
    metrics = learner_metrics([empty, empty])
    assert metrics["kl"] == metrics["clip_ratio/low"] == 0
    assert metrics["load_LE"].size == 0
    assert "moe/load_max" not in metrics
