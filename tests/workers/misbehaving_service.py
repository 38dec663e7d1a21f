"""A service of a worker process that does what foreign code may do, by mistake or not. `test_process.py` calls it."""

import os
import subprocess
import sys
import time

DAEMON = "import os, sys, time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n"
DAEMON += "open(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(100)"


class Unprintable(Exception):
    def __str__(self):
        raise KeyError


def channel():
    """The file descriptor of the channel."""
    return next(int(fd) for fd in os.listdir("/proc/self/fd") if is_socket(f"/proc/self/fd/{fd}"))


def is_socket(path):
    try:
        return os.readlink(path).startswith("socket:")
    except OSError:
        return False


def daemon(path):
    """Start a process in a session and an environment of its own, whose parents have ended."""
    subprocess.run([sys.executable, "-c", DAEMON, path], env={}, check=True)
    while not os.path.exists(path) or not os.path.getsize(path):
        time.sleep(0.01)


def call(action, argument=None):
    if action == "fork" and os.fork() == 0:
        argument = "wrong"
    elif action == "fork and end" and os.fork():
        os._exit(0)
    elif action == "daemon":
        daemon(argument)
    elif action == "daemon and end":
        daemon(argument)
        os._exit(7)
    elif action == "kill the group":
        os.killpg(0, 9)
    elif action == "kill the supervisor":
        os.kill(os.getppid(), 9)
        time.sleep(100)
    elif action == "stop the supervisor":
        os.kill(os.getppid(), 19)
        time.sleep(100)
    elif action == "signal all":
        for number in (2, 15):
            os.kill(os.getppid(), number)
            os.kill(os.getpid(), number)
        program = subprocess.Popen(["sleep", "100"])
        program.terminate()
        if (copy := os.fork()) == 0:
            os.kill(os.getpid(), 15)
            time.sleep(100)
        return "value", [program.wait(), os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])]
    elif action == "sleep":
        time.sleep(100)
    elif action == "allocate":
        return "value", len(bytearray(argument))
    elif action == "long text":
        raise ValueError("\x1b[2J\n\ud800x" + "y" * 10**7)
    elif action == "text that fails":
        raise Unprintable
    elif action == "write":
        os.write(channel(), argument)
    elif action == "write and sleep":
        os.write(channel(), argument)
        time.sleep(100)
    elif action == "close files":
        os.closerange(3, 100)
    elif action == "sockets of a program":
        code = "import os; print(sum(os.readlink(f'/proc/self/fd/{f}').startswith('socket') for f in (3, 4, 5, 6, 7)"
        code += " if os.path.exists(f'/proc/self/fd/{f}')))"
        return "value", subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    elif action == "return":
        return "value", {1} if argument == "set" else "x" * 10**6
    return "value", argument


def open_service(loading, *arguments):
    loading("it")
    return call, list(arguments)
