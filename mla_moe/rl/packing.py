"""Answers to rows: several prompts with their answers to a row, each a segment of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PackedRows = dict[str, np.ndarray]
"""`tokens`, `targets`, `segment_ids`, `positions`, `answer_BT` int32 and `sampler_logprob_BT` float32, each [R, T], and
`replay` [R, T, l, K] int16 where experts were recorded.

Segments count from 1, 0 is padding. `answer_BT` is the index of the answer that a target is a token of, −1 for prompts
and padding; `replay` is −1 for padding.
"""


class SampledCompletion(NamedTuple):
    """An answer as the engine made it."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]
    experts_TlK: np.ndarray | None
    """Of the prompt's and the answer's tokens, all but the last."""

    @property
    def size(self) -> int:
        """Places that it takes in a row: the last token is a target only."""
        return len(self.prompt) + len(self.tokens) - 1


def pack_completions(answers: Sequence[SampledCompletion], length: int, multiple: int) -> PackedRows:
    """Rows of `length` tokens, a multiple of `multiple` of them; the longest answers first, each where it first fits.

    The sizes of what is packed decide nothing but the number of rows.
    """
    free: list[int] = []
    place: list[tuple[int, int]] = [(0, 0)] * len(answers)
    for index in sorted(range(len(answers)), key=lambda i: -answers[i].size):
        size = answers[index].size
        row = next((r for r, left in enumerate(free) if left >= size), len(free))
        if row == len(free):
            free.append(length)
        place[index] = row, length - free[row]
        free[row] -= size
    count = -(-len(free) // multiple) * multiple
    shape = count, length
    rows: PackedRows = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    rows["answer_BT"] = np.full(shape, -1, np.int32)
    rows["sampler_logprob_BT"] = np.zeros(shape, np.float32)
    experts = answers[0].experts_TlK
    if experts is not None:
        rows["replay"] = np.full((*shape, *experts.shape[1:]), -1, np.int16)
    segments = np.zeros(count, np.int32)
    for index, (answer, (row, start)) in enumerate(zip(answers, place, strict=True)):
        whole = [*answer.prompt, *answer.tokens]
        part, new = slice(start, start + answer.size), slice(start + len(answer.prompt) - 1, start + answer.size)
        segments[row] += 1
        rows["tokens"][row, part], rows["targets"][row, part] = whole[:-1], whole[1:]
        rows["segment_ids"][row, part], rows["positions"][row, part] = segments[row], np.arange(answer.size)
        rows["answer_BT"][row, new], rows["sampler_logprob_BT"][row, new] = index, answer.logprobs
        if answer.experts_TlK is not None:
            rows["replay"][row, part] = answer.experts_TlK
    return rows


def microbatches(rows: PackedRows, size: int) -> list[PackedRows]:
    """The rows, `size` at a time."""
    return [
        {name: x[start : start + size] for name, x in rows.items()} for start in range(0, len(rows["tokens"]), size)
    ]
