"""Headlines and panels of the RL stage."""

import numpy as np

from mla_moe.report.drawing import ACCENT, BLUE, GREEN, VIOLET, Line, Panel, card, curves, draw_curves, plot
from mla_moe.report.experts import load_before_and_after
from mla_moe.report.panels import Headline, problem_count
from mla_moe.report.stage_record import Row, StageRecord

_BINS = 8
"""Maximum number of bins of prompts, by length, given by their left edges."""


def before_after(name: str, key: str, note: str, spec: str = ".1%") -> Headline:
    """The first and the last value of a metric, formatted with `spec`. `{growth}` in the note is their ratio."""

    def headline(stage: StageRecord) -> tuple[str, str, str] | None:
        values = stage.finite(key)
        if len(values) < 2:
            return None
        first, last = values[0], values[-1]
        before = f"{first:{spec}}".removesuffix("%")
        figure = f'<span class="from">{before} &rarr;</span> {last:{spec}}'
        return name, figure, note.format(growth=f", {last / first:.2f}&times; as long" if first else "")

    return headline


def truncated(stage: StageRecord) -> tuple[str, str, str] | None:
    fraction = stage.finite("truncated")
    return ("Truncated", f"{fraction.mean():.2%}", "of the completions, at max_new_tokens") if fraction.any() else None


def _verifier(what: str, note: str, key: str) -> Headline:
    return problem_count(f"Verifier {what}", note, f"verifier/{key}", f"eval/verifier/{key}")


HEADLINES: tuple[Headline, ...] = (
    before_after("Accuracy", "eval/accuracy", "held-out, greedy"),
    before_after("Accuracy, prefilled", "eval/forced_accuracy", "with &lt;think&gt;; held-out, greedy"),
    before_after("Format rate", "eval/format_rate", "held-out, greedy"),
    before_after("Completion length", "eval/response_length", "tokens, sampled{growth}", ",.0f"),
    _verifier("raised", "completions with reward 0", "raised"),
    _verifier("timed out", "completions with reward 0", "hung"),
    _verifier("not finite", "or no number, or too large; reward 0", "not_finite"),
    _verifier("died", "with its process; reward 0", "died"),
    truncated,
    problem_count("Prompts too long", "skipped", "prompts_too_long"),
    problem_count("Filtered groups", "all completions correct, or all incorrect", "filtered_groups"),
)


def reward(stage: StageRecord) -> str:
    """The total reward and the user's own components."""
    parts = (Line(key, key, (ACCENT, GREEN, VIOLET)[number % 3]) for number, key in enumerate(stage.keys("reward/")))
    return draw_curves(stage, "Reward", (Line("reward", "reward"), *parts))


def pass_at_k(stage: StageRecord) -> str:
    """Accuracy of one completion (pass@1), of any of k (pass@k), and of the majority of k (majority@k)."""
    lines = [Line("eval/pass@1", "pass@1", GREEN, "o-")]
    for prefix, color, style in (("eval/pass@", BLUE, "^-"), ("eval/majority@", ACCENT, "s--")):
        several = (key for key in stage.keys(prefix) if not key.endswith("@1"))
        lines += [Line(key, key.removeprefix("eval/"), color, style) for key in several]
    return draw_curves(stage, "Accuracy, held-out and sampled", tuple(lines), "fraction")


def kl_from_reference(stage: StageRecord) -> str:
    """Or from the teacher. Empty if it is 0 throughout: without a reference policy it is not measured."""
    if len(stage.finite("distillation/reverse_kl")):
        return draw_curves(stage, "KL from the teacher", (Line("distillation/reverse_kl"),))
    return draw_curves(stage, "KL from the reference policy", (Line("kl"),)) if stage.finite("kl").any() else ""


def seconds(stage: StageRecord) -> str:
    """Seconds per step. If the first, which includes compilation, would dwarf the others, it is only in the title."""
    (steps, total), (sampled_steps, sampling) = stage.series("step_seconds"), stage.series("sample_seconds")
    if not np.array_equal(steps, sampled_steps) or not np.isfinite(total).any():
        return ""
    figure, axes = plot()
    axes.stackplot(steps, sampling, total - sampling, labels=("sampling", "other"), colors=(BLUE, ACCENT), alpha=0.75)
    title, most = "Seconds per step", float(np.nanmax(total[1:], initial=0.0))
    if total[0] > 1.5 * most > 0:
        axes.set_ylim(0, 1.5 * most)
        title += f" (the first, with compilation: {total[0]:.3g})"
    axes.legend(fontsize=9)
    return card(title, figure)


def length_by_prompt(stage: StageRecord) -> str:
    """Mean completion length by prompt length, at the first and at the last evaluation."""
    rows = [row for row in stage.samples if row.get("kind") in ("greedy", "forced")]
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return ""
    figure, axes = plot(xlabel="characters of the prompt")
    axes.set_ylabel("tokens of the completion")
    lengths = [len(row["prompt"]) for row in rows]
    edges = np.unique(lengths)
    if len(edges) > _BINS:  # bins of about equal size instead of one per length
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _BINS, endpoint=False)))
    for step, color, when in ((steps[0], ACCENT, "before"), (steps[-1], BLUE, "after")):
        for kind, style, note in (("greedy", "o-", ""), ("forced", "^:", ", prefilled")):
            chosen = [row for row in rows if row["step"] == step and row["kind"] == kind]
            if chosen:
                axes.plot(*_means(chosen, edges), style, color=color, markersize=4.5, label=f"{when}{note}")
    axes.legend(fontsize=9)
    return card("Completion length by prompt length", figure)


def _means(rows: list[Row], edges: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean prompt length and mean completion length of each non-empty bin."""
    pairs = np.array([(len(row["prompt"]), row["length"]) for row in rows], np.float64)
    group = np.searchsorted(edges, pairs[:, 0], side="right")
    means = [pairs[group == number].mean(axis=0) for number in np.unique(group)]
    return [mean[0] for mean in means], [mean[1] for mean in means]


PANELS: tuple[Panel, ...] = (
    reward,
    curves(
        "Accuracy and format rate", Line("accuracy", "accuracy"), Line("format_rate", "format", GREEN),
        Line("eval/accuracy", "accuracy, held-out", BLUE, "o"),
        Line("eval/forced_accuracy", "accuracy, prefilled with <think>", ACCENT, "^"),
        Line("eval/format_rate", "format, held-out", GREEN, "s"), scale="fraction",
    ),
    curves(
        "Completion length in tokens", Line("response_length", "training"),
        Line("eval/response_length", "held-out, sampled", ACCENT, "o"),
        Line("eval/greedy_length", "held-out, greedy", GREEN, "s"),
    ),
    length_by_prompt,
    pass_at_k,
    kl_from_reference,
    curves("Entropy", Line("entropy")),
    curves("Fraction of tokens clipped", Line("clip_ratio/low", "below"), Line("clip_ratio/high", "above", ACCENT)),
    curves(
        "Difference of log-probabilities, sampler and trainer", Line("sampler_logprob_diff", "mean"),
        Line("sampler_logprob_diff_max", "largest", ACCENT), scale="log",
    ),
    seconds,
    load_before_and_after,
)  # fmt: skip
