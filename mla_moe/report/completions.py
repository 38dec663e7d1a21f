"""Text of a run: completions of the same prompts before and after RL, and samples."""

import html
from collections.abc import Sequence
from typing import Any

from mla_moe.report.stage_record import Row, StageRecord

COMPLETIONS_SHOWN = 16
SAMPLES_SHOWN = 32


def before_and_after(stage: StageRecord) -> str:
    """Greedy completions of the same held-out prompts at the first and at the last evaluation, side by side."""
    by_step: dict[int, dict[str, Row]] = {}
    for row in stage.samples:
        if row.get("kind") == "greedy":
            by_step.setdefault(row["step"], {})[row["prompt"]] = row
    if len(by_step) < 2:
        return ""
    first, last = min(by_step), max(by_step)
    pairs = [(row, by_step[last][prompt]) for prompt, row in by_step[first].items() if prompt in by_step[last]]
    if not pairs:
        return ""
    correct = [(_is_correct(old), _is_correct(new)) for old, new in pairs]
    before, after = map(sum, zip(*correct, strict=True))
    gained, lost = correct.count((False, True)), correct.count((True, False))
    shown = f" The first {COMPLETIONS_SHOWN}:" if len(pairs) > COMPLETIONS_SHOWN else ""
    note = (
        f"Of {len(pairs):,} prompts, {before:,} were answered correctly before and {after:,} after: "
        f"{gained:,} became correct, {lost:,} became incorrect.{shown}"
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("Prompt", "Correct answer", f"Before, step {first:,}", f"After, step {last:,}")
    )
    rows = "".join(
        f'<tr><td>{pre(old["prompt"])}</td><td data-name="Correct answer">{pre(old["answer"])}</td>'
        f'<td data-name="Before">{_completion(old)}</td><td data-name="After">{_completion(new)}</td></tr>'
        for old, new in pairs[:COMPLETIONS_SHOWN]
    )
    return (
        f'<h3>Held-out prompts, before and after</h3><p>{note}</p><table class="completions">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def samples_section(samples: Sequence[Row]) -> str:
    """The latest text samples."""
    samples = [sample for sample in samples if "kind" not in sample]
    if not samples:
        return ""
    rows = "".join(
        f"<tr><td>{text(s['stage'])} {s['step']:,}</td><td>{pre(s['prompt'])}</td><td>{pre(s['completion'])}</td></tr>"
        for s in samples[-SAMPLES_SHOWN:]
    )
    note = f"<p>The last {SAMPLES_SHOWN} of {len(samples):,}.</p>" if len(samples) > SAMPLES_SHOWN else ""
    head = "<tr><th>Step</th><th>Prompt</th><th>Completion</th></tr>"
    return f'<h2>Samples</h2>{note}<table class="samples"><thead>{head}</thead><tbody>{rows}</tbody></table>'


def text(value: Any) -> str:
    return html.escape(str(value))


def pre(value: str) -> str:
    """Text with its white space. Browsers drop the first newline after the tag, hence the extra one."""
    return f"<pre>\n{text(value)}</pre>"


def _completion(row: Row) -> str:
    """Correctness is marked by a symbol, a word and a color."""
    kind, mark = ("correct", "&#10003; correct") if _is_correct(row) else ("incorrect", "&#10007; incorrect")
    format_note = "" if row.get("format", 1) == 1 else ", wrong format"
    note = f"<small>{row['length']:,} tokens{format_note}</small>"
    return f'<div class="mark"><b class="{kind}">{mark}</b> {note}</div>{pre(row["completion"])}'


def _is_correct(row: Row) -> bool:
    return row["accuracy"] == 1
