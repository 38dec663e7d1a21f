import collections
import contextlib
import itertools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mla_moe.config import ConfigError, DataConfig
from mla_moe.data import Batches, open_documents, train_batches
from mla_moe.data.packing import pack_documents
from mla_moe.text.tokenizer import ByteTokenizer

BYTE = ByteTokenizer()
FIELDS = ["tokens", "targets", "segment_ids", "positions"]


@contextlib.contextmanager
def stream(source, *, data=None, length=16, batch=4, seed=0, **process):
    data = data or DataConfig(shuffle_buffer_size=32, prefetch=2)
    batches = train_batches(data, source, BYTE, batch_size=batch, sequence_length=length, seed=seed, **process)
    try:
        yield batches
    finally:
        batches.close()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def varied(count, longest=90):
    sizes = np.random.default_rng(0).integers(0, longest, count)
    return [chr(97 + i % 26) * int(size) for i, size in enumerate(sizes)]


def windows_of(batch):
    """Every segment of a batch as (tokens, targets), after checking how rows are laid out."""
    found = []
    for tokens, targets, segments, positions in zip(*(batch[f] for f in FIELDS), strict=True):
        used = int((segments > 0).sum())
        assert segments[used:].tolist() == [0] * (len(segments) - used)  # padding only at the end
        assert not tokens[used:].any()
        assert not targets[used:].any()
        assert not positions[used:].any()
        starts = [i for i in range(used) if i == 0 or segments[i] != segments[i - 1]]
        assert segments[starts].tolist() == list(range(1, len(starts) + 1))  # contiguous, counted from 1
        for start, end in itertools.pairwise([*starts, used]):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append((tuple(tokens[start:end].tolist()), tuple(targets[start:end].tolist())))
    return found


def expected_windows(text, length):
    ids = [BYTE.bos_id, *text.encode(), BYTE.eos_id] if text else []
    return [
        (tuple(ids[i : min(i + length, len(ids) - 1)]), tuple(ids[i + 1 : i + 1 + length]))
        for i in range(0, len(ids) - 1, length)
    ]


def test_empty_documents_are_not_trained_on():
    """Of three documents two are empty. As `bos eos` they would make P(eos | bos) two thirds."""
    with stream(["", *names(1), ""] * 40) as batches:
        found = {window for batch in take(batches, 9) for window in windows_of(batch)}
    assert found == set(expected_windows(*names(1), 16))


def test_training_batches_carry_whole_epochs():
    documents = varied(40)
    with stream(documents) as batches:
        found = [window for batch in take(batches, 100) for window in windows_of(batch)]
    counts = collections.Counter(found)
    expected = collections.Counter(w for text in documents for w in expected_windows(text, 16))
    assert counts.keys() == expected.keys()
    epochs = len(found) / expected.total()
    assert epochs > 2
    for window, count in expected.items():  # what is in flight at the end is part of an epoch or two
        assert abs(counts[window] - epochs * count) <= 2 * count


def test_batches_have_their_shape_and_type():
    with stream(varied(40), batch=3, length=24) as batches:
        batch = next(batches)
    assert sorted(batch) == sorted([*FIELDS, "documents"])
    assert all(batch[f].shape == (3, 24) and batch[f].dtype == np.int32 for f in FIELDS)


def names(count):
    """Documents of 15 bytes: each fills a sequence of 16 alone, so that a row tells which it is."""
    return [f"{i:015d}" for i in range(count)]


def order(batches, count):
    return [int(BYTE.decode(batch["tokens"][0])) for batch in take(batches, count)]


IN_ORDER = DataConfig(shuffle_buffer_size=1)


@pytest.mark.parametrize("count", [1, 3])
def test_processes_share_every_epoch(count):
    orders = []
    for index in range(count):
        with stream(names(10), data=IN_ORDER, batch=1, shard=index, shards=count) as batches:
            length = len(range(index, 10, count))
            orders.append((order(batches, length), order(batches, length)))
    for epoch in zip(*orders, strict=True):
        assert sorted(i for part in epoch for i in part) == list(range(10))
    assert [first for first, _ in orders] != [second for _, second in orders]


def test_order_changes_with_epoch_and_seed_and_only_with_them():
    def epochs(seed):
        with stream(names(20), data=IN_ORDER, batch=1, seed=seed) as batches:
            return [tuple(order(batches, 20)) for _ in range(3)]

    assert epochs(0) == epochs(0)
    assert len({*epochs(0), *epochs(1), *epochs(2)}) == 9  # no seed repeats an epoch of another


