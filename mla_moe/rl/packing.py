"""Sequence packing: several prompts with their completions in one packed sequence, each a segment of its own."""

from collections.abc import Sequence

import numpy as np

from mla_moe.inference.request import Completion

PackedSequences = dict[str, np.ndarray]
"""`tokens`, `targets`, `segment_ids`, `positions`, `completion_BT` int32 and `sampler_logprob_BT` float32, each [B, T],
and `replay` (routing replay) int16 [B, T, l, K] if experts were recorded.

Segments count from 1, 0 is padding. `completion_BT` is the index of the completion that a target belongs to, −1 for
prompts and padding; `replay` is −1 for padding.
"""


def pack_completions(completions: Sequence[Completion], length: int, multiple: int) -> PackedSequences:
    """Packed sequences of `length` tokens, padded to a multiple of `multiple` sequences.

    First-fit decreasing: the longest first, each in the first sequence with room. Only the number of packed sequences
    depends on the data.
    """
    free: list[int] = []
    start_of: list[tuple[int, int]] = [(0, 0)] * len(completions)
    sizes = [len(one.request.prompt) + len(one.tokens) - 1 for one in completions]  # the last token is only a target
    for index in sorted(range(len(completions)), key=lambda i: -sizes[i]):
        size = sizes[index]
        row = next((r for r, left in enumerate(free) if left >= size), len(free))
        if row == len(free):
            free.append(length)
        start_of[index] = row, length - free[row]
        free[row] -= size
    count = -(-len(free) // multiple) * multiple
    shape = count, length
    names = ("tokens", "targets", "segment_ids", "positions")
    packed: PackedSequences = {name: np.zeros(shape, np.int32) for name in names}
    packed["completion_BT"] = np.full(shape, -1, np.int32)
    packed["sampler_logprob_BT"] = np.zeros(shape, np.float32)
    experts = completions[0].experts_TlK
    if experts is not None:
        packed["replay"] = np.full((*shape, *experts.shape[1:]), -1, np.int16)
    segments = np.zeros(count, np.int32)
    for index, (sampled, size, (row, start)) in enumerate(zip(completions, sizes, start_of, strict=True)):
        prompt, stop = sampled.request.prompt, start + size
        span, new = slice(start, stop), slice(start + len(prompt) - 1, stop)
        token_ids = [*prompt, *sampled.tokens]
        segments[row] += 1
        packed["tokens"][row, span], packed["targets"][row, span] = token_ids[:-1], token_ids[1:]
        packed["segment_ids"][row, span], packed["positions"][row, span] = segments[row], np.arange(size)
        packed["completion_BT"][row, new], packed["sampler_logprob_BT"][row, new] = index, sampled.logprobs
        if sampled.experts_TlK is not None:
            packed["replay"][row, span] = sampled.experts_TlK
    return packed


def microbatches(packed: PackedSequences, size: int) -> list[PackedSequences]:
    """Microbatches of `size` packed sequences each, in order."""
    starts = range(0, len(packed["tokens"]), size)
    return [{name: x[start : start + size] for name, x in packed.items()} for start in starts]
