"""Whatever a service does, its worker replies in time or is replaced, and all of its processes end."""

import contextlib
import functools
import os
import sys
import time
from pathlib import Path

import pytest

from mla_moe.workers.process import WorkerProcess, printable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
SERVICE = Path(__file__).with_name("misbehaving_service.py")


@pytest.fixture(scope="module")
def shared():
    worker = WorkerProcess(SERVICE, ["content"], max_reply_bytes=5000, memory_bytes=200 << 20)
    assert worker.wait() == ("ready", ["content"])
    assert worker.loading == "it"
    yield worker
    worker.end()


@pytest.fixture
def worker(shared):
    """A worker that is ready for a call, whatever the one before did."""
    if not shared.ready:
        shared.restart()
    yield shared
    if not shared.ready:
        shared.restart()
    assert shared.call(10, "echo", 1) == ("value", 1)


def has_ended(path, seconds=5):
    """Whether the process whose id is in a file ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{Path(path).read_text()}/stat").read_text().split()[2] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


def test_copies_of_the_process_do_not_answer(worker):
    """Each reply is the one of its call, though two processes return from it."""
    for number in range(20):
        assert worker.call(10, "fork", number) == ("value", number)
    assert worker.call(10, "fork and end") == ("died", "exit code 0")


def test_arguments_that_cannot_be_sent_leave_the_worker_ready(worker):
    nested = functools.reduce(lambda value, _: [value], range(5000), 1)
    process = worker._process
    with pytest.raises(RecursionError):
        worker.call(10, "echo", nested)
    assert worker.call(10, "echo", 1) == ("value", 1)
    assert worker._process is process


@pytest.mark.parametrize("action", ["daemon", "daemon and end"])
def test_daemons_end_with_the_worker(worker, tmp_path, action):
    """In a session and an environment of their own, and if the service has ended before."""
    path = tmp_path / "pid"
    reply = worker.call(10, action, str(path))
    assert reply == (("value", str(path)) if action == "daemon" else ("died", "exit code 7"))
    worker.restart()
    assert has_ended(path)


@pytest.mark.parametrize("action", ["kill the group", "kill the supervisor", "stop the supervisor", "sleep"])
def test_a_service_that_ends_or_stops_what_it_can_is_replaced(worker, action):
    kind, message = worker.call(0.4, action)
    assert (kind, message) == (("died", "exit code -9") if "kill" in action else ("hung", "no reply within 0.4 s"))


@pytest.mark.parametrize(
    ("action", "argument", "kind", "message"),
    [
        ("allocate", 1 << 30, "raised", "MemoryError: "),
        ("allocate", 100 << 20, "value", 100 << 20),
        ("text that fails", None, "raised", "Unprintable"),
        ("return", "set", "raised", "TypeError: Object of type set is not JSON serializable"),
        ("return", None, "raised", "ValueError: the result has 10000"),
        ("signal all", None, "value", [-15, -15]),
        ("sockets of a program", None, "value", "0\n"),
        ("write", b"nonsense\n", "died", "ended, because it sent b'nonsense'"),
        ("write", b"\n", "died", "ended, because it sent b''"),
        ("write", b'[77, "value", 1]\n', "died", "ended, because it sent a reply to call 77"),
        ("write", b"x" * 6000 + b"\n", "died", "ended, because its reply has more than 5000 bytes"),
        ("write", b"[" * 900 + b"\n", "died", "ended, because it sent b'[[["),
        ("write and sleep", b'[1, "val', "hung", "no reply"),
        ("close files", None, "died", "exit code 0"),
    ],
)
def test_replies(worker, action, argument, kind, message):
    got, content = worker.call(0.5 if kind == "hung" else 10, action, argument)
    assert got == kind
    assert content == message if kind == "value" else content.startswith(message)


def test_the_text_of_an_exception_is_short(worker):
    kind, message = worker.call(10, "long text")
    assert kind == "raised"
    assert message.startswith("ValueError: \x1b[2J\n\ud800xyy"), "whoever shows it makes it printable"
    assert len(message) == 1000
    assert printable(message).startswith("ValueError:  [2J  xyy")


def test_a_parent_that_was_interrupted_gets_no_reply_of_the_call_before(worker):
    worker.submit(100, "sleep")
    assert worker.call(10, "echo", 2) == ("value", 2)


def test_a_service_that_cannot_be_loaded(tmp_path):
    for text, reply in [
        ("def open_service(loading): raise SystemExit('no')", ("unable", "SystemExit: no")),
        ("import os\nos._exit(3)", ("died", "exit code 3")),
    ]:
        (tmp_path / "service.py").write_text(text)
        worker = WorkerProcess(tmp_path / "service.py", [], max_reply_bytes=1000)
        assert worker.call(1) == reply


def test_the_supervisor_adds_no_process_that_stays():
    worker = WorkerProcess(SERVICE, [], max_reply_bytes=1000)
    worker.wait()
    children = Path(f"/proc/{worker._process.pid}/task/{worker._process.pid}/children").read_text().split()
    assert len(children) == 1
    assert worker.end() == -9
    assert not os.path.exists(f"/proc/{children[0]}")
