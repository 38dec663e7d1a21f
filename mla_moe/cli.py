"""`mla-moe`: look at models and runs from the command line."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mla_moe.config import ConfigError, preset, require
from mla_moe.counting import (
    cache_bytes_per_token,
    count_parameters,
    multi_head_cache_bytes_per_token,
    train_flops_per_token,
)
from mla_moe.training.console import Console, si


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what a model costs: parameters, KV bytes a token, FLOPs a token. Nothing is allocated."""

    model: tyro.conf.Positional[str]
    """A preset's name."""
    length: int = 4096
    """Tokens of a sequence, for the FLOPs."""

    def run(self) -> None:
        cfg = preset(self.model)
        count = count_parameters(cfg)
        latent, multi_head = cache_bytes_per_token(cfg), multi_head_cache_bytes_per_token(cfg)
        rows = [
            ("parameters", f"{count.total:,} ({si(count.total)})"),
            ("active a token", f"{count.active:,} ({si(count.active)})"),
            ("prediction module", f"{count.mtp:,} ({si(count.mtp)})" if count.mtp else "none"),
            ("layers", f"{cfg.num_hidden_layers}, of which {cfg.first_k_dense_replace} dense"),
            ("experts", f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} and {cfg.n_shared_experts} shared"),
            ("KV bytes a token", f"{latent:,} in bfloat16"),
            ("  multi-head attention", f"{multi_head:,} ({multi_head / latent:.1f} times as many)"),
            ("FLOPs a token", f"{si(train_flops_per_token(cfg, self.length))} to train on {self.length} tokens"),
        ]
        Console(enabled=True).startup_table(self.model, rows)


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a run's report.html."""

    run_dir: tyro.conf.Positional[Path]

    def run(self) -> None:
        from mla_moe.report import write_report

        print(write_report(self.run_dir))


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or answer it as one message of a chat."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory with its tokenizer.json; without one, text is bytes."""
    prompt: str
    chat: bool = False
    """Put the prompt into the checkpoint's chat template."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    speculative: bool = False
    """Let the prediction module guess ahead: the same text, sooner."""

    def run(self) -> None:
        from mla_moe.inference.request import Request
        from mla_moe.inference.terminal import print_answer

        model, language = _model_and_language(self.checkpoint)
        message = [{"role": "user", "content": self.prompt}]
        tokens = language.encode_chat(message) if self.chat else language.encode(self.prompt)
        request = Request(
            tokens, self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.seed,
            stop_ids=language.stop_ids, stop=self.stop,
        )  # fmt: skip
        print_answer(model, language, request, speculative=self.speculative)


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a checkpoint over HTTP, with OpenAI's interface."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory with its tokenizer.json; without one, text is bytes."""
    host: str = "127.0.0.1"
    """Who may connect: only this machine unless you say otherwise. There is no password."""
    port: int = 8000
    slots: int = 8
    """Requests that run at a time."""
    capacity: int = 4096
    """Most tokens of a request, its answer included."""
    max_waiting: int = 256
    """Requests beyond these are turned away with status 429."""
    speculative: bool = False
    """Let the prediction module guess ahead: the same text, sooner."""

    def run(self) -> None:
        from mla_moe.inference.engine import Engine
        from mla_moe.inference.server import application, serve

        model, language = _model_and_language(self.checkpoint)
        engine = Engine(
            model, slots=self.slots, capacity=self.capacity, decode=language.decode, speculative=self.speculative
        )
        app = application(engine, language, self.checkpoint.resolve().name, max_waiting=self.max_waiting)
        print(f"http://{self.host}:{self.port}/v1  (stop with Ctrl-C)")
        serve(app, self.host, self.port)


def _model_and_language(checkpoint: Path):
    """A checkpoint's model, and how text goes into it and comes out."""
    from mla_moe.data.tokenizer import ByteTokenizer, HFTokenizer
    from mla_moe.inference.language import language_of
    from mla_moe.interop import load_pretrained

    file = checkpoint / "tokenizer.json"
    model = load_pretrained(checkpoint)
    tokenizer = HFTokenizer(file) if file.is_file() else ByteTokenizer()
    require(
        tokenizer.vocab_size <= model.cfg.vocab_size,
        "tokenizer",
        str(file) if file.is_file() else tokenizer.name,
        f"has {tokenizer.vocab_size} tokens, more than the model's {model.cfg.vocab_size}: it is another model's",
    )
    return model, language_of(checkpoint, tokenizer)


Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
)


def main(args: list[str] | None = None) -> int:
    try:
        tyro.cli(Command, prog="mla-moe", description=__doc__, args=args).run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