def test_a_window_keeps_a_long_document_from_filling_batches():
    documents = ["a" * 16 * 64, *(chr(98 + i % 20) * 15 for i in range(64))]

    def most_of_it(window):
        with stream(documents, data=DataConfig(shuffle_buffer_size=window), batch=8) as batches:
            return max(int((batch["tokens"][:, 1] == ord("a")).sum()) for batch in take(batches, 16))

    assert most_of_it(1) == 8
    assert most_of_it(128) < 8


def equal(a, b):
    return all(np.array_equal(a[f], b[f]) for f in FIELDS)


@pytest.mark.parametrize("window", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (32, 50))])
def test_a_saved_place_resumes_with_the_very_next_batch(window):
    """At the start, within a shuffle window, at its end, within and at the end of what is packed at once (32 batches),
    and in a later epoch."""
    source, data = varied(60), DataConfig(shuffle_buffer_size=window, prefetch=3)
    places = [0, 1, 7, 8, 9, 12, 13, 25, 31, 32, 33, 64, 100]
    with stream(source, data=data) as batches:
        states, seen = {}, []
        for step in range(places[-1] + 40):
            if step in places:
                states[step] = json.dumps(batches.get_state())
            seen.append(next(batches))
        batches.set_state(json.loads(states[33]))  # back, in the iterator that ran ahead
        assert all(equal(batch, next(batches)) for batch in seen[33:60])
    for step, state in states.items():
        with stream(source, data=data) as batches:
            batches.set_state(json.loads(state))
            assert batches.get_state() == json.loads(state)
            assert all(equal(batch, next(batches)) for batch in seen[step : step + 40]), step


def test_orbax_saves_and_restores_the_place(tmp_path):
    source = varied(60)
    with ocp.CheckpointManager(tmp_path) as manager, stream(source) as batches:
        take(batches, 37)
        manager.save(37, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        ahead = take(batches, 20)
    with ocp.CheckpointManager(tmp_path) as manager, stream(source) as batches:
        take(batches, 5)
        manager.restore(37, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(batches)))
        assert all(equal(batch, next(batches)) for batch in ahead)


def test_restoring_reads_what_was_in_flight_and_not_the_epoch():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    with stream(names(4000), data=DataConfig()) as batches:
        take(batches, 900)  # 3,600 documents
        state = batches.get_state()
    source = Counted(names(4000))
    with stream(source, data=DataConfig()) as batches:
        batches.set_state(state)
        next(batches)
    assert source.reads < 1000


def test_a_broken_document_stops_training_with_its_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 30 + "{broken\n")
    source = open_documents([str(path)], field="data.train", text_field="text")
    with stream(source) as batches, pytest.raises(ConfigError, match=r"a\.jsonl, line 31"):
        take(batches, 100)


def test_more_streams_than_documents_are_refused():
    with pytest.raises(ConfigError, match="2 documents cannot feed 3 streams"):
        train_batches(DataConfig(), ["a", "b"], BYTE, batch_size=1, sequence_length=8, seed=0, shards=3)


def test_a_long_text_is_tokenized_in_pieces(monkeypatch):
    monkeypatch.setattr("mla_moe.data.packing._PIECE", 100)
    text, sizes = "aß日😀" * 99, []

    class Recorder(ByteTokenizer):
        def encode(self, text, *, special=False):
            sizes.append(len(text))
            return super().encode(text)

    packed = next(iter(pack_documents(grain.MapDataset.source([text]), Recorder(), 2000)))
    assert sizes == [100, 100, 100, 96]
    assert BYTE.decode(packed["tokens"]).rstrip("\0") == text


def test_sources_have_the_share_of_their_weight():
    """Of ten documents and of two, with three times as many sequences from the two; and a saved position resumes."""
    source = ["a" * 40] * 10 + ["b" * 40] * 2
    data = DataConfig(train=("a", "b"), weights=(1.0, 3.0), shuffle_buffer_size=8, prefetch=2)
    ranges = {"a": range(10), "b": range(10, 12)}
    with stream(source, data=data, ranges=ranges, shards=2, shard=1) as batches:
        rows = [row for batch in take(batches, 30) for row in batch["tokens"].tolist()]
        state, following = batches.get_state(), take(batches, 3)
    only_a, only_b = ([row for row in rows if ord(letter) in row] for letter in "ab")
    assert len(only_a) + len(only_b) == len(rows) == 120, "no sequence has both"
    assert len(only_a) == pytest.approx(30, abs=4)
    with stream(source, data=data, ranges=ranges, shards=2, shard=1) as batches:
        batches.set_state(state)
        for again, batch in zip(take(batches, 3), following, strict=True):
            np.testing.assert_array_equal(again["tokens"], batch["tokens"])
    with (
        pytest.raises(ConfigError, match=r"data.weights = 'b': has 2 documents of its own, too few for 3 streams"),
        stream(source, data=data, ranges=ranges, shards=3),
    ):
        pass


