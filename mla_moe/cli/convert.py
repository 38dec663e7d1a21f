"""`mla-moe convert`."""

import contextlib
import dataclasses
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import tyro

from mla_moe.checkpoint.convert import convert
from mla_moe.config import require
from mla_moe.config.storage import is_url, shown


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint between the Hugging Face and the Orbax layout, or to another dtype, with bounded memory. The
    destination appears only when it is complete, and is without the optimizer state of a run."""

    src: tyro.conf.Positional[Path]
    """A Hugging Face directory, hf://ORG/NAME, s3://… or gs://…, or a run's directory or checkpoint."""
    dst: tyro.conf.Positional[Path]
    """The new directory. hf://ORG/NAME, or hf://ORG/NAME@BRANCH, is a commit to the Hub, where a new repository is
    private; s3://… or gs://… is a directory of a bucket."""
    to: Literal["hf", "orbax"] = "hf"
    """hf: config.json and safetensors; orbax: a checkpoint for `--init-from` and Orbax."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Weights' dtype; by default unchanged, and bfloat16 for quantized weights."""
    quantize: Literal["fp8", "int4"] | None = None
    """fp8: matrices in FP8 blocks of 128 x 128, as in DeepSeek's releases; int4: routed experts in INT4 groups of 32,
    as in Kimi-K2.5."""
    fp8: bool = False
    """Renamed: use --quantize fp8."""
    merge_adapter: bool = False
    """Write the complete model with LoRA adapters added to its weights. Otherwise adapters become a directory for
    PEFT."""

    def run(self) -> None:
        import jax.numpy as jnp

        require(not self.fp8, "fp8", True, "is now --quantize fp8")
        dtype = self.dtype and jnp.dtype(self.dtype)
        with _ended_by_sigterm():
            convert(
                self.src, self.dst, to=self.to, dtype=dtype, quantize=self.quantize, merge_adapter=self.merge_adapter
            )
        if is_url(self.dst):
            print(f"{shown(self.dst)}: written")
            return
        size = sum(file.stat().st_size for file in self.dst.rglob("*") if file.is_file())
        print(f"{self.dst}: {size / 1e9:.3g} GB" if size >= 1e7 else f"{self.dst}: {size / 1e6:.3g} MB")


@contextlib.contextmanager
def _ended_by_sigterm() -> Generator[None]:
    """SIGTERM, which schedulers send, ends the block by an exception as Ctrl-C does, so that what is incomplete is
    removed."""

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
