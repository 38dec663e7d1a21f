import io

import pytest
import rich.console

from mla_moe.training import console
from mla_moe.training.console import Console, bar_text, bytes_, duration, log_line, si

METRICS = {"loss": 3.2141, "lr": 2.2e-4, "tokens_per_s": 12345.6, "moe/load_max": 1.309, "moe/dropped": 0.0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances: `clock[0]`."""
    now = [1000.0]
    monkeypatch.setattr(console, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (0.5, "0.5"), (999, "999"), (999.7, "1.00 k"), (1234567, "1.23 M"), (12345, "12.3 k"),
        (123456, "123 k"), (999_999, "1.00 M"), (671e9, "671 G"), (-2500, "-2.50 k"), (2.6e24, "2600000 E"),
    ],
)  # fmt: skip
def test_si_prefixes(number, text):
    assert si(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(512, "512 B"), (1000, "1000 B"), (1024, "1.00 KiB"), (1.5 * 2**30, "1.50 GiB")]
)
def test_bytes(number, text):
    assert bytes_(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (65, "1:05"), (7384, "2:03:04"), (93784, "1d 2:03:04")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_log_line():
    expected = "step   120/400  loss 3.214  lr 2.2e-04  12.3k tok/s  load 1.31  left 1:05"
    assert log_line(120, 400, METRICS, 65.0) == expected
    assert log_line(120, 400, {"loss": float("nan")}, None) == "step   120/400  loss nan"


def test_skipped_updates_and_dropped_tokens_appear_only_if_there_are_any():
    line = log_line(1, 9, METRICS | {"skipped": 2, "moe/dropped": 17}, None)
    assert "skipped 2" in line
    assert "dropped 17" in line
    assert "skipped" not in log_line(1, 9, METRICS | {"skipped": 0}, None)


def test_longest_lines_fit_the_width():
    wide = {name: 123456.7 for name in METRICS} | {"reward": -1.0, "accuracy": 0.5, "skipped": 1e5, "moe/dropped": 1e9}
    line = log_line(1_000_000, 2_000_000, wide, 1e6)
    assert len(line) <= 80
    assert line.endswith("left 11d 13:46:40")
    assert len(bar_text(1_000_000, 2_000_000, wide, 1e6, 1e6)) <= 60


def test_log_has_a_line_every_ten_seconds_and_for_the_last_step(clock, capsys):
    with Console(enabled=True).progress("pretrain", total=31, start=5) as progress:
        for step in range(6, 32):
            progress.update(step, METRICS)
            clock[0] += 4.0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line[4:].split("/")[0]) for line in lines] == [6, 9, 12, 15, 18, 21, 24, 27, 30, 31]
    assert "left" not in lines[0]
    assert lines[1].endswith("left 1:28")
    assert all(len(line) <= 80 for line in lines)


def terminal(monkeypatch):
    """A console on an 80-column terminal, and its output in memory."""
    terminal_console = Console(enabled=True)
    output = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    terminal_console._rich = rich.console.Console(file=output, force_terminal=True, width=80, highlight=False)
    return terminal_console, output


def test_terminal_shows_a_progress_bar(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    terminal_console, output = terminal(monkeypatch)
    with terminal_console.progress("pretrain", total=400) as progress:
        progress.update(400, METRICS)
        terminal_console.print("kept [as is] \x1b[2J")
    final = output.getvalue()
    assert "━" in final
    assert "kept [as is] \\x1b[2J" in final
    assert "400/400  loss 3.214  12.3k tok/s  load 1.31" in final


def test_ci_prints_lines_even_on_a_terminal(monkeypatch):
    monkeypatch.setenv("CI", "true")
    terminal_console, output = terminal(monkeypatch)
    with terminal_console.progress("pretrain", total=400) as progress:
        progress.update(400, METRICS)
    assert output.getvalue().startswith("step   400/400")
    assert "━" not in output.getvalue()


def test_tables_are_aligned_and_brackets_are_not_markup(capsys):
    terminal_console = Console(enabled=True)
    terminal_console.startup_table("quickstart", [("model", "tiny [v3]"), ("sequence length", "x" * 100)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "quickstart"
    assert lines[1].index("tiny [v3]") == lines[2].index("x")
    assert sum(line.count("x") for line in lines) == 100
    assert all(len(line) <= 80 for line in lines)
    terminal_console.result_table("result", [("loss", "1.5"), ("tokens", "12.3 M")])
    _, loss, tokens = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert len(loss) == len(tokens)


def test_long_message_is_not_truncated(capsys):
    Console(enabled=True).print("m" * 200)
    assert capsys.readouterr().out == "m" * 200 + "\n"


def test_disabled_console_prints_nothing(clock, capsys):
    terminal_console = Console(enabled=False)
    terminal_console.print("hello")
    terminal_console.startup_table("run", [("a", "b")])
    terminal_console.result_table("run", [("a", "b")])
    with terminal_console.progress("pretrain", total=2) as progress:
        progress.update(2, METRICS)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
