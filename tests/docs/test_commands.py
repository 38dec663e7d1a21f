"""Every command of the README and the docs runs, with tiny models. Of commands that need a cluster, or minutes of
compilation, only recipe, flags and names are checked. An unknown command fails the test."""

import dataclasses
import http.client
import json
import runpy
import shlex
import shutil
import sys
import threading
import time
import tomllib

import jax
import pytest
import tyro

from mla_moe import cli
from mla_moe.cli import train as train_command
from mla_moe.config import load_recipe, with_overrides
from mla_moe.inference import openai_server
from mla_moe.parallel.accelerators import GPUS, TPUS
from mla_moe.training.console import Console
from tests.docs.conftest import PAGES, ROOT, blocks, small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # of huggingface_hub 2.4, in uploads
]

LIBRARIES = {
    "reasoning_gym:": "reasoning_gym",
    "chain_sum": "reasoning_gym",
    "questions.jsonl": "math_verify",
    "s3://": "s3fs",
    "gs://": "gcsfs",
}
"""Part of a command -> the package of the extra `rl`, `s3` or `gcs` that it needs."""


def needs(words):
    """Packages of extras that a command needs."""
    return {package for word in words for part, package in LIBRARIES.items() if part in word}


def commands():
    """All different commands, in order; the test id is the page with its first occurrence."""
    found = {}
    for page in PAGES:
        for language, text in blocks(page):
            if language == "":
                for line in text.replace("\\\n", " ").splitlines():
                    for words in split(line):
                        found.setdefault(tuple(words), f"{page.name}: {' '.join(words)[:90]}")
    library = pytest.mark.library
    return [pytest.param(words, id=name, marks=[library] if needs(words) else []) for words, name in found.items()]


def split(line):
    """The commands of a line, separated by `&&`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    command = []
    for word in lexer:
        if word == "&&":
            yield command
            command = []
        else:
            assert word not in ("&", "|", ";", "||"), f"unsupported in a documented command: {line}"
            command.append(word)
    if command:
        yield command


@pytest.fixture(scope="module")
def running():
    """Port of each server that `serve` started -> the function that stops it."""
    ports = {}
    yield ports
    for stop in ports.values():
        stop()


@pytest.mark.parametrize("words", commands())
def test_command(words, world, running, monkeypatch):
    monkeypatch.chdir(world)
    for package in needs(words):
        pytest.importorskip(package)
    program, *rest = words
    if program == ".venv/bin/python" and rest[0] == "train.py":
        train(rest[1:], monkeypatch)
    elif program == ".venv/bin/mla-moe":
        mla_moe(rest, running, monkeypatch)
    elif program == ".venv/bin/python" and rest[0].startswith(("examples/", "docs/")):
        script(rest, monkeypatch)
    elif program == "curl":
        curl(rest, running)
    elif words == ("python3", "-m", "pip", "wheel", "--no-deps", "-w", "dist", "."):
        assert project()["name"] == "mla_moe"  # building needs the network
    elif words == (".venv/bin/python", "-m", "mkdocs", "build"):
        assert (ROOT / "mkdocs.yml").is_file()  # tests/docs/test_pages.py builds the site
    elif program == "python3" and rest[:2] == ["-m", "pip"]:
        constraints, what = rest[rest.index("-c") + 1], rest[rest.index("-e") + 1]
        assert (ROOT / constraints).is_file()
        assert extras(what) <= set(project()["optional-dependencies"])
    elif words in ((".ci/run",), ("python3", "-m", "venv", "--without-pip", ".venv")):
        pass  # CI has run these before this test
    elif program == ".venv/bin/python" and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    elif program in ("gcloud", "srun"):
        inner = words[words.index("--command") + 1] if program == "gcloud" else shlex.join(words)
        *_, last = split(inner)
        read_train(last[last.index("train.py") + 1 :], monkeypatch)
    else:
        pytest.fail(f"unknown command: {shlex.join(words)}")


def train(arguments, monkeypatch, main=train_command.main):
    """Runs the recipes of `FULL_RUNS`; the others up to the first compilation."""
    if any(word.startswith("--distributed.") for word in arguments):
        read_train(arguments, monkeypatch)
        return
    run, devices = train_command.run, jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)  # a laptop's
    monkeypatch.setattr(train_command, "run", lambda settings: run(small(settings)))
    monkeypatch.setattr("mla_moe.training.run_context.enable_compile_cache", lambda: None)  # the tests have their own
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    if tuple(arguments) in FULL_RUNS or any(word in FULL_RUN_DIRS for word in arguments):
        assert main() == 0
    else:
        monkeypatch.setattr(Console, "startup_table", stop)
        with pytest.raises(Started):
            main()


FULL_RUNS = (("configs/quickstart.py",), ("tune.py",), ("mine.py",), ("adapters.py",))
FULL_RUN_DIRS = ("runs/chat",)
"""Run directories that later commands use."""


class Started(Exception):
    """The run has read its configuration and data, and would compile next."""


def stop(*_):
    raise Started


def read_train(arguments, monkeypatch):
    """Parse the recipe and the flags without starting the run."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(train_command, "run", lambda settings: 0)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert train_command.main() == 0


def mla_moe(arguments, running, monkeypatch):
    if arguments[0] == "train":
        train(arguments[1:], monkeypatch, lambda: cli.main(arguments))
        return
    command, flags = tyro.cli(cli.Command, prog="mla-moe", args=arguments, return_unknown_args=True)
    assert isinstance(command, cli.Plan | cli.Data | cli.Launch) or not flags
    if isinstance(command, cli.Launch):
        assert dataclasses.replace(command, print=True).run(flags) == 0
        return
    if isinstance(command, cli.Plan):
        with_overrides(load_recipe(command.recipe), flags, "mla-moe plan")
        assert command.topology.partition(":")[0] in {*TPUS, *GPUS, "cpu"}
        return
    if isinstance(command, cli.Data):
        command.run(flags)
        return
    if isinstance(command, cli.Serve):
        monkeypatch.setattr(openai_server, "serve", lambda app, host, port: listen(app, running))
        command = dataclasses.replace(command, max_model_len=128)
    evaluation = {"prompts": 2, "samples": 1, "max_prompt_tokens": 448, "max_new_tokens": 4, "max_num_seqs": 8}
    small_sizes = {cli.Generate: {"max_new_tokens": 4}, cli.Eval: evaluation}
    command = dataclasses.replace(command, **small_sizes.get(type(command), {}))
    if isinstance(command, cli.Convert) and command.dst.exists():
        shutil.rmtree(command.dst)  # a command of another page has written it
    command.run()


def listen(app, running):
    uvicorn = pytest.importorskip("uvicorn")
    http_server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=http_server.run)
    thread.start()
    while not http_server.started:
        time.sleep(0.01)

    def stop():
        http_server.should_exit = True
        thread.join()

    running[http_server.servers[0].sockets[0].getsockname()[1]] = stop


def curl(arguments, running):
    url, options = arguments[0], dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert options.keys() <= {"-H", "-d"}
    host, _, path = url.partition("/")
    assert host == "localhost:8000", "the default port of `serve`"
    connection = http.client.HTTPConnection("127.0.0.1", next(reversed(running)), timeout=120)
    connection.request("POST", f"/{path}", options["-d"], dict([options["-H"].split(": ")]))
    response = connection.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["choices"]
    connection.close()


def script(rest, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(rest))
    runpy.run_path(rest[0], run_name="__main__")


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def extras(requirement):
    """`.[serve,rl]` -> serve, rl."""
    return set(requirement.partition("[")[2].rstrip("]").split(",")) - {""}