def in_streams(source, ranges, *, processes, streams=4, data=None, start=None, batch_size=8):
    """`Batches` of each process, and their global batches."""
    data = data or DataConfig(shuffle_buffer_size=8, prefetch=2)

    def open_stream(number):
        sizes = {"batch_size": batch_size // streams, "sequence_length": 16, "shards": streams}
        return train_batches(data, source, BYTE, seed=0, shard=number, ranges=ranges, **sizes)

    rows = [slice(batch_size // processes * p, batch_size // processes * (p + 1)) for p in range(processes)]
    readers = [Batches(open_stream, mine, batch_size, streams) for mine in rows]
    if start:
        for reader in readers:
            reader.restore(start.__getitem__)
    return readers


def global_batch(readers):
    parts = [next(reader) for reader in readers]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}
    return joined | {"documents": sum(part["documents"] for part in parts)}


def test_the_order_is_the_same_with_one_two_and_four_processes():
    """Global batches and the count of documents, of two sources, one of which has empty documents; from the start with
    two processes, and resumed with four."""
    source, ranges = [*varied(30), *names(20)], {"a": range(30), "b": range(30, 50)}
    expected, states = [], {}
    with contextlib.closing(in_streams(source, ranges, processes=1)[0]) as reader:
        for step in range(12):
            expected.append(global_batch([reader]))
            if step == 5:
                states = reader.states()
    for processes, start, batches in ((2, None, expected), (4, states, expected[6:])):
        with contextlib.ExitStack() as at_exit:
            readers = in_streams(source, ranges, processes=processes, start=start)
            for reader in readers:
                at_exit.enter_context(contextlib.closing(reader))
            for batch in batches:
                found = global_batch(readers)
                assert equal(found, batch)
                assert found["documents"].tolist() == batch["documents"].tolist()


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_documents_are_counted_by_source_when_they_are_trained_on(weights):
    """In several windows each counts once, where it begins; empty ones do not count."""
    long, short = ["a" * 40, "", "b" * 5] * 8, ["c" * 3] * 20
    source, ranges = [*long, *short], {"long": range(24), "short": range(24, 44)}
    data = DataConfig(train=("long", "short"), weights=weights, shuffle_buffer_size=4)
    begun = collections.Counter()
    with contextlib.closing(in_streams(source, ranges, processes=1, streams=1, data=data)[0]) as reader:
        for _ in range(16):
            batch = next(reader)
            begins = (batch["positions"] == 0) & (batch["tokens"] == BYTE.bos_id)
            begun["short"] += int((begins & (batch["targets"] == ord("c"))).sum())
            begun["long"] += int((begins & (batch["targets"] != ord("c"))).sum())
            assert batch["documents"].tolist() == [begun["long"], begun["short"]]
    assert begun["long"] > 16  # more than an epoch


def test_another_batch_size_resumes_with_the_next_sequences():
    """Of each stream: the place is one in the data, not a number of steps."""
    source, ranges = varied(30), {"a": range(30)}
    with contextlib.closing(in_streams(source, ranges, processes=1, streams=2)[0]) as reader:
        for _ in range(3):
            next(reader)
        states, after = reader.states(), [next(reader) for _ in range(6)]
    (reader,) = in_streams(source, ranges, processes=1, streams=2, batch_size=24, start=states)
    with contextlib.closing(reader):
        large = [next(reader) for _ in range(2)]
    for name in FIELDS:
        streams = (np.stack([batch[name] for batch in batches]) for batches in (after, large))
        small, found = (np.stack(np.split(rows, 2, axis=1)).reshape(2, 24, 16) for rows in streams)
        np.testing.assert_array_equal(found, small)
    assert large[-1]["documents"].tolist() == after[-1]["documents"].tolist()
    with pytest.raises(ConfigError, match=r"^data.streams = 1: the checkpoint's position is in 2"):
        in_streams(source, ranges, processes=1, streams=1, start=states)
