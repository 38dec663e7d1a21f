"""`mla-moe generate`."""

import dataclasses
import sys
import time
from pathlib import Path

import tyro

from mla_moe.checkpoint.adapter import AdapterCheckpoint
from mla_moe.checkpoint.bucket_run import location
from mla_moe.checkpoint.hub import local_checkpoint
from mla_moe.checkpoint.pretrained import load_model
from mla_moe.checkpoint.reader import Checkpoint, open_adapter, open_checkpoint
from mla_moe.checkpoint.tokenizer_files import tokenizer_file
from mla_moe.config import require
from mla_moe.config.errors import MAX_SIZE, require_between, visible
from mla_moe.config.hub import is_hub, shown
from mla_moe.inference.engine import Engine
from mla_moe.inference.generate import required_length
from mla_moe.inference.request import Request
from mla_moe.nn.transformer import Transformer
from mla_moe.text.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mla_moe.text.tokenizer import ByteTokenizer, HFTokenizer


@dataclasses.dataclass(frozen=True)
class Generate:
    """Generate a completion for one prompt, and print it as it is decoded."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory, hf://ORG/NAME, s3://… or gs://…, or a run's directory or checkpoint. Without a
    tokenizer, tokens are bytes."""
    prompt: str
    """Special tokens that it spells are encoded as such; bos is put in front."""
    adapter: Path | None = None
    """LoRA adapters of this model, which are merged into it: a directory in PEFT's layout, or a run's."""
    chat: bool = False
    """Apply the checkpoint's chat template, with the prompt as the user's message."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 decodes greedily."""
    top_k: int = 0
    """0 does not restrict sampling to the most likely tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end the completion."""
    speculative: bool = False
    """Speculative decoding with the MTP module: the same text up to rounding, usually faster."""
    int8_kv_cache: bool = False
    """Quantize the KV cache to int8: half the memory of bfloat16."""

    def __post_init__(self):
        require_between(self, "", "max_new_tokens", 1, MAX_SIZE)
        require_between(self, "", "temperature", 0, 100)
        require_between(self, "", "top_k", 0, MAX_SIZE)
        require_between(self, "", "top_p min_p", 0, 1)
        require_between(self, "", "seed", 0, (1 << 32) - 1)

    def run(self) -> None:
        model, tokenizer = load_model_and_tokenizer(self.checkpoint, self.adapter)
        message = [{"role": "user", "content": self.prompt}]
        tokens = tokenizer.encode_chat(message) if self.chat else tokenizer.encode_raw(self.prompt)
        request = Request(
            tokens, self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.seed,
            stop_ids=tokenizer.stop_ids, stop=self.stop,
        )  # fmt: skip
        engine = Engine(
            model, max_num_seqs=1, max_model_len=required_length(model, [request]), decode=tokenizer.decode,
            speculative=self.speculative, int8_kv_cache=self.int8_kv_cache,
        )  # fmt: skip
        # The text goes to standard output, the time and the acceptance of draft tokens to standard error.
        start, printed, shown = time.perf_counter(), 0, visible if sys.stdout.isatty() else str
        completion = engine.submit(request)
        while completion.finish_reason is None:
            engine.step()
            print(shown(completion.text[printed:]), end="", flush=True)
            printed = len(completion.text)
        print()
        seconds, drafts = time.perf_counter() - start, engine.draft_stats
        rate = f"{drafts.accepted / max(drafts.proposed, 1):.0%} of {drafts.proposed}"
        accepted = f", draft tokens: acceptance rate {rate}" if self.speculative else ""
        note = f"{len(completion.tokens)} tokens in {seconds:.1f} s, compilation included"
        print(f"[{note}; finish reason: {completion.finish_reason}{accepted}]", file=sys.stderr)


def load_model_and_tokenizer(checkpoint: Path, adapter: Path | None = None) -> tuple[Transformer, ChatTokenizer]:
    """For generate, eval and serve: the model, with an adapter merged into it, and the checkpoint's tokenizer. Raises
    `CheckpointError` for an adapter that does not fit, and `ConfigError` if the tokenizer has more tokens than the
    model."""
    base = open_checkpoint(local := local_checkpoint(checkpoint))
    # An adapter in PEFT's layout without a tokenizer of its own has that of its base.
    file = tokenizer_file(local) or tokenizer_file(base.directory)
    model = load_model(base if adapter is None else open_noted_adapter(adapter, base, checkpoint, str(adapter)))
    tokenizer = HFTokenizer(file) if file else ByteTokenizer()
    fix = f"has {tokenizer.vocab_size} tokens, more than the model's {model.cfg.vocab_size}: it is another model's"
    require(tokenizer.vocab_size <= model.cfg.vocab_size, "tokenizer", tokenizer.name, fix)
    return model, load_chat_tokenizer(file.parent if file else local, tokenizer)


def open_noted_adapter(path: str | Path, base: Checkpoint, checkpoint: Path, name: str) -> AdapterCheckpoint:
    """The adapter at `path` over `base`, which was opened from `checkpoint`. One that names another base is noted on
    standard error by its `name`: the same model may be in several places. Raises `CheckpointError` for one that does
    not fit."""
    source, used = open_adapter(path, base), (shown(checkpoint), location(base.directory.resolve()))
    if is_hub(source.base_name):
        model, _, revision = source.base_name.partition("@")
        same = model == used[0].partition("@")[0] and revision in ("", base.directory.name)
    else:
        same = source.base_name in used
    if not same:
        note = f"note: adapter {name} names the base {source.base_name}, and is used with {used[0]}"
        print(visible(note), file=sys.stderr)
    return source
