"""`mla-moe generate`: an answer printed as it comes."""

import sys
import time
from typing import Any

from mla_moe.inference.engine import Engine
from mla_moe.inference.generate import required_length
from mla_moe.inference.request import Request
from mla_moe.nn.transformer import Transformer
from mla_moe.text.chat_tokenizer import ChatTokenizer


def print_completion(
    model: Transformer, language: ChatTokenizer, request: Request, *, speculative: bool, int8_kv_cache: bool
) -> None:
    """To standard output, and to standard error how long it took."""
    how: dict[str, Any] = {"speculative": speculative, "int8_kv_cache": int8_kv_cache}
    engine = Engine(model, slots=1, capacity=required_length(model, [request]), decode=language.decode, **how)
    start = time.perf_counter()
    completion = engine.submit(request)
    sent = 0
    assert completion.text is not None
    while completion.finish is None:
        engine.step()
        sys.stdout.write(completion.text.text[sent:])
        sys.stdout.flush()
        sent = len(completion.text.text)
    sys.stdout.write("\n")
    seconds = time.perf_counter() - start
    guesses = f", {engine.guesses.right} of {engine.guesses.made} guesses right" if speculative else ""
    count = len(completion.tokens)
    took = f"{count} tokens in {seconds:.1f} s, compiling included; ended by {completion.finish}{guesses}"
    print(f"[{took}]", file=sys.stderr)
