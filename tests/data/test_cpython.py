from mla_moe.data import cpython, open_documents

TRAIN, HELDOUT = (cpython.documents(name) for name in cpython.NAMES)


def lines(text):
    return {line.strip() for line in text.splitlines()}


def test_sizes_suit_a_quickstart():
    train, heldout = (sum(len(text.encode()) for text in part) for part in (TRAIN, HELDOUT))
    assert 5e6 < train < 15e6
    assert 1e5 < heldout < 5e5
    assert 0.01 < len(HELDOUT) / len(TRAIN) < 0.06


def test_heldout_text_is_not_trained_on():
    assert not set(TRAIN) & set(HELDOUT)
    for text in HELDOUT:
        assert max(len(lines(text) & lines(other)) for other in TRAIN) <= len(lines(text)) / 2


def test_the_split_depends_on_names_alone():
    assert [cpython._is_heldout(key) for key in ("sched.py", "copyreg.py", "ast.py", "json/decoder.py")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_sources_and_reference_are_there_and_tables_are_not():
    keys = cpython._corpus().keys()
    assert "dataclasses.py" in keys
    assert not [key for key in keys if key.startswith(("encodings/", "test/", "site-packages/", "pydoc_data/"))]
    assert all(200 <= len(text.encode()) <= 200_000 for text in cpython._corpus().values())


def test_the_reference_is_read_without_running_it(tmp_path):
    path = tmp_path / "topics.py"
    path.write_text("import sys\nsys.exit(3)\ntopics = {'a': 'one '\n  'two', 'b': '''three'''}\n")
    assert cpython._topics(path) == {"a": "one two", "b": "three"}
    assert cpython._topics(tmp_path / "absent.py") == {}


def test_excerpts_of_longer_documents_are_dropped():
    long, other = "\n".join("abcdef"), "\n".join("uvwxa")
    assert cpython._deduplicate({"excerpt": "a\nb\nc", "long": long, "other": other}) == {
        "long": long,
        "other": other,
    }


def test_the_names_open_as_sources():
    source = open_documents(["cpython:heldout", "cpython:train"], field="data.train", text_field="text")
    assert list(source) == HELDOUT + TRAIN
