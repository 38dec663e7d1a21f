"""Bounds that hold for every input: it ends in time, and memory grows by less than 1 GB; and a count of the inputs."""

import functools
import signal
import time
from pathlib import Path

import pytest

CPU_SECONDS, SECONDS = 10, 60
"""Most of computing, and in all: the processes of a busy machine wait for each other."""
MAX_GROWTH = 10**9
"""Bytes of memory of this process. A worker process has a limit of its own (`mla_moe.text.isolated`)."""


class Hang(BaseException):
    """No `Exception`, which the code under test may handle."""


def _memory(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _end(signal_number, frame):
    raise Hang(f"an input took more than {CPU_SECONDS} s of computing, or {SECONDS} s in all")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Count the inputs of a test, and limit each."""
    if not hasattr(pyfuncitem.obj, "hypothesis"):
        return (yield)
    inputs = 0
    inner = pyfuncitem.obj.hypothesis.inner_test

    @functools.wraps(inner)
    def limited(*args, **kwargs):
        nonlocal inputs
        inputs += 1
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            return inner(*args, **kwargs)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    pyfuncitem.obj.hypothesis.inner_test = limited
    before = {number: signal.signal(number, _end) for number in (signal.SIGALRM, signal.SIGPROF)}
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of this test
    memory, start = _memory("VmRSS"), time.monotonic()
    try:
        result = yield
    finally:
        growth = _memory("VmHWM") - memory
        seconds = time.monotonic() - start
        pyfuncitem.user_properties += [("inputs", f"{inputs:7} {seconds:8.0f} {growth / 1e6:12.0f}")]
        for number, handler in before.items():
            signal.signal(number, handler)
        pyfuncitem.obj.hypothesis.inner_test = inner
    assert growth < MAX_GROWTH
    return result


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--thorough"):
        terminalreporter.write_line(f"{'inputs':>7} {'seconds':>8} {'growth, MB':>12}  test")
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
            if report.when == "call" and (found := dict(report.user_properties).get("inputs")):
                terminalreporter.write_line(f"{found}  {report.nodeid} {report.outcome}")
