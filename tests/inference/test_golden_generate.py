"""Greedy decoding generates the tokens of transformers 5.23.0 (`tests/golden/make_generate.py`)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import generate, load_pretrained

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("case", [pytest.param("v2_group_limited", marks=pytest.mark.slow), "v3"])
def test_greedy_tokens_are_those_of_transformers(case):
    expected = np.load(GOLDEN / case / "generate.npz")
    prompts = [p.tolist() for p in np.split(expected["prompts"], np.cumsum(expected["lengths"])[:-1])]
    new = generate(load_pretrained(GOLDEN / case, dtype=jnp.float32), prompts, max_new_tokens=64)
    np.testing.assert_array_equal(new, expected["new"])
