import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_moe.config import ConfigError
from mla_moe.text.special_tokens import special_token_names
from mla_moe.text.tokenizer import ByteTokenizer, HFTokenizer, load_tokenizer, train_bpe

from ..golden.make_special_tokens import write_files

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "iota", "kappa", "lambda", "sigma", "omega"]
CORPUS = [f"def {a}_{b}({b}):\n    return {b} + {i}  # {a}\n" for i, a in enumerate(WORDS) for b in WORDS]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
SPECIAL_TOKENS = json.loads((Path(__file__).parents[1] / "golden" / "special_tokens.json").read_text())
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(CORPUS, 300, path)
    return HFTokenizer(path)


def write_tokenizer(path, special=(), plain=()):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(plain))
    tokenizer.save(str(path))
    return path


@settings(derandomize=True)
@given(text=TEXT)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@settings(derandomize=True)
@given(text=TEXT)
def test_bpe_round_trips_any_text(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32
    assert bpe.decode([bpe.bos_id, *ids, bpe.eos_id]) == text


def test_special_tokens_in_text_are_plain_text(bpe):
    ids = bpe.encode("<s>def</s>")
    assert not {bpe.bos_id, bpe.eos_id} & set(ids.tolist())
    assert bpe.decode(ids) == "<s>def</s>"


@pytest.mark.parametrize("which", ["byte", "bpe"])
def test_invalid_utf8_is_replaced(bpe, which):
    tokenizer = ByteTokenizer() if which == "byte" else bpe
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


@pytest.mark.parametrize("which", ["byte", "bpe"])
def test_the_bytes_of_tokens_join_to_the_text(bpe, which):
    tokenizer = ByteTokenizer() if which == "byte" else bpe
    text = "def é 日本 𝄞\ufffd"
    parts = [tokenizer.token_bytes(i) for i in [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id]]
    assert b"".join(parts) == text.encode()
    assert parts[0] == parts[-1] == b""
    assert "é".encode()[:1] in parts or which == "bpe"


def test_the_bytes_of_sentencepiece_tokens(tmp_path):
    """Parts of characters are spelled, and the space that starts a word is stripped from the start of a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁hello", "▁日", "ö"]
    model = tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    tokenizer, decoders = tokenizers.Tokenizer(model), tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sentencepiece = HFTokenizer(tmp_path / "tokenizer.json")
    ids = [1, 259, 260, 3 + 0xC3, 3 + 0xA9, 261, 2]
    assert sentencepiece.decode(ids) == "hello 日éö"
    parts = [b"", b" hello", " 日".encode(), b"\xc3", b"\xa9", "ö".encode(), b""]
    assert [sentencepiece.token_bytes(i) for i in ids] == parts


def test_bpe_has_the_requested_size_and_compresses(bpe):
    assert (bpe.vocab_size, bpe.bos_id, bpe.eos_id) == (300, 0, 1)
    assert len(bpe.encode(CORPUS[0])) < 0.6 * len(CORPUS[0])


def test_each_digit_is_a_token(bpe):
    assert len(bpe.encode("12345")) == 5


def test_the_same_text_gives_the_same_file(tmp_path):
    for name in "ab":
        train_bpe(CORPUS, 320, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a",
        "b",
        "tokenizer_config.json",
    ]  # and leaves nothing unfinished behind


def test_too_little_text_for_the_size_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"data.tokenizer = 'bpe:5000': the training text yields only \d+ tokens"):
        train_bpe(CORPUS, 5000, tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def test_bpe_training_reads_no_more_than_its_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("mla_moe.text.tokenizer._SAMPLE_CHARACTERS", 1000)
    read = []

    class Counted(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    with pytest.raises(ConfigError):
        train_bpe(Counted(CORPUS), 5000, tmp_path / "tokenizer.json")
    assert 10 < len(read) < 30


def test_a_run_trains_once_and_then_loads(tmp_path):
    first = load_tokenizer("bpe:300", tmp_path / "run", CORPUS)
    again = load_tokenizer("bpe:300", tmp_path / "run", ["other text"])
    assert first.encode(CORPUS[0]).tolist() == again.encode(CORPUS[0]).tolist()
    with pytest.raises(ConfigError, match="has 300 tokens; use another run_dir"):
        load_tokenizer("bpe:310", tmp_path / "run", CORPUS)


def test_a_run_initialized_from_a_checkpoint_takes_its_tokenizer(tmp_path, bpe):
    beside = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
    for name in beside[1:]:
        Path(bpe.name).with_name(name).write_text("{}")
    inherited = load_tokenizer("bpe:300", tmp_path, ["other text"], Path(bpe.name))
    assert inherited.encode(CORPUS[0]).tolist() == bpe.encode(CORPUS[0]).tolist()
    for name in ("tokenizer.json", *beside):
        assert (tmp_path / name).read_bytes() == Path(bpe.name).with_name(name).read_bytes()
    with pytest.raises(ConfigError, match=r"data.tokenizer = 'bpe:310': .* has 300 tokens; give .* that size"):
        load_tokenizer("bpe:310", tmp_path / "other", CORPUS, Path(bpe.name))
    assert not (tmp_path / "other").exists()


def test_the_spec_selects_the_tokenizer(tmp_path, bpe):
    assert load_tokenizer("byte", tmp_path, CORPUS).vocab_size == 258
    assert load_tokenizer(bpe.name, tmp_path, CORPUS).vocab_size == 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("special", "bos", "eos"),
    [
        (["<s>", "</s>"], "<s>", "</s>"),
        (["<pad>", *DEEPSEEK], *DEEPSEEK),
        (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),
        (["[BOS]"], "[BOS]", "[BOS]"),
    ],
)
def test_common_special_tokens_are_found(tmp_path, special, bos, eos):
    tokenizer = HFTokenizer(write_tokenizer(tmp_path / "tokenizer.json", special))
    ids = {name: 3 + i for i, name in enumerate(special)}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ids[bos], ids[eos])
    assert tokenizer.vocab_size == 3 + len(special)


@pytest.mark.parametrize("shape", [lambda name: name, lambda name: {"content": name, "lstrip": False}])
def test_tokenizer_config_takes_precedence(tmp_path, shape):
    path = write_tokenizer(tmp_path / "tokenizer.json", ["<s>", "</s>", "<go>", "<stop>"])
    config = {"bos_token": shape("<go>"), "eos_token": shape("<stop>")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert (HFTokenizer(path).bos_id, HFTokenizer(path).eos_id) == (5, 6)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": shape("<stop>")}))
    assert (HFTokenizer(path).bos_id, HFTokenizer(path).eos_id) == (3, 6)


@pytest.mark.parametrize("case", SPECIAL_TOKENS)
def test_special_tokens_are_those_of_transformers(tmp_path, case):
    *files, bos, eos, ids = case
    write_files(tmp_path, *files)
    assert special_token_names(tmp_path) == {k: v for k, v in (("bos_token", bos), ("eos_token", eos)) if v}
    tokenizer = HFTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("<s>a</s>", special=True).tolist() == ids
    assert tokenizer.decode(ids) == "a"
    if bos and eos:
        assert [tokenizer.bos_id, tokenizer.eos_id] == [ids[0], ids[-1]]


@pytest.mark.parametrize(
    ("flags", "ids", "text"), [({}, [64, 257, 220, 65], "a b"), ({"rstrip": True}, [64, 257, 65], "ab")]
)
def test_named_tokens_keep_their_flags_and_become_special(tmp_path, flags, ids, text):
    """As with transformers 5.23, whose values these are."""
    write_files(tmp_path, {"bos_token": "<s>", "eos_token": "</s>"}, {}, [])
    path = tmp_path / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_tokens([tokenizers.AddedToken("</s>", normalized=False, **flags)])
    tokenizer.save(str(path))
    assert HFTokenizer(path).encode("a</s> b", special=True).tolist() == ids
    assert HFTokenizer(path).decode(ids) == text


def test_unusable_files_are_errors(tmp_path):
    def refused(path):
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(str(path), tmp_path, CORPUS)
        assert caught.value.field == "data.tokenizer"
        return caught.value.message

    assert "no such file" in refused(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    assert "not a tokenizer.json" in refused(tmp_path / "broken.json")
    path = write_tokenizer(tmp_path / "plain.json", plain=["<s>"])  # a usual name, but an ordinary token
    assert "no bos or eos" in refused(path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<gone>"}')
    assert "no token '<gone>'" in refused(path)
    for token in ("3", "[]", '{"lstrip": true}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"bos_token": {token}}}')
        assert "bos_token in tokenizer_config.json must be a string" in refused(path)
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": 3}')
    assert "mask_token in tokenizer_config.json must be a string" in refused(path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": ["</s>"]}')
    assert "eos_token in special_tokens_map.json must be a string" in refused(path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    assert "is not JSON" in refused(path)
