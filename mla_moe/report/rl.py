"""What a stage of reinforcement learning has to show beside what every stage has."""

from collections.abc import Callable

import numpy as np

from mla_moe.report.drawing import ACCENT, BLUE, GREEN, VIOLET, Line, card, curves, draw_curves, plot
from mla_moe.report.experts import load_before_and_after
from mla_moe.report.headlines import Headline, problem_count
from mla_moe.report.stage_record import Row, StageRecord

_BINS = 8
"""Most groups of questions, by their length."""


def before_after(
    name: str, key: str, note: str | Callable[[float, float], str], form: str = ".1%"
) -> Callable[[StageRecord], Headline | None]:
    """The first and the last value of a metric, each written in the form `form`."""

    def headline(stage: StageRecord) -> Headline | None:
        values = stage.finite(key)
        if len(values) < 2:
            return None
        first, last = values[0], values[-1]
        begun = f"{first:{form}}".removesuffix("%")
        figure = f'<span class="from">{begun} &rarr;</span> {last:{form}}'
        return name, figure, note if isinstance(note, str) else note(first, last)

    return headline


def _growth(first: float, last: float) -> str:
    times = f", {last / first:.2f}&times; as long" if first else ""
    return f"tokens, sampled{times}"


def truncated(stage: StageRecord) -> Headline | None:
    share = stage.finite("truncated")
    return ("Cut off", f"{share.mean():.2%}", "of the answers, by the limit of tokens") if share.any() else None


def _judges(kind: str) -> tuple[str, str]:
    return f"verifier/{kind}", f"eval/verifier/{kind}"


HEADLINES: tuple[Callable[[StageRecord], Headline | None], ...] = (
    before_after("Right answers", "eval/accuracy", "held-out, greedy"),
    before_after("Right, opened", "eval/forced_accuracy", "with &lt;think&gt;; held-out, greedy"),
    before_after("Right form", "eval/format_rate", "held-out, greedy"),
    before_after("Answer length", "eval/response_length", _growth, ",.0f"),
    problem_count("Judges that raised", "answers counted 0", *_judges("raised")),
    problem_count("Judges that hung", "beyond their time; answers counted 0", *_judges("hung")),
    problem_count("Judges not finite", "NaN or infinite; answers counted 0", *_judges("not_finite")),
    problem_count("Judges that died", "with their process; answers counted 0", *_judges("died")),
    truncated,
    problem_count("Prompts too long", "questions passed over", "prompts_too_long"),
    problem_count("Groups left out", "whose answers were all right, or all wrong", "filtered_groups"),
)


def reward(stage: StageRecord) -> str:
    """The whole reward and the users' own parts of it."""
    parts = (Line(key, key, (ACCENT, GREEN, VIOLET)[number % 3]) for number, key in enumerate(stage.keys("reward/")))
    return draw_curves(stage, "Reward", (Line("reward", "reward"), *parts))


def pass_at_k(stage: StageRecord) -> str:
    """How many questions are right by one answer, by any of several, and by the commonest."""
    lines = [Line("eval/pass@1", "pass@1", GREEN, "o-")]
    for prefix, color, style in (("eval/pass@", BLUE, "^-"), ("eval/majority@", ACCENT, "s--")):
        several = (key for key in stage.keys(prefix) if not key.endswith("@1"))
        lines += [Line(key, key.removeprefix("eval/"), color, style) for key in several]
    return draw_curves(stage, "Right answers, held-out and sampled", tuple(lines), "share")


def kl_and_logprob_diff(stage: StageRecord) -> str:
    """Nothing where it is 0 throughout: a stage without a reference measures none."""
    return draw_curves(stage, "Divergence from the reference", (Line("kl"),)) if stage.finite("kl").any() else ""


def seconds(stage: StageRecord) -> str:
    """Seconds a step. The first also compiles: where that would hide the others it is cut off, and said."""
    (steps, total), (sampled_steps, sampling) = stage.series("step_seconds"), stage.series("sample_seconds")
    if not np.array_equal(steps, sampled_steps) or not np.isfinite(total).any():
        return ""
    figure, axes = plot()
    axes.stackplot(
        steps, sampling, total - sampling, labels=("sampling", "the rest"), colors=(BLUE, ACCENT), alpha=0.75
    )
    title, most = "Seconds a step", float(np.nanmax(total[1:], initial=0.0))
    if total[0] > 1.5 * most > 0:
        axes.set_ylim(0, 1.5 * most)
        title += f" (the first, which compiles: {total[0]:.3g})"
    axes.legend(fontsize=9)
    return card(title, figure)


def length_by_question(stage: StageRecord) -> str:
    """Mean tokens of an answer by the length of its question, at the first and at the last evaluated step."""
    rows = [row for row in stage.samples if row.get("kind") in ("greedy", "forced")]
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return ""
    figure, axes = plot(xlabel="characters of the question")
    axes.set_ylabel("tokens of the answer")
    edges = _edges([len(row["prompt"]) for row in rows])
    for step, color, when in ((steps[0], ACCENT, "before"), (steps[-1], BLUE, "after")):
        for kind, style, how in (("greedy", "o-", ""), ("forced", "^:", ", opened")):
            chosen = [row for row in rows if row["step"] == step and row["kind"] == kind]
            if chosen:
                axes.plot(*_means(chosen, edges), style, color=color, markersize=4.5, label=f"{when}{how}")
    axes.legend(fontsize=9)
    return card("Longer questions, longer answers?", figure)


def _edges(lengths: list[int]) -> np.ndarray:
    """Where groups of questions begin: each length a group, or where there are many, groups of about one size."""
    different = np.unique(lengths)
    if len(different) <= _BINS:
        return different
    return np.unique(np.quantile(lengths, np.linspace(0, 1, _BINS, endpoint=False)))


def _means(rows: list[Row], edges: np.ndarray) -> tuple[list[float], list[float]]:
    """Of each group that has questions, the mean length of question and of answer."""
    pairs = np.array([(len(row["prompt"]), row["length"]) for row in rows], np.float64)
    group = np.searchsorted(edges, pairs[:, 0], side="right")
    means = [pairs[group == number].mean(axis=0) for number in np.unique(group)]
    return [mean[0] for mean in means], [mean[1] for mean in means]


PANELS: tuple[Callable[[StageRecord], str], ...] = (
    reward,
    curves(
        "Right answers and right form",
        Line("accuracy", "right"),
        Line("format_rate", "form", GREEN),
        Line("eval/accuracy", "right, held-out", BLUE, "o"),
        Line("eval/forced_accuracy", "right, opened with <think>", ACCENT, "^"),
        Line("eval/format_rate", "form, held-out", GREEN, "s"),
        scale="share",
    ),
    curves(
        "Answer length in tokens",
        Line("response_length", "training"),
        Line("eval/response_length", "held-out, sampled", ACCENT, "o"),
        Line("eval/greedy_length", "held-out, greedy", GREEN, "s"),
    ),
    length_by_question,
    pass_at_k,
    kl_and_logprob_diff,
    curves("Entropy", Line("entropy")),
    curves("Share of tokens clipped", Line("clip_ratio/low", "below"), Line("clip_ratio/high", "above", ACCENT)),
    curves(
        "Sampler against trainer, log-probabilities",
        Line("sampler_logprob_diff", "mean"),
        Line("sampler_logprob_diff_max", "largest", ACCENT),
        scale="log",
    ),
    seconds,
    load_before_and_after,
)
