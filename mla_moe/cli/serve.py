"""`mla-moe serve`."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import tyro

from mla_moe.checkpoint.reader import open_checkpoint
from mla_moe.cli.generate import load_model_and_tokenizer, open_noted_adapter
from mla_moe.config.errors import require, require_between
from mla_moe.config.hub import is_hub, parse_url
from mla_moe.nn.stacked_lora import AdapterWeights


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a checkpoint over HTTP with an OpenAI-compatible API: completions, chat completions, streaming."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory, hf://ORG/NAME, s3://… or gs://…, or a run's directory or checkpoint. Without a
    tokenizer, tokens are bytes."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=PATH of LoRA adapters of this model, once for each: a directory in PEFT's layout, or a run's. Clients choose
    one by `model` in a request; requests of different adapters run in the same batch."""
    host: str = "127.0.0.1"
    """Address to listen on; by default only this machine can connect. Any other needs an API key, or --no-auth."""
    port: int = 8000
    max_num_seqs: int = 8
    """Sequences decoded at the same time (sequence slots)."""
    max_model_len: int | None = None
    """Longest sequence in tokens, prompt plus completion; the KV cache of each sequence slot has this length. By
    default 4096, or the model's max_position_embeddings if that is less."""
    max_waiting: int = 256
    """Length of the request queue; further requests get status 429. Clients take turns in it, and one cannot fill it
    alone."""
    max_requests_per_client: int | None = None
    """Choices (n times prompts) of one client that run or wait at the same time; further ones get status 429. A client
    is an API key if there are several, else an address. By default only `--max-waiting` limits them."""
    max_seconds: float = 600.0
    """Timeout of a request, including its time in the queue; then it is cancelled with status 504."""
    cors_origin: tuple[str, ...] = ()
    """Origins whose web pages may call the server, as http://localhost:3000; * allows any. By default none may."""
    allowed_host: tuple[str, ...] = ()
    """Names by which clients call the server, as model.example.com, besides localhost and IP addresses; .example.com
    are all names below it, * is any. Other values of the header Host are refused: a web page could forge them."""
    api_key: tuple[str, ...] = ()
    """Keys, one of which clients must send as `Authorization: Bearer KEY`. Other users of the machine can read flags:
    rather use `--api-key-file`, or the environment variable MLA_MOE_API_KEY."""
    api_key_file: Path | None = None
    """A file with API keys, one a line, that only its owner can read."""
    no_auth: bool = False
    """Let everybody who can connect use the server, without an API key."""
    exit_on_engine_failure: bool = False
    """End with status 1 when the engine fails, so that a supervisor restarts the server. By default it answers errors,
    and /health has status 503."""
    speculative: bool = False
    """Speculative decoding with the MTP module: the same text up to rounding, usually faster."""
    int8_kv_cache: bool = False
    """Quantize the KV cache to int8: half the memory of bfloat16."""

    def __post_init__(self):
        require_between(self, "", "port", 1, 65535)
        require_between(self, "", "max_num_seqs", 1, 1 << 16)
        require_between(self, "", "max_waiting", 0, 1 << 20)
        require_between(self, "", "max_requests_per_client", 1, 1 << 20)
        require_between(self, "", "max_seconds", 1e-3, 1e6)

        for value in self.adapter:
            name, _, path = value.partition("=")
            require(bool(name and path), "adapter", value, "write NAME=PATH")
        names = [value.partition("=")[0] for value in self.adapter]
        require(len(set(names)) == len(names), "adapter", names, "each adapter needs a name of its own")

    def run(self) -> None:
        from mla_moe.inference.access import Access, read_keys, require_access
        from mla_moe.inference.async_engine import EngineDeadError
        from mla_moe.inference.engine import Engine
        from mla_moe.inference.openai_server import application, serve

        keys = (*self.api_key, *os.environ.get("MLA_MOE_API_KEY", "").split())
        keys = keys if self.api_key_file is None else (*keys, *read_keys(self.api_key_file))
        require_access(self.host, keys, no_auth=self.no_auth)
        access = Access((*self.allowed_host, self.host), self.cors_origin, keys)
        path = self.checkpoint
        name = parse_url(path, "checkpoint").id if is_hub(path) else path.resolve().name
        adapters = load_adapters(self.adapter, path)  # first: the model takes longer
        require(name not in adapters, "adapter", name, "is the name of the model itself; choose another")
        model, tokenizer = load_model_and_tokenizer(path)
        length = min(4096, model.cfg.max_position_embeddings) if self.max_model_len is None else self.max_model_len
        engine = Engine(
            model, max_num_seqs=self.max_num_seqs, max_model_len=length, decode=tokenizer.decode,
            speculative=self.speculative, int8_kv_cache=self.int8_kv_cache, adapters=tuple(adapters.values()),
        )  # fmt: skip
        app = application(
            engine, tokenizer, name, max_waiting=self.max_waiting, timeout=self.max_seconds,
            max_requests_per_client=self.max_requests_per_client, access=access,
            exit_on_engine_failure=self.exit_on_engine_failure, adapters=tuple(adapters),
        )  # fmt: skip
        host = f"[{self.host}]" if ":" in self.host else self.host
        print(f"http://{host}:{self.port}/v1  (stop with Ctrl-C)")
        try:
            serve(app, self.host, self.port)
        except EngineDeadError:
            raise SystemExit("error: engine = failed: its traceback is above; start the server again") from None


def load_adapters(values: Sequence[str], checkpoint: Path) -> dict[str, AdapterWeights]:
    """The adapters of `NAME=PATH` by name. Raises `CheckpointError` for one that does not fit."""
    base, adapters = open_checkpoint(checkpoint) if values else None, {}
    for value in values:
        name, _, path = value.partition("=")
        assert base is not None
        adapters[name] = open_noted_adapter(path, base, checkpoint, name).weights()
    return adapters
