"""Expert load: heat maps with a common color scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mla_moe.report.drawing import card, plot, svg
from mla_moe.report.stage_record import StageRecord

LAYERS_SHOWN = 8
COLUMNS_SHOWN = 400
"""Steps in a heat map: about one per pixel."""
_COLORS = "RdBu_r"


def load_over_time(stage: StageRecord) -> str:
    """The load of every expert over the steps, one heat map per layer."""
    if not stage.loads:
        return ""
    rows = [stage.loads[i] for i in _spread(len(stage.loads), COLUMNS_SHOWN)]
    steps, load_SLE = np.array([row["step"] for row in rows]), np.array([row["load"] for row in rows])
    left_edge = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    norm, cards = _norm(load_SLE), []
    for layer in _spread(load_SLE.shape[1], LAYERS_SHOWN):
        figure, axes = plot(width=2.3, height=1.9)
        edges = np.arange(load_SLE.shape[2] + 1) - 0.5
        axes.pcolormesh([left_edge, *steps], edges, load_SLE[:, layer].T, norm=norm, cmap=_COLORS, rasterized=True)
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylabel("expert")
        cards.append(card(_layer_name(stage.recipe.get("model"), layer), figure))
    return _maps("Expert load", norm, cards)


def load_before_and_after(stage: StageRecord) -> str:
    """The load of every expert in every layer, at the first and the last recorded step."""
    if len(stage.loads) < 2:
        return ""
    first, last, model = stage.loads[0], stage.loads[-1], stage.recipe.get("model")
    norm, cards = _norm(np.array([first["load"], last["load"]])), []
    for row in (first, last):
        load_LE = np.array(row["load"])
        figure, axes = plot(width=4.6, height=2.3, xlabel="expert")
        axes.pcolormesh(load_LE, norm=norm, cmap=_COLORS, rasterized=True)
        axes.grid(False)
        axes.invert_yaxis()
        shown = _spread(len(load_LE), LAYERS_SHOWN)
        axes.set_yticks(shown + 0.5, [_layer_name(model, layer) for layer in shown])
        experts = _spread(load_LE.shape[1], 5)
        axes.set_xticks(experts + 0.5, experts)
        cards.append(card(f"Step {row['step']:,}", figure))
    return _maps("Expert load, before and after", norm, cards, "pair")


def _maps(title: str, norm: TwoSlopeNorm, cards: Sequence[str], layout: str = "maps") -> str:
    scale = Figure(figsize=(4.2, 0.8), layout="constrained")
    bar = scale.colorbar(ScalarMappable(norm, _COLORS), scale.subplots(), orientation="horizontal", extend="max")
    bar.set_label("load relative to the mean of the layer")
    return (
        f'<figure class="wide"><figcaption>{title}</figcaption><div class="scale">{svg(scale)}</div>'
        f'<div class="{layout}">{"".join(cards)}</div></figure>'
    )


def _norm(load: np.ndarray) -> TwoSlopeNorm:
    return TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(np.percentile(load, 99.5))))


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` evenly spaced indices below `count`, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _layer_name(model: Mapping[str, Any] | None, index: int) -> str:
    """MoE layers come after the dense layers; the MTP module comes after the last layer. With `moe_shortcut` experts
    are those of a pair of layers, which has the number of its first."""
    if model and model.get("moe_shortcut"):
        index *= 2
    layer = index + (model["first_k_dense_replace"] if model else 0)
    return "MTP module" if model and layer >= model["num_hidden_layers"] else f"Layer {layer}"
