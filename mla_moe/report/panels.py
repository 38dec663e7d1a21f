"""Panels: the plots of every stage."""

from collections.abc import Callable

from mla_moe.report.drawing import ACCENT, Line, curves
from mla_moe.report.experts import load_over_time
from mla_moe.report.stage_record import StageRecord


def held_out(stage: StageRecord) -> str:
    if len(stage.finite("eval/bits_per_byte")) < 2:
        return ""
    model = Line("eval/bits_per_byte", "model", style="o-")
    return curves("Held-out bits per byte", model, Line("eval/gzip_bits_per_byte", "gzip -9", ACCENT, "--"))(stage)


PANELS: tuple[Callable[[StageRecord], str], ...] = (
    curves("Loss", Line("loss", "training"), Line("eval/loss", "held-out", ACCENT, "o")),
    held_out,
    curves("Learning rate", Line("lr", style="-")),
    curves("Tokens per second", Line("tokens_per_s")),
    curves("Gradient norm", Line("grad_norm")),
    curves("Max load ratio (max / mean tokens per expert)", Line("moe/load_max")),
    load_over_time,
)
