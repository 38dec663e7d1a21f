"""Text that a run left behind: the same questions answered before and after, and samples."""

import html
from collections.abc import Sequence
from typing import Any

from mla_moe.report.stage_record import Row, StageRecord

ANSWERS_SHOWN = 16
SAMPLES_SHOWN = 32


def before_and_after(stage: StageRecord) -> str:
    """Greedy answers to the same held-out questions at the first evaluated step and at the last, side by side."""
    answers: dict[int, dict[str, Row]] = {}
    for row in stage.samples:
        if row.get("kind") == "greedy":
            answers.setdefault(row["step"], {})[row["prompt"]] = row
    if len(answers) < 2:
        return ""
    first, last = min(answers), max(answers)
    pairs = [(row, answers[last][prompt]) for prompt, row in answers[first].items() if prompt in answers[last]]
    if not pairs:
        return ""
    before, after = ([_right(pair[i]) for pair in pairs] for i in (0, 1))
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    shown = f" The first {ANSWERS_SHOWN}:" if len(pairs) > ANSWERS_SHOWN else ""
    note = (
        f"Of {len(pairs):,} questions {sum(before):,} were answered right before and {sum(after):,} after: "
        f"{gained:,} became right, {lost:,} became wrong.{shown}"
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("Question", "Right answer", f"Before, step {first:,}", f"After, step {last:,}")
    )
    rows = "".join(
        f'<tr><td>{pre(old["prompt"])}</td><td data-name="Right answer">{pre(old["answer"])}</td>'
        f'<td data-name="Before">{_answer(old)}</td><td data-name="After">{_answer(new)}</td></tr>'
        for old, new in pairs[:ANSWERS_SHOWN]
    )
    return (
        f'<h3>Held-out questions, before and after</h3><p>{note}</p><table class="answers">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def samples_section(samples: Sequence[Row]) -> str:
    """The last of the texts that were sampled for their own sake."""
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
    """Text with all its white space. A browser drops one newline after the tag, so give it one to drop."""
    return f"<pre>\n{text(value)}</pre>"


def _answer(row: Row) -> str:
    """The mark says by its shape, its word and its colour whether the answer is right."""
    kind, mark = ("right", "&#10003; right") if _right(row) else ("wrong", "&#10007; wrong")
    form = "" if row.get("format", 1) == 1 else ", not in the form"
    note = f"<small>{row['length']:,} tokens{form}</small>"
    return f'<div class="mark"><b class="{kind}">{mark}</b> {note}</div>{pre(row["completion"])}'


def _right(row: Row) -> bool:
    return row["accuracy"] == 1
