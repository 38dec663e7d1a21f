"""Headlines: the figures at the top of a stage's section."""

import math
from collections.abc import Callable

import numpy as np

from mla_moe.report.stage_record import StageRecord
from mla_moe.training.console import duration, si
from mla_moe.training.metrics import seconds_in_steps

Headline = tuple[str, str, str]
"""Name, figure and note."""


def final_loss(stage: StageRecord) -> Headline | None:
    loss = stage.finite("loss")
    if stage.name == "rl" or not len(loss):  # the value of an RL objective is relative to the group, not a level
        return None
    return "Final loss", f"{loss[-1]:.3f}", f"mean of the last tenth {_last_tenth(loss):.3f}"


def held_out(stage: StageRecord) -> Headline | None:
    bits, gzip = stage.finite("eval/bits_per_byte"), stage.finite("eval/gzip_bits_per_byte")
    note = "held-out text"
    if len(bits) and len(gzip):
        gain = 1 - bits[-1] / gzip[-1]
        verdict = f"beats gzip -9 by {gain:.1%}" if gain > 0 else "does not beat gzip -9"
        note = f"{note}; {verdict} ({gzip[-1]:.3f})"
    return ("Bits per byte", f"{bits[-1]:.3f}", note) if len(bits) else None


def throughput(stage: StageRecord) -> Headline | None:
    speed, mfu = stage.finite("tokens_per_s"), stage.finite("mfu")
    note = f"median; {np.median(mfu):.1%} of peak FLOPs" if len(mfu) else "median"
    return ("Tokens per second", si(np.median(speed)), note) if len(speed) else None


def tokens_seen(stage: StageRecord) -> Headline | None:
    training = stage.recipe.get("training")
    if stage.name != "pretrain" or training is None:
        return None
    steps = stage.rows[-1]["step"]
    return "Tokens", si(steps * training["batch_size"] * training["sequence_length"]), f"in {steps:,} steps"


def time_taken(stage: StageRecord) -> Headline | None:
    seconds = seconds_in_steps(stage.rows, stage.recipe.get("training", {}).get("log_every", 1))
    return ("Wall time", duration(seconds), "in training steps") if seconds else None


def max_load_ratio(stage: StageRecord) -> Headline | None:
    load = stage.finite("moe/load_max")
    return (
        ("Max load ratio", f"{_last_tenth(load):.2f}&times;", "most loaded expert over the mean, in the last tenth")
        if len(load)
        else None
    )


def problem_count(name: str, note: str, *keys: str) -> Callable[[StageRecord], Headline | None]:
    """The sum of metrics that should be zero; shown only if it is not."""

    def headline(stage: StageRecord) -> Headline | None:
        count = sum(stage.finite(key).sum() for key in keys)
        return (name, f"{count:,g}", note) if count else None

    return headline


HEADLINES: tuple[Callable[[StageRecord], Headline | None], ...] = (
    final_loss,
    held_out,
    throughput,
    tokens_seen,
    time_taken,
    max_load_ratio,
    problem_count("Dropped", "(token, expert) pairs dropped at capacity", "moe/dropped"),
    problem_count("Skipped steps", "updates not applied", "skipped"),
    problem_count("Not finite", "metrics that were NaN or infinite", "non_finite"),
)


def _last_tenth(values: np.ndarray) -> float:
    return float(values[-math.ceil(len(values) / 10) :].mean())
