import hypothesis
import hypothesis.strategies as st
import numpy as np

from mla_moe.inference.request import Completion, Request
from mla_moe.rl.packing import microbatches, pack_completions

LENGTH = 12
SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=20)


def completions(sizes):
    rng = np.random.default_rng(0)
    for prompt, new in sizes:
        experts = rng.integers(0, 8, (prompt + new - 1, 2, 3)).astype(np.int16)
        prompt_ids, token_ids = (rng.integers(1, 99, count).tolist() for count in (prompt, new))
        logprobs = rng.normal(size=new).tolist()
        yield Completion(Request(prompt_ids, new), token_ids, logprobs, experts_TlK=experts)


@hypothesis.given(SIZES)
@hypothesis.settings(deadline=None, max_examples=50)
def test_every_token_is_packed_once(sizes):
    sampled = list(completions(sizes))
    packed = pack_completions(sampled, LENGTH, multiple=4)
    assert len(packed["tokens"]) % 4 == 0
    assert (packed["completion_BT"] >= 0).sum() == sum(new for _, new in sizes)
    assert (packed["segment_ids"] > 0).sum() == sum(prompt + new - 1 for prompt, new in sizes)
    for index, completion in enumerate(sampled):
        row, position = np.nonzero(packed["completion_BT"] == index)
        assert len(set(row)) == 1, "a completion is not split over packed sequences"
        np.testing.assert_array_equal(packed["targets"][row, position], completion.tokens)
        np.testing.assert_allclose(packed["sampler_logprob_BT"][row, position], np.float32(completion.logprobs))
        segment = packed["segment_ids"][row[0], position[0]]
        same = packed["segment_ids"][row[0]] == segment
        token_ids = [*completion.request.prompt, *completion.tokens]
        np.testing.assert_array_equal(packed["tokens"][row[0], same], token_ids[:-1])
        np.testing.assert_array_equal(packed["positions"][row[0], same], np.arange(len(token_ids) - 1))
        np.testing.assert_array_equal(packed["replay"][row[0], same], completion.experts_TlK)
    padding = packed["segment_ids"] == 0
    assert (packed["replay"][padding] == -1).all()
    assert (packed["completion_BT"][padding] == -1).all()


def test_packed_sequences_are_filled():
    packed = pack_completions(list(completions([(3, 3)] * 16)), LENGTH, multiple=1)
    assert len(packed["tokens"]) == 8
    assert "replay" not in pack_completions([Completion(Request([1], 1), [2], [0.0])], LENGTH, 1)


def test_microbatches_keep_the_order():
    packed = pack_completions(list(completions([(6, 6)] * 6)), LENGTH, multiple=2)
    batches = microbatches(packed, 2)
    assert len(batches) == 3
    for name in packed:
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), packed[name])
