import hypothesis
import hypothesis.strategies as st
import numpy as np

from mla_moe.rl.packing import SampledCompletion, microbatches, pack_completions

LENGTH = 12
SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=20)


def answers(sizes):
    draw = np.random.default_rng(0)
    for prompt, new in sizes:
        experts = draw.integers(0, 8, (prompt + new - 1, 2, 3)).astype(np.int16)
        yield SampledCompletion(
            draw.integers(1, 99, prompt).tolist(),
            draw.integers(1, 99, new).tolist(),
            draw.normal(size=new).tolist(),
            experts,
        )


@hypothesis.given(SIZES)
@hypothesis.settings(deadline=None, max_examples=50)
def test_every_token_is_there_once(sizes):
    given = list(answers(sizes))
    rows = pack_completions(given, LENGTH, multiple=4)
    assert len(rows["tokens"]) % 4 == 0
    assert (rows["answer_BT"] >= 0).sum() == sum(new for _, new in sizes)
    assert (rows["segment_ids"] > 0).sum() == sum(answer.size for answer in given)
    for index, answer in enumerate(given):
        row, place = np.nonzero(rows["answer_BT"] == index)
        assert len(set(row)) == 1, "an answer is whole within a row"
        np.testing.assert_array_equal(rows["targets"][row, place], answer.tokens)
        np.testing.assert_allclose(rows["sampler_logprob_BT"][row, place], np.float32(answer.logprobs))
        segment = rows["segment_ids"][row[0], place[0]]
        mine = rows["segment_ids"][row[0]] == segment
        np.testing.assert_array_equal(rows["tokens"][row[0], mine], [*answer.prompt, *answer.tokens][:-1])
        np.testing.assert_array_equal(rows["positions"][row[0], mine], np.arange(answer.size))
        np.testing.assert_array_equal(rows["replay"][row[0], mine], answer.experts_TlK)
    empty = rows["segment_ids"] == 0
    assert (rows["replay"][empty] == -1).all()
    assert (rows["answer_BT"][empty] == -1).all()


def test_rows_are_well_filled():
    rows = pack_completions(list(answers([(3, 3)] * 16)), LENGTH, multiple=1)
    assert len(rows["tokens"]) == 8
    assert "replay" not in pack_completions([SampledCompletion([1], [2], [0.0], None)], LENGTH, 1)


def test_parts_are_the_rows_in_order():
    rows = pack_completions(list(answers([(6, 6)] * 6)), LENGTH, multiple=2)
    again = microbatches(rows, 2)
    assert len(again) == 3
    for name in rows:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in again]), rows[name])
