"""A run directory → `report.html`: one page that needs no network, no scripts and no other file.

A panel and a headline are each a function of a `Stage` that returns nothing where its data are missing, so a page shows
what a run has. To show more, write such a function and add it to `PANELS` or `HEADLINES`.
"""

import dataclasses
import html
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mla_moe.config import ConfigError
from mla_moe.training.console import duration, si
from mla_moe.training.metrics import read_rows

STAGE_TITLES = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "rl": "Reinforcement learning",
    "rejection": "Fine-tuning on the best answers",
}
SAMPLES_SHOWN = 32
LAYERS_SHOWN = 8
COLUMNS_SHOWN = 400
"""Points in time of a heat map: about what its pixels can show."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's directory and return its path. Raises `ConfigError` if there is no run."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ConfigError("run_dir", str(run_dir), "no such directory; give the directory of a run")
    if not (rows := read_rows(run_dir / "metrics.jsonl")):
        raise ConfigError("run_dir", str(run_dir), "has no metrics.jsonl with rows; train at least one step there")
    recipe, loads = _read_json(run_dir / "recipe.json"), read_rows(run_dir / "expert_load.jsonl")
    names = list(dict.fromkeys(row["stage"] for row in rows))
    stages = [Stage(name, recipe, _of(name, rows), _of(name, loads)) for name in names]
    with matplotlib.rc_context(PLOT_STYLE):
        sections = [
            summary_section(_read_json(run_dir / "summary.json")),
            *map(stage_section, stages),
            samples_section(read_rows(run_dir / "samples.jsonl")),
            recipe_section(recipe),
        ]
    path, temporary = run_dir / "report.html", run_dir / "report.html.tmp"
    temporary.write_text(PAGE.format(title=html.escape(run_dir.resolve().name), body="".join(sections)), "utf-8")
    os.replace(temporary, path)
    return path


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage of a run left behind."""

    name: str
    recipe: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    loads: Sequence[Mapping[str, Any]]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric where it was written; a null is NaN, which leaves a gap in a curve."""
        pairs = [(row["step"], row[key]) for row in self.rows if key in row]
        steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
        return steps, values

    def finite(self, key: str) -> np.ndarray:
        values = self.series(key)[1]
        return values[np.isfinite(values)]


Headline = tuple[str, str, str]
"""Name, figure, and what puts it into proportion."""


def final_loss(stage: Stage) -> Headline | None:
    loss = stage.finite("loss")
    return ("Final loss", f"{loss[-1]:.3f}", f"mean of the last tenth {_last_tenth(loss):.3f}") if len(loss) else None


def held_out(stage: Stage) -> Headline | None:
    bits, gzip = stage.finite("eval/bits_per_byte"), stage.finite("eval/gzip_bits_per_byte")
    note = "held-out text"
    if len(bits) and len(gzip):
        gain = 1 - bits[-1] / gzip[-1]
        verdict = f"beats gzip -9 by {gain:.1%}" if gain > 0 else "does not beat gzip -9"
        note = f"{note}; {verdict} ({gzip[-1]:.3f})"
    return ("Bits per byte", f"{bits[-1]:.3f}", note) if len(bits) else None


def throughput(stage: Stage) -> Headline | None:
    speed, mfu = stage.finite("tokens_per_s"), stage.finite("mfu")
    note = f"median; {np.median(mfu):.1%} of peak FLOPs" if len(mfu) else "median"
    return ("Tokens per second", si(np.median(speed)), note) if len(speed) else None


def tokens_seen(stage: Stage) -> Headline | None:
    training = stage.recipe.get("training")
    if stage.name != "pretrain" or training is None:
        return None
    steps = stage.rows[-1]["step"]
    return "Tokens", si(steps * training["batch_size"] * training["sequence_length"]), f"in {steps:,} steps"


def time_taken(stage: Stage) -> Headline | None:
    """Each row's seconds a step, times the steps since the row before: right also where not every step has a row."""
    steps, seconds = stage.series("step_seconds")
    total = np.nansum(np.diff(steps, prepend=0) * seconds)
    return ("Wall time", duration(total), "in training steps") if len(steps) else None


def busiest_expert(stage: Stage) -> Headline | None:
    load = stage.finite("moe/load_max")
    return (
        ("Busiest expert", f"{_last_tenth(load):.2f}&times;", "the mean load, over the last tenth")
        if len(load)
        else None
    )


def trouble(name: str, key: str, note: str) -> Callable[[Stage], Headline | None]:
    """A count that should be zero, and is only shown when it is not."""

    def headline(stage: Stage) -> Headline | None:
        count = stage.finite(key).sum()
        return (name, f"{count:,g}", note) if count else None

    return headline


