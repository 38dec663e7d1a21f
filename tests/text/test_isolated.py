"""Hostile chat templates and tokenizers fail the calls that use them, within limits; the next call works."""

import json
import os
import resource

import pytest

from mla_moe import ConfigError
from mla_moe.inference.request import MAX_TEXT, Completion, IncrementalDetokenizer, Request
from mla_moe.text import isolated, worker
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.special_tokens import MAX_TOKEN_CHARACTERS
from mla_moe.text.tokenizer import ByteTokenizer, HFTokenizer, train_bpe

MESSAGES = [{"role": "user", "content": "hello"}]
GOOD = "{% for m in messages %}{{ m.content }}{% endfor %}"
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
NEVER_ENDS = {"Regex": "(a+)+$"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The contents of a small tokenizer.json."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(["hello there, how are you? " * 4], 270, path)
    return json.loads(path.read_text())


@pytest.fixture
def write(source, tmp_path):
    """Write a directory with changes to its tokenizer, and a template."""

    def write(template=GOOD, **changes):
        (tmp_path / "tokenizer.json").write_text(json.dumps(source | changes))
        (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return write


@pytest.fixture
def short(write, monkeypatch):
    """A shorter time limit, for what uses all of it."""
    opened(write()).encode_chat(MESSAGES)  # starts the worker, with the usual limit
    monkeypatch.setattr(isolated, "SECONDS", 0.5)


def opened(directory):
    return load_chat_tokenizer(directory, HFTokenizer(directory / "tokenizer.json"))


@pytest.fixture(autouse=True)
def _memory_stays_small():
    yield
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1 << 20, "in KB"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "hung: no reply within"),
        ("{{ 9 ** (9 ** 9) }}", "hung: no reply within"),
        ("{{ 'a' * 10**9 }}", "Memory"),
        ("{{ '%1000000000d'|format(1) }}", "Memory"),
        ("{% for i in range(99) %}{{ 'ab ' * 10**6 }}{% endfor %}", "the tokenizer or its chat template failed"),
        ("{{ range(10**9)|list }}", "Range too big"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("\N{BLACK STAR}{{ '\\ud800' }}", "lone surrogate"),
    ],
)
def test_a_hostile_template_fails_its_own_chats(write, short, monkeypatch, template, why):
    directory = write()
    good = opened(directory)
    bad = opened(write(template))
    with pytest.raises(ConfigError, match=f"^messages = .*{why}"):
        bad.encode_chat(MESSAGES)
    monkeypatch.undo()
    assert good.decode(good.encode_chat(MESSAGES)) == "hello"


def test_opening_again_and_imports_are_not_within_the_limit_of_a_call(write, monkeypatch):
    language, limits, call = opened(write()), [], isolated.WorkerProcess.call
    isolated.text_worker().end()

    def record(process, seconds, name, *arguments):
        limits.append((name, seconds))
        return call(process, seconds, name, *arguments)

    monkeypatch.setattr(isolated.WorkerProcess, "call", record)
    assert language.decode(language.encode_chat(MESSAGES)) == "hello"
    assert limits == [("prepare", 60), ("encode_chat", 6)]


def test_a_template_is_compiled_once(write, monkeypatch):
    environment = pytest.importorskip("jinja2.sandbox").ImmutableSandboxedEnvironment
    compile_, compiled = environment.from_string, []
    monkeypatch.setattr(environment, "from_string", lambda *call: compiled.append(call) or compile_(*call))
    call, path = worker.open_service(print)[0], str(write() / "tokenizer.json")
    call("prepare", path, "encode_chat")
    replies = [call("encode_chat", path, "{{ bos_token }}", {"bos_token": name}, MESSAGES) for name in "aaba"]
    assert [kind for kind, _ in replies] == ["value"] * 4
    assert replies[0] == replies[1] == replies[3] != replies[2]
    assert len(compiled) == 2


def test_a_worker_that_cannot_start_says_why(write, monkeypatch):
    isolated.text_worker().end()
    monkeypatch.setattr(worker, "__file__", "/nowhere/worker.py")
    with pytest.raises(ConfigError, match=r"templates cannot start: FileNotFoundError: .*/nowhere/worker.py'$"):
        opened(write())


