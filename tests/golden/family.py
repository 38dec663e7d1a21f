"""Tiny random models of the MLA and MoE family, for `make_family.py` and the tests: NumPy alone, the same everywhere.

Weights come from the bits of a counter-based generator, so that only what transformers computes of them is stored.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "family"
CASES: Mapping[str, Mapping[str, Any]] = {
    f"{file.stem}_{number}": config
    for file in sorted(HERE.glob("*.json"))
    for number, config in enumerate(json.loads(file.read_text()), start=1)
}
"""The `config.json` of each case: `ARCHITECTURE_NUMBER`, three of each, from a file for each architecture."""
NEW_TOKENS = 24


def uniform(shape: tuple[int, ...], *keys: str) -> np.ndarray:
    """float32 of mean 0 and standard deviation 1 that depend on the keys alone."""
    raw = np.random.Philox([zlib.crc32(key.encode()) for key in keys]).random_raw(max(int(np.prod(shape)), 1))
    value = (raw[: int(np.prod(shape))] >> np.uint64(40)).astype(np.float32) / 2**24
    return ((value - 0.5) * 12**0.5).reshape(shape).astype(np.float32)


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Outputs of order 1 from inputs of order 1, norms away from 1, biases of both signs; float32. All but biases are
    values of bfloat16."""
    noise = uniform(shape, case, name)
    if name.endswith("bias"):
        return (0.6 * noise - 0.5) * (0.1 if ".router." in name else 1)  # where scores are a softmax
    if len(shape) == 1:
        value = 1 + 0.3 * noise
    elif "embed" in name:
        value = noise
    else:
        value = noise * (2.0 if ".gate.weight" in name or ".classifier." in name else 1.0) / np.prod(shape[1:]) ** 0.5
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)


def weights(case: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their names; an MTP module repeats embedding and head."""
    tensors = {name: weight(case, name, tuple(shape)) for name, shape in shapes.items()}
    layer = f"model.layers.{CASES[case].get('num_hidden_layers')}"
    for copy, name in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        if f"{layer}.{copy}.weight" in tensors:
            tensors[f"{layer}.{copy}.weight"] = tensors[f"{name}.weight"]
    return tensors


def batch(case: str) -> dict[str, np.ndarray]:
    """Three rows of tokens, segments and positions: plain; two documents and padding; one that begins at 3,000."""
    text = CASES[case].get("text_config", CASES[case])
    tokens = (uniform((3, 20), case, "tokens") * 1e6).astype(np.int64) % text["vocab_size"]
    segments = np.array([[1] * 20, [1] * 7 + [2] * 9 + [0] * 4, [1] * 20])
    positions = np.array([[*range(20)], [*range(7), *range(9), *range(4)], [*range(3000, 3020)]])
    arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def cotangent(case: str) -> np.ndarray:
    """What the logits are multiplied by for a scalar whose gradients are compared; 0 for padding."""
    text = CASES[case].get("text_config", CASES[case])
    return uniform((3, 20, text["vocab_size"]), case, "cotangent") * (batch(case)["segment_ids"] != 0)[..., None] / 60


def prompts(case: str) -> list[list[int]]:
    tokens = batch(case)["tokens"]
    return [tokens[0, :5].tolist(), tokens[1].tolist(), tokens[2, :1].tolist()]


def projections(case: str, name: str, gradient: np.ndarray) -> np.ndarray:
    """The norm of a gradient, and its products with four random arrays, in place of the gradient itself."""
    rows = uniform((4, *gradient.shape), case, name, "projection").reshape(4, -1)
    flat = gradient.reshape(-1).astype(np.float64)
    return np.array([np.linalg.norm(flat), *(rows @ flat)])