HEADLINES: tuple[Callable[[Stage], Headline | None], ...] = (
    final_loss,
    held_out,
    throughput,
    tokens_seen,
    time_taken,
    busiest_expert,
    trouble("Dropped", "moe/dropped", "tokens an expert had no room for"),
    trouble("Skipped steps", "skipped", "updates not applied"),
    trouble("Not finite", "non_finite", "metrics that were NaN or infinite"),
)


def curve(title: str, key: str, smooth: bool = True) -> Callable[[Stage], str]:
    """A panel with one metric over the steps: faint as it was written under its running mean, or just as written."""

    def panel(stage: Stage) -> str:
        steps, values = stage.series(key)
        if not np.isfinite(values).any():
            return ""
        figure, axes = _plot()
        if smooth:
            _draw_smoothed(axes, steps, values)
        else:
            axes.plot(steps, values, color=BLUE)
        return _card(title, figure)

    return panel


def loss_panel(stage: Stage) -> str:
    steps, values = stage.series("loss")
    if not np.isfinite(values).any():
        return ""
    figure, axes = _plot()
    _draw_smoothed(axes, steps, values, "training")
    if len(stage.finite("eval/loss")):
        axes.plot(*stage.series("eval/loss"), "o", color=ACCENT, markersize=4, label="held-out")
    axes.legend(loc="upper right")
    return _card("Loss", figure)


def held_out_panel(stage: Stage) -> str:
    steps, bits = stage.series("eval/bits_per_byte")
    if np.isfinite(bits).sum() < 2:
        return ""
    figure, axes = _plot()
    axes.plot(steps, bits, "o-", color=BLUE, markersize=4, label="model")
    axes.plot(*stage.series("eval/gzip_bits_per_byte"), "--", color=ACCENT, label="gzip -9")
    axes.legend()
    return _card("Held-out bits per byte", figure)


def expert_load_panel(stage: Stage) -> str:
    """Heat maps of every expert's load over the steps, one a layer, under one scale of colours."""
    if not stage.loads:
        return ""
    rows = [stage.loads[i] for i in _spread(len(stage.loads), COLUMNS_SHOWN)]
    steps, load_SLE = np.array([row["step"] for row in rows]), np.array([row["load"] for row in rows])
    left_edge = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(np.percentile(load_SLE, 99.5))))
    cards = []
    for layer in _spread(load_SLE.shape[1], LAYERS_SHOWN):
        figure, axes = _plot(width=2.3, height=1.9)
        edges = np.arange(load_SLE.shape[2] + 1) - 0.5
        image = load_SLE[:, layer].T
        axes.pcolormesh([left_edge, *steps], edges, image, norm=norm, cmap="RdBu_r", rasterized=True)
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylabel("expert")
        cards.append(_card(_layer_name(stage.recipe.get("model"), layer), figure))
    scale = Figure(figsize=(4.2, 0.8), layout="constrained")
    bar = scale.colorbar(ScalarMappable(norm, "RdBu_r"), scale.subplots(), orientation="horizontal", extend="max")
    bar.set_label("load relative to the mean of the layer")
    return (
        f'<figure class="wide"><figcaption>Expert load</figcaption><div class="scale">{_svg(scale)}</div>'
        f'<div class="maps">{"".join(cards)}</div></figure>'
    )


PANELS: tuple[Callable[[Stage], str], ...] = (
    loss_panel,
    held_out_panel,
    curve("Learning rate", "lr", smooth=False),
    curve("Tokens per second", "tokens_per_s"),
    curve("Gradient norm", "grad_norm"),
    curve("Busiest expert, relative to the mean", "moe/load_max"),
    expert_load_panel,
)


def stage_section(stage: Stage) -> str:
    headlines = filter(None, (headline(stage) for headline in HEADLINES))
    figures = "".join(
        f"<div><dt>{name}</dt><dd>{figure}<small>{note}</small></dd></div>" for name, figure, note in headlines
    )
    title = html.escape(STAGE_TITLES.get(stage.name, stage.name))
    panels = "".join(panel(stage) for panel in PANELS)
    return f'<h2>{title}</h2><dl class="headlines">{figures}</dl><div class="panels">{panels}</div>'


def summary_section(summary: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in summary.items())
    return f'<table class="summary">{rows}</table>' if rows else ""