@pytest.mark.parametrize(
    ("pre_tokenizer", "text", "why"),
    [
        ({"type": "Split", "pattern": NEVER_ENDS, "behavior": "Isolated", "invert": False}, "a" * 40 + "b", "retry-"),
        ({"type": "FixedLength", "length": 0}, "a", "chunk size must be non-zero"),
    ],
)
def test_a_panic_of_a_tokenizer_is_an_error_here_and_in_the_worker(write, pre_tokenizer, text, why):
    directory = write(pre_tokenizer=pre_tokenizer)
    tokenizer = opened(directory)
    for encode in (tokenizer.encode, tokenizer.encode_raw):
        with pytest.raises(ConfigError, match=f"^prompt = .*{why}"):
            encode(text)
    with pytest.raises(ConfigError, match=f"^data.tokenizer = .* cannot encode .*{why}"):
        HFTokenizer(directory / "tokenizer.json").encode(text)
    assert tokenizer.encode("")


def test_a_tokenizer_that_makes_a_text_a_terabyte_long_fails_that_text(write, short, monkeypatch):
    tokenizer = opened(write(normalizer={"type": "Sequence", "normalizers": [DOUBLED] * 40}))
    with pytest.raises(ConfigError, match=r"^prompt = 'a': .*its process (hung|died)"):
        tokenizer.encode("a")
    monkeypatch.undo()
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA/wAAAAA="}}, "its process died"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "is not a tokenizer.json: Precompiled"),
        ({"decoder": {"type": "Replace", "pattern": NEVER_ENDS, "content": ""}}, "has the decoder"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, DOUBLED]}}, "has the decoder"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 40}}, "has the decoder"),
        ({"decoder": {"type": "BPEDecoder", "suffix": ""}}, "has the decoder"),
        ({"model": {"type": "BPE", "vocab": {"a" * 16385: 0}, "merges": []}}, "has a token of 16385 characters"),
        ({"model": {"type": "BPE", "vocab": {"a": 1 << 32}, "merges": []}}, "is not a tokenizer.json"),
        ({"model": 3}, "is not a tokenizer.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_opened_or_could_block_decoding_is_refused(write, changes, why):
    with pytest.raises(ConfigError, match=f"^data.tokenizer = .*{why}"):
        opened(write(**changes))


def test_ids_far_above_the_number_of_tokens_take_no_memory(write):
    path = write(model={"type": "BPE", "vocab": {"a": 10**9}, "merges": []}) / "tokenizer.json"
    assert HFTokenizer(path).vocab_size == 10**9 + 1


def test_a_panic_of_the_decoder_is_an_error(write):
    tokenizer = opened(write(decoder={"type": "Strip", "content": "h", "start": 1, "stop": 1}))
    token = tokenizer.encode("h")[-1]
    with pytest.raises(ConfigError, match=r"^tokenizer = .*cannot decode 1 tokens: slice index"):
        tokenizer.decode([token])
    completion = Completion(Request([0], 4), detokenizer=IncrementalDetokenizer(tokenizer.decode))
    completion.append_tokens([token, token], [0.0, 0.0])  # as the engine does, whose other requests go on
    assert (completion.finish_reason, completion.tokens, completion.text) == ("error", [token], "")


@pytest.mark.parametrize("end", ["a", "\ufffd"])
def test_the_text_of_a_completion_and_what_a_token_decodes_are_bounded(end):
    piece, decoded = "a" * (MAX_TOKEN_CHARACTERS - 1) + end, []
    stream = IncrementalDetokenizer(lambda ids: decoded.append(len(ids)) or piece * len(ids))
    for _ in range(MAX_TEXT // len(piece) - 8):
        stream.add([0])
    assert max(decoded) <= 10
    with pytest.raises(ConfigError, match=r"^tokens = .* have more than 4,194,304 characters"):
        stream.add([0] * 16)


def test_bytes_need_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "WorkerProcess", None)
    monkeypatch.setattr(isolated.text_worker(), "_process", None)
    assert load_chat_tokenizer(tmp_path, ByteTokenizer()).encode_raw("a") == [256, 97]


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "loop", "dangling", "sparse", "bytes"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_what_is_no_file_of_that_kind_is_refused_before_it_is_opened(write, name, kind):
    path = write() / name
    path.unlink(missing_ok=True)
    make_unreadable(path, kind)
    with pytest.raises(ConfigError, match=f"{name}.*(is not a regular file|no such file|is larger than|is not UTF-8)"):
        opened(path.parent)


def make_unreadable(path, kind):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(b"\xff\xfe{")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(10**11)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": path.with_name("none")}[kind])
