"""Console output of a run: tables, single lines, and progress as a bar or, in a log file, as lines."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from time import monotonic

import rich.console
import rich.progress
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from mla_moe.config.errors import visible

WIDTH = 80
"""Columns of the narrowest supported terminal."""
LOG_SECONDS = 10.0
"""Minimum time between two lines of progress in a log."""


class Console:
    """Standard output of a run. Every process may use one; only an enabled one prints."""

    def __init__(self, enabled: bool):
        self._rich = rich.console.Console(quiet=not enabled, highlight=False)

    def print(self, message: str) -> None:
        """Print a line, above the progress bar if there is one. It is not truncated, and brackets are not markup."""
        self._rich.print(visible(message), markup=False, soft_wrap=True)

    def startup_table(self, title: str, rows: Sequence[tuple[str, str]], justify: JustifyMethod = "left") -> None:
        """Print the settings of a stage: names and values under a title."""
        bold = Text(title, style="bold")
        table = Table(title=bold, title_justify="left", box=None, show_header=False, padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify=justify, overflow="fold")
        for name, value in rows:
            table.add_row(Text(visible(name)), Text(visible(value)))
        self._rich.print(table)

    def result_table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print results: names, and values aligned at the right."""
        self.startup_table(title, rows, justify="right")

    def progress(self, stage: str, total: int, start: int = 0) -> "Progress":
        """Progress of a stage of `total` steps, `start` of which are done already. Use it as a context manager."""
        return Progress(self._rich, stage, total, start)


class Progress(contextlib.ExitStack[None]):
    """A progress bar on a terminal; elsewhere, and in CI, a line every `LOG_SECONDS` and for the last step."""

    def __init__(self, console: rich.console.Console, stage: str, total: int, start: int):
        super().__init__()
        self._console, self._total, self._start_time = console, total, monotonic()
        self._first: tuple[int, float] | None = None
        self._last_line = -LOG_SECONDS
        self._bar = None
        if console.is_interactive and not console.quiet and not os.environ.get("CI"):
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn(stage, markup=False),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.description}", markup=False),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("compiling", total=total, completed=start)
            self.enter_context(self._bar)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Display that `step` steps are done, with the metrics of the last one, as in `metrics.jsonl`."""
        now = monotonic()
        left = self._seconds_left(step, now)
        if self._bar is not None:
            text = bar_text(step, self._total, metrics, now - self._start_time, left)
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._last_line >= LOG_SECONDS or step == self._total:
            self._last_line = now
            self._console.print(log_line(step, self._total, metrics, left), markup=False, soft_wrap=True)

    def status(self, text: str) -> None:
        """Display progress within a long step, on a bar only."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Estimated from the steps after the first update, because the first step also compiles; None until then."""
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        return (now - first_time) / (step - first_step) * (self._total - step) if step > first_step else None


def log_line(step: int, total: int, metrics: Mapping[str, float], left: float | None) -> str:
    """`step   120/400  loss 3.214  lr 2.2e-04  12.3k tok/s  load 1.31  left 1:05`, in at most `WIDTH` columns."""
    ending = [] if left is None else [f"left {duration(left)}"]
    return _fit(f"step {step:{max(5, len(str(total)))}d}/{total}", metrics, ending, WIDTH)


def bar_text(step: int, total: int, metrics: Mapping[str, float], elapsed: float, left: float | None) -> str:
    """The same for a bar: without the learning rate, and with the elapsed time."""
    shown = {name: value for name, value in metrics.items() if name != "lr"}
    times = [duration(elapsed)] if left is None else [f"{duration(elapsed)}<{duration(left)}"]
    return _fit(f"{step}/{total}", shown, times, WIDTH - 20)


def si(number: float) -> str:
    """A number with three digits and a decimal prefix: `1.23 M`; without a prefix below a thousand."""
    return _prefixed(number, 1000.0, ("", " k", " M", " G", " T", " P", " E"))


def bytes_(number: float) -> str:
    """A size in memory, in binary units: `1.50 GiB`."""
    return _prefixed(number, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def duration(seconds: float) -> str:
    """`0:07`, `1:05`, `2:03:04` or `1d 2:03:04`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not days and not hours:
        return f"{minutes}:{seconds:02d}"
    return f"{days}d " * (days > 0) + f"{hours}:{minutes:02d}:{seconds:02d}"


_FORMATS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda v: f"loss {v:.3f}"),
    ("reward", lambda v: f"reward {v:.3f}"),
    ("accuracy", lambda v: f"acc {v:.3f}"),
    ("skipped", lambda v: f"skipped {v:g}" if v else ""),
    ("moe/dropped", lambda v: f"dropped {v:.3g}" if v else ""),
    ("lr", lambda v: f"lr {v:.1e}"),
    ("tokens_per_s", lambda v: f"{si(v).replace(' ', '')} tok/s"),
    ("moe/load_max", lambda v: f"load {v:.2f}"),
)
"""Metrics displayed while running, in this order. Skipped updates and dropped tokens appear only if there are any."""


def _fit(start: str, metrics: Mapping[str, float], ending: list[str], width: int) -> str:
    """Join with two spaces, without the last metrics that do not fit before the ending."""
    texts = [start, *filter(None, (show(metrics[name]) for name, show in _FORMATS if name in metrics))]
    while len(texts) > 1 and len("  ".join(texts + ending)) > width:
        texts = texts[:-1]
    return "  ".join(texts + ending)


def _prefixed(number: float, base: float, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= base * (1 - 5e-4) and power < len(units) - 1:
        number, power = number / base, power + 1
    if power == 0:
        return f"{number:.3g}{units[0]}" if abs(number) < 999.5 else f"{number:.0f}{units[0]}"
    decimals = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{decimals}f}{units[power]}"