def samples_section(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    rows = "".join(
        f"<tr><td>{_text(s['stage'])} {s['step']:,}</td>"
        f"<td>{_pre(s['prompt'])}</td><td>{_pre(s['completion'])}</td></tr>"
        for s in samples[-SAMPLES_SHOWN:]
    )
    note = f"<p>The last {SAMPLES_SHOWN} of {len(samples):,}.</p>" if len(samples) > SAMPLES_SHOWN else ""
    head = "<tr><th>Step</th><th>Prompt</th><th>Completion</th></tr>"
    return f'<h2>Samples</h2>{note}<table class="samples"><thead>{head}</thead><tbody>{rows}</tbody></table>'


def recipe_section(recipe: Mapping[str, Any]) -> str:
    text = json.dumps(recipe, indent=2, ensure_ascii=False)
    return f"<details><summary>Recipe</summary>{_pre(text)}</details>" if recipe else ""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _pre(text: str) -> str:
    """Text with all its white space. A browser drops one newline after the tag, so give it one to drop."""
    return f"<pre>\n{_text(text)}</pre>"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _of(stage: str, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["stage"] == stage]


def _last_tenth(values: np.ndarray) -> float:
    return float(values[-math.ceil(len(values) / 10) :].mean())


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` indices below `count`, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _layer_name(model: Mapping[str, Any] | None, index: int) -> str:
    """Experts begin after the dense layers; the multi-token-prediction module comes after the last layer."""
    layer = index + (model["first_k_dense_replace"] if model else 0)
    return "Prediction module" if model and layer >= model["num_hidden_layers"] else f"Layer {layer}"


def _plot(width: float = 4.6, height: float = 2.5) -> tuple[Figure, Axes]:
    """An empty plot over steps, small enough that its text can be read where the page is as narrow as a phone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: si(value).replace(" ", "") if abs(value) >= 10_000 else f"{value:g}")
    return figure, axes


def _draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str = "") -> None:
    """Values as they are (as pixels when there are many, to keep the page small), and their running mean."""
    axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.8, rasterized=len(steps) > 2000)
    kernel = np.ones(len(values) // 40 * 2 + 1)
    counts = np.convolve(np.isfinite(values), kernel, "same")
    sums = np.convolve(np.nan_to_num(values), kernel, "same")
    mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5)
    axes.plot(steps, mean, color=BLUE, label=label, marker="." if len(steps) < 10 else "")


def _card(title: str, figure: Figure) -> str:
    return f"<figure><figcaption>{title}</figcaption>{_svg(figure)}</figure>"


def _svg(figure: Figure) -> str:
    """The figure as an element whose ink follows the page's text colour, without the parts that name other sites."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata=dict.fromkeys(NO_METADATA))
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


INK, BLUE, ACCENT = "#010203", "#3b82c4", "#e07b39"
NO_METADATA = ("Creator", "Date", "Format", "Type")
PLOT_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "legend.frameon": False, "lines.linewidth": 1.6,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.12, "grid.linewidth": 0.6,
}  # fmt: skip
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1c2733; --soft: #64717f; --line: #dde3e9; --page: #fff; --box: #f5f7f9 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #dfe6ed; --soft: #94a1ae; --line: #303a45; --page: #14191f; --box: #1c232b }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 1120px; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif }}
h1 {{ margin: 0 0 1rem; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere }}
h2 {{ margin: 2.5rem 0 1rem; font-size: 1.25rem }}
pre, .samples {{ font: 13px/1.45 ui-monospace, monospace }}
pre {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }}
small, .samples td:first-child, th {{ color: var(--soft); font-weight: normal }}
table {{ border-collapse: collapse }}
th, td {{ padding: .4rem 1.2rem .4rem 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: anywhere }}
th {{ overflow-wrap: break-word }}
.headlines {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: .75rem; margin: 0 }}
.headlines div {{ padding: .8rem .9rem; border-radius: 8px; background: var(--box) }}
dt {{ font-size: .85rem; color: var(--soft) }}
dd {{ margin: 0; font-size: 1.5rem; line-height: 1.35; font-variant-numeric: tabular-nums }}
dd small {{ display: block; font-size: .8rem }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.5rem 2rem;
  margin-top: 1.75rem }}
figure {{ margin: 0; min-width: 0 }}
figcaption {{ font-weight: 600; font-size: .95rem }}
svg {{ display: block; width: 100%; height: auto }}
svg text {{ font-family: system-ui, sans-serif !important }}
.wide {{ grid-column: 1 / -1 }}
.scale {{ max-width: 420px; margin: .25rem 0 .75rem }}
.maps {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(max(150px, 22%), 1fr)); gap: .75rem }}
.maps figcaption {{ font-weight: normal; font-size: .85rem }}
.samples {{ width: 100%; table-layout: fixed }}
.samples th:first-child {{ width: 8.5rem }}
details {{ margin-top: 2.5rem }}
summary {{ cursor: pointer; font-size: 1.25rem; font-weight: 600 }}
details pre {{ margin-top: .75rem; padding: 1rem; border-radius: 8px; background: var(--box) }}
@media (max-width: 600px) {{
  .samples thead {{ display: none }}
  .samples tr, .samples td {{ display: block; padding-right: 0 }}
  .samples td + td {{ border: 0; padding-top: 0 }} .samples td:last-child {{ padding-left: 1rem }} }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""
