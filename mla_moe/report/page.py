"""The page: one section per stage, with headlines, panels and completions."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from mla_moe.checkpoint.bucket_run import location
from mla_moe.config import load_recipe, require
from mla_moe.config.errors import require_local
from mla_moe.report import panels, rl
from mla_moe.report.completions import before_and_after, pre, samples_section, text
from mla_moe.report.drawing import STYLE
from mla_moe.report.stage_record import Row, StageRecord
from mla_moe.training.metrics import read_rows, write_atomically
from mla_moe.training.run_directory import read_summary

STAGE_TITLES = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimization",
    "rl": "Reinforcement learning",
    "rejection": "Rejection sampling and fine-tuning",
}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory and return its path. Raises `ConfigError` if there is no run."""
    require_local("run_dir", run_dir)
    run_dir = Path(run_dir)
    require(run_dir.is_dir(), "run_dir", str(run_dir), "no such directory; give the directory of a run")
    rows, fix = read_rows(run_dir / "metrics.jsonl"), "has no metrics.jsonl with rows; train at least one step there"
    require(len(rows) > 0, "run_dir", location(run_dir), fix)
    path = run_dir / "recipe.json"
    recipe = dataclasses.asdict(load_recipe(path)) if path.exists() else {}
    loads, samples = read_rows(run_dir / "expert_load.jsonl"), read_rows(run_dir / "samples.jsonl")
    names = dict.fromkeys(row["stage"] for row in rows)
    shapes = {(row["stage"], len(row["load"]), len(row["load"][0])) for row in loads}
    fix, found = "has rows of several models; move the rows of others away", location(run_dir / "expert_load.jsonl")
    require(len(shapes) == len({stage for stage, *_ in shapes}), "run_dir", found, fix)
    stages = [StageRecord(name, recipe, *(_of(name, some) for some in (rows, loads, samples))) for name in names]
    with matplotlib.rc_context(STYLE):
        sections = map(stage_section, stages)
        body = summary_section(read_summary(run_dir)) + "".join(sections) + samples_section(samples)
    if recipe:
        body += f"<details><summary>Recipe</summary>{pre(json.dumps(recipe, indent=2, ensure_ascii=False))}</details>"
    page = PAGE.format(title=text(run_dir.resolve().name), body=body)
    write_atomically(run_dir / "report.html", page.encode("utf-8", "replace").decode())
    return run_dir / "report.html"


def stage_section(stage: StageRecord) -> str:
    found = filter(None, (headline(stage) for headline in (*rl.HEADLINES, *panels.HEADLINES)))
    box = "<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>"
    figures = "".join(box.format(*headline) for headline in found)
    title = text(STAGE_TITLES.get(stage.name, stage.name))
    plots = "".join(panel(stage) for panel in (*(rl.PANELS if stage.name == "rl" else ()), *panels.PANELS))
    parts = f'<h2>{title}</h2><dl class="headlines">{figures}</dl><div class="panels">{plots}</div>'
    return parts + before_and_after(stage)


def summary_section(summary: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in summary.items())
    return f'<table class="summary">{rows}</table>' if rows else ""


def _of(stage: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["stage"] == stage]


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1c2733; --soft: #64717f; --line: #dde3e9; --page: #fff; --box: #f5f7f9;
  --correct: #1b7a4b; --incorrect: #b3432b }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #dfe6ed; --soft: #94a1ae; --line: #303a45; --page: #14191f; --box: #1c232b;
  --correct: #5cc492; --incorrect: #f08a70 }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 1120px; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif }}
h1 {{ margin: 0 0 1rem; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere }}
h2 {{ margin: 2.5rem 0 1rem; font-size: 1.25rem }}
h3 {{ margin: 2rem 0 .5rem; font-size: .95rem }}
pre, .samples, .completions td {{ font: 13px/1.45 ui-monospace, monospace }}
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
.from {{ font-size: .95rem; color: var(--soft) }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.5rem 2rem;
  margin-top: 1.75rem }}
figure {{ margin: 0; min-width: 0 }}
figcaption {{ font-weight: 600; font-size: .95rem }}
svg {{ display: block; width: 100%; height: auto }}
svg text {{ font-family: system-ui, sans-serif !important }}
.wide {{ grid-column: 1 / -1 }}
.scale {{ max-width: 420px; margin: .25rem 0 .75rem }}
.maps {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(max(150px, 22%), 1fr)); gap: .75rem }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: .75rem 2rem }}
:is(.maps, .pair) figcaption {{ font-weight: normal; font-size: .85rem }}
.samples, .completions {{ width: 100%; table-layout: fixed }}
.completions th:nth-child(1) {{ width: 20% }} .completions th:nth-child(2) {{ width: 12% }}
.completions pre {{ max-height: 20rem; overflow-y: auto }}
.mark {{ font-family: system-ui, sans-serif }}
.correct {{ color: var(--correct) }} .incorrect {{ color: var(--incorrect) }}
.samples th:first-child {{ width: 8.5rem }}
details {{ margin-top: 2.5rem }}
summary {{ cursor: pointer; font-size: 1.25rem; font-weight: 600 }}
details pre {{ margin-top: .75rem; padding: 1rem; border-radius: 8px; background: var(--box) }}
@media (max-width: 600px) {{
  :is(.samples, .completions) thead {{ display: none }}
  :is(.samples, .completions) :is(tr, td) {{ display: block; padding-right: 0 }}
  .completions td:first-child pre {{ font-weight: 600 }} .completions td + td {{ border: 0; padding: 0 0 .4rem 1rem }}
  .completions td[data-name]::before {{
    content: attr(data-name); font: .8rem system-ui, sans-serif; color: var(--soft) }}
  .samples td + td {{ border: 0; padding-top: 0 }} .samples td:last-child {{ padding-left: 1rem }} }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""
