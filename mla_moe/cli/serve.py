"""`mla-moe serve`."""

import dataclasses
from pathlib import Path

import tyro

from mla_moe.cli.generate import load_model_and_tokenizer
from mla_moe.config import require


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a checkpoint over HTTP with an OpenAI-compatible API: completions, chat completions, streaming."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory, or a run's directory or checkpoint. Without a tokenizer, tokens are bytes."""
    host: str = "127.0.0.1"
    """Address to listen on; by default only this machine can connect. There is no authentication."""
    port: int = 8000
    max_num_seqs: int = 8
    """Sequences decoded at the same time (sequence slots)."""
    max_model_len: int | None = None
    """Longest sequence in tokens, prompt plus completion; the KV cache of each sequence slot has this length. By
    default 4096, or the model's max_position_embeddings if that is less."""
    max_waiting: int = 256
    """Length of the request queue; further requests get status 429."""
    max_seconds: float = 600.0
    """Timeout of a request, including its time in the queue; then it is cancelled with status 504."""
    speculative: bool = False
    """Speculative decoding with the MTP module: the same text up to rounding, usually faster."""
    int8_kv_cache: bool = False
    """Quantize the KV cache to int8: half the memory of bfloat16."""

    def run(self) -> None:
        from mla_moe.inference.engine import Engine
        from mla_moe.inference.openai_server import application, serve

        require(1 <= self.port < 1 << 16, "port", self.port, "must be in [1, 65535]")
        model, tokenizer = load_model_and_tokenizer(self.checkpoint)
        length = min(4096, model.cfg.max_position_embeddings) if self.max_model_len is None else self.max_model_len
        engine = Engine(
            model, max_num_seqs=self.max_num_seqs, max_model_len=length, decode=tokenizer.decode,
            speculative=self.speculative, int8_kv_cache=self.int8_kv_cache,
        )  # fmt: skip
        name = self.checkpoint.resolve().name
        app = application(engine, tokenizer, name, max_waiting=self.max_waiting, timeout=self.max_seconds)
        print(f"http://{self.host}:{self.port}/v1  (stop with Ctrl-C)")
        serve(app, self.host, self.port)
