"""Headlines (the figures at the top of a stage's section) and panels (its plots) of every stage."""

import itertools
import math
from collections.abc import Callable

import numpy as np

from mla_moe.report.drawing import ACCENT, BLUE, GREEN, VIOLET, Line, Panel, curves, draw_curves
from mla_moe.report.experts import load_over_time
from mla_moe.report.stage_record import StageRecord
from mla_moe.training.console import duration, si
from mla_moe.training.metrics import seconds_in_steps

SOURCE_COLORS = (BLUE, GREEN, VIOLET, ACCENT, "#b8475a", "#8a7a2e", "#2f8f9e", "#7a7a7a")

Headline = Callable[[StageRecord], tuple[str, str, str] | None]
"""Name, figure and note; None if their data are missing."""


def final_loss(stage: StageRecord) -> tuple[str, str, str] | None:
    loss = stage.finite("loss")
    if stage.name == "rl" or not len(loss):  # the value of an RL objective is relative to the group, not a level
        return None
    return "Final loss", f"{loss[-1]:.3f}", f"mean of the last tenth {_last_tenth(loss):.3f}"


def bits_per_byte(stage: StageRecord) -> tuple[str, str, str] | None:
    bits, gzip = stage.finite("eval/bits_per_byte"), stage.finite("eval/gzip_bits_per_byte")
    note = "held-out text"
    if len(bits) and len(gzip):
        gain = 1 - bits[-1] / gzip[-1]
        verdict = f"beats gzip -9 by {gain:.1%}" if gain > 0 else "does not beat gzip -9"
        note = f"{note}; {verdict} ({gzip[-1]:.3f})"
    return ("Bits per byte", f"{bits[-1]:.3f}", note) if len(bits) else None


def throughput(stage: StageRecord) -> tuple[str, str, str] | None:
    speed, mfu = stage.finite("tokens_per_s"), stage.finite("mfu")
    note = f"median; {np.median(mfu):.1%} of peak FLOPs" if len(mfu) else "median"
    return ("Tokens per second", si(np.median(speed)), note) if len(speed) else None


def tokens_seen(stage: StageRecord) -> tuple[str, str, str] | None:
    training = stage.recipe.get("training")
    if stage.name != "pretrain" or training is None:
        return None
    steps = stage.rows[-1]["step"]
    return "Tokens", si(steps * training["batch_size"] * training["sequence_length"]), f"in {steps:,} steps"


def time_taken(stage: StageRecord) -> tuple[str, str, str] | None:
    seconds = seconds_in_steps(stage.rows, stage.recipe.get("training", {}).get("log_every", 1))
    return ("Wall time", duration(seconds), "in training steps") if seconds else None


def max_load_ratio(stage: StageRecord) -> tuple[str, str, str] | None:
    load, note = stage.finite("moe/load_max"), "most loaded expert over the mean, in the last tenth"
    return ("Max load ratio", f"{_last_tenth(load):.2f}&times;", note) if len(load) else None


def problem_count(name: str, note: str, *keys: str) -> Headline:
    """The sum of metrics that should be zero; shown only if it is not."""

    def headline(stage: StageRecord) -> tuple[str, str, str] | None:
        count = sum(stage.finite(key).sum() for key in keys)
        return (name, f"{count:,g}", note) if count else None

    return headline


HEADLINES: tuple[Headline, ...] = (
    final_loss,
    bits_per_byte,
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


def loss(stage: StageRecord) -> str:
    """Training and held-out loss. With several sources the training loss is that of a mixture, with which no held-out
    loss can be compared: beside it the evaluated loss of each source. An entry of `data.heldout` has the color of the
    entry of `data.train` with its name (`cpython:train` and `cpython:heldout`), else in its place if there are as many
    entries, else its own."""
    train, heldout = (stage.recipe.get("data", {}).get(split, ()) for split in ("train", "heldout"))
    if stage.name != "pretrain" or (len(train) < 2 and not stage.keys("eval/loss/")):
        return curves("Loss", Line("loss", "training"), Line("eval/loss", "held-out", ACCENT, "o"))(stage)
    title = "Training loss of the mixture of sources" if len(train) > 1 else "Training loss"
    training = draw_curves(stage, title, (Line("loss"),))
    if not stage.keys("eval/loss/"):
        return training + draw_curves(stage, "Held-out loss", (Line("eval/loss", color=ACCENT, style="o-"),))
    palette = itertools.cycle(SOURCE_COLORS)
    colors = {name: next(palette) for name in train}
    lines = [_source_line(name, "train", colors[name], "o-") for name in train if name not in heldout]
    for number, name in enumerate(heldout):
        same = [other for other in train if _without_split(other) == _without_split(name)]
        same = same or ([train[number]] if len(train) == len(heldout) else [])
        lines.append(_source_line(name, "held-out", colors[same[0]] if same else next(palette), "x--"))
    return training + draw_curves(stage, "Loss of each source, evaluated", tuple(lines))


def _source_line(name: str, split: str, color: str, style: str) -> Line:
    """The split before the name: matplotlib leaves labels that start with `_` out of the legend."""
    return Line(f"eval/loss/{name}", f"{split}: {name if len(name) < 32 else f'…{name[-30:]}'}", color, style)


def _without_split(name: str) -> str:
    return name.removesuffix(":train").removesuffix(":heldout")


def held_out(stage: StageRecord) -> str:
    if len(stage.finite("eval/bits_per_byte")) < 2:
        return ""
    model = Line("eval/bits_per_byte", "model", style="o-")
    return curves("Held-out bits per byte", model, Line("eval/gzip_bits_per_byte", "gzip -9", ACCENT, "--"))(stage)


PANELS: tuple[Panel, ...] = (
    loss,
    held_out,
    curves(
        "Preference accuracy",
        Line("rewards/accuracies", "training"),
        Line("eval/rewards/accuracies", "held-out", ACCENT, "o"),
        scale="fraction",
    ),
    curves(
        "Rewards of preference pairs",
        Line("rewards/chosen", "chosen", GREEN),
        Line("rewards/rejected", "rejected", ACCENT),
    ),
    curves("Learning rate", Line("lr", style="-")),
    curves("Tokens per second", Line("tokens_per_s")),
    curves("Gradient norm", Line("grad_norm")),
    curves("Max load ratio (max / mean tokens per expert)", Line("moe/load_max")),
    load_over_time,
)
