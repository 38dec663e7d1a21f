"""The command `mla-moe`: train, evaluate, serve and inspect models, convert checkpoints, and plan and report runs."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import tyro

from mla_moe.cli.convert import Convert
from mla_moe.cli.eval import Eval
from mla_moe.cli.generate import Generate
from mla_moe.cli.inspect import Inspect
from mla_moe.cli.plan import Plan
from mla_moe.cli.report import Report
from mla_moe.cli.serve import Serve
from mla_moe.cli.train import Train, reexecute_with_huge_pages
from mla_moe.cli.train import main as run_train
from mla_moe.config import ConfigError

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)

RENAMED_FLAGS = {"--slots": "--max-num-seqs", "--capacity": "--max-model-len", "--int8-cache": "--int8-kv-cache"}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; by default the one in `sys.argv`. Returns the exit code: 2 for invalid input, described in one
    line, 1 for another error."""
    if args is None:
        args = sys.argv[1:]
        if args[:1] == ["train"]:
            reexecute_with_huge_pages()
    if args and args[0] == "train":  # its fields come from the recipe, in `--help` too
        return run_train(args[1:], "mla-moe train")
    for flag in (arg.partition("=")[0].replace("_", "-") for arg in args):
        if flag in RENAMED_FLAGS:
            print(f"{flag}: renamed; use {RENAMED_FLAGS[flag]}", file=sys.stderr)
            return 2
    parse = partial(tyro.cli, Command, prog="mla-moe", description=__doc__, args=args)
    try:
        command, flags = parse(return_unknown_args=True)
        assert not isinstance(command, Train)
        if isinstance(command, Plan):
            command.run(flags)
        elif flags:
            parse()  # prints an error for the unknown flags, and exits
        else:
            command.run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail as well
        return 141
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    return 0
