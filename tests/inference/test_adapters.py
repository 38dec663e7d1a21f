"""Several LoRA adapters at a time: each request has the logits and the text of its own merged model."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mla_moe
from mla_moe import ConfigError
from mla_moe.checkpoint.reader import open_adapter, open_checkpoint
from mla_moe.cli import main
from mla_moe.cli.generate import load_model_and_tokenizer
from mla_moe.cli.serve import load_adapters
from mla_moe.config import LoRAConfig, MeshConfig
from mla_moe.inference import prefix_cache, scheduler
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Request
from mla_moe.inference.weights import prepare_for_inference
from mla_moe.nn.abstract_model import AbstractModel, model_arrays
from mla_moe.nn.stacked_lora import AdapterWeights, stack_adapters
from mla_moe.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = "trained", "exported"


@pytest.fixture(scope="module")
def base():
    return mla_moe.load_pretrained(GOLDEN / "k2", dtype=np.float32)


@pytest.fixture(scope="module")
def adapters():
    """One that PEFT trained, one of other ranks and another scale, and one of the router alone."""
    checkpoint = open_checkpoint(GOLDEN / "k2")
    written = [open_adapter(GOLDEN / "lora" / name, checkpoint).weights() for name in NAMES]
    lora = LoRAConfig(rank=2, alpha=30.0, targets=("router",))
    model, random = AbstractModel(checkpoint.cfg, lora=lora), np.random.default_rng(3)
    shapes = {path: model.variables[path].get_value().shape for path in model.adapter_paths}
    factors = {path: random.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    return [*written, AdapterWeights({"moe_layers/moe/router/weight": 15.0}, factors)]


@pytest.fixture(scope="module")
def tokens():
    return np.load(GOLDEN / "lora" / "expected.npz")["tokens"][0]


@pytest.fixture(scope="module")
def wanted(base, adapters):
    """From the number of an adapter and tokens to the logits of its merged model; 0 is the base."""
    routed = merged(base, adapters[2])
    models = [base, *(mla_moe.load_pretrained(GOLDEN / "lora" / name, dtype=np.float32) for name in NAMES), routed]
    forward = jax.jit(lambda model, tokens: model(tokens))
    return lambda adapter, tokens: np.asarray(forward(models[adapter], jnp.asarray(tokens)))


def merged(model, adapter):
    """With the adapter of the router added to its weight."""
    weight = "moe_layers/moe/router/weight"
    a, b = (adapter.factors[f"moe_layers/moe/router/lora/weight/{factor}"] for factor in "ab")
    model = nnx.clone(model)
    router = model.moe_layers.moe.router
    router.weight[...] = router.weight[...] + adapter.scales[weight] * jnp.einsum("ldr,lre->lde", a, b)
    return model


@pytest.fixture(autouse=True)
def small_prefill_chunks(monkeypatch):
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK_SIZES", (8,))
    monkeypatch.setattr(scheduler, "PREFILL_BATCH", 2)
    monkeypatch.setattr(prefix_cache, "MIN_SHARED_PREFIX", 4)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_logits_are_those_of_the_merged_models(base, adapters, tokens, wanted, sharded):
    """In one batch: a prefill and two decode steps, as a scan over the layers with grouped matmuls."""
    model, context = stack_adapters(base, adapters), nullcontext()
    if sharded:
        mesh = make_mesh(MeshConfig(data=1, expert=2, tensor=2), jax.devices()[:4])
        abstract = AbstractModel(base.cfg)
        arrays = jax.device_put(model_arrays(base), abstract.shardings(mesh))
        graph, weights = prepare_for_inference(abstract.merge(arrays), adapters)
        model, context = graph.merge(weights), jax.set_mesh(mesh)

    @jax.jit
    def logits(tokens, ids):
        cache = model.init_cache(len(ids), tokens.shape[1])
        h, cache, _ = model.extend(tokens[:, :-2], cache, adapter_ids=ids, form="expanded")
        for i in (-2, -1):
            one, cache, _ = model.extend(tokens[:, i][:, None], cache, adapter_ids=ids)
            h = jnp.concatenate([h, one], axis=1)
        return model.logits(h)

    ids = [0, 1, 2, 3, 0, 2]
    with context:
        found = logits(jnp.asarray(np.stack([tokens[0]] * len(ids))), jnp.asarray(ids))
    expected = np.stack([wanted(adapter, tokens)[0] for adapter in range(4)])
    np.testing.assert_allclose(found, expected[ids], atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected[1:] - expected[0]).max(axis=(1, 2)).min() > 0.1


@pytest.fixture
def completions(base, adapters, tokens):
    """Requests of all adapters for the same prompts, in one batch on the CPU's path for experts. Slots are used again,
    and the prompts' entries are not those of another adapter."""
    prompts = [tokens[0, :9].tolist(), tokens[1, :9].tolist()]
    requests = [Request(prompt, 8, adapter=adapter) for adapter in (1, 0, 2, 3, 1) for prompt in prompts]
    engine = Engine(base, max_num_seqs=4, max_model_len=32, adapters=adapters)
    completions = [engine.submit(request) for request in requests]
    while engine.has_unfinished_requests:
        engine.step()
    with pytest.raises(ConfigError, match=r"adapter = 4: the engine has 3 adapters"):
        engine.submit(Request([1], 1, adapter=4))
    return completions


def test_text_of_each_request_is_that_of_its_merged_model(completions, wanted):
    texts = {}
    for completion in completions:
        request = completion.request
        assert texts.setdefault((request.adapter, request.prompt[0]), completion.tokens) == completion.tokens
        full = np.asarray([[*request.prompt, *completion.tokens]] * 2)
        logprobs = np.asarray(jax.nn.log_softmax(wanted(request.adapter, full)[0, 8:16]))
        assert completion.tokens == logprobs.argmax(axis=1).tolist()
        np.testing.assert_allclose(completion.logprobs, logprobs.max(axis=1), atol=3e-5)
    assert len({tuple(text) for text in texts.values()}) == len(texts) == 8


def test_clients_choose_an_adapter_by_the_model_of_a_request(base, completions, monkeypatch):
    serving = pytest.importorskip("tests.inference.serving")
    apps = []
    monkeypatch.setattr(serving.server, "serve", lambda app, *_: apps.append(app))
    monkeypatch.setattr("mla_moe.cli.serve.load_model_and_tokenizer", lambda _: (base, serving.TOKENIZER))
    paths = [f"--adapter={name}={GOLDEN / 'lora' / name}" for name in NAMES]
    assert main(["serve", str(GOLDEN / "k2"), *paths, "--max-num-seqs", "4", "--max-model-len", "32"]) == 0
    with serving.serving(apps[0]) as port:
        _, cards = serving.call(port, "/v1/models")
        assert [(card["id"], card["parent"]) for card in cards["data"]] == [("k2", None), *((n, "k2") for n in NAMES)]
        assert serving.call(port, "/v1/models/exported") == (200, cards["data"][2])
        for completion in completions[:6]:
            request, model = completion.request, ("k2", *NAMES)[completion.request.adapter]
            body = {"model": model, "prompt": list(request.prompt), "max_tokens": 8, "temperature": 0}
            status, response = serving.call(port, "/v1/completions", body)
            assert (status, response["model"]) == (200, model)
            assert response["choices"][0]["text"] == serving.decode(completion.tokens)
        for path, body in ("/v1/models/other", None), ("/v1/completions", {"model": "other", "prompt": [1]}):
            status, response = serving.call(port, path, body)
            assert (status, response["error"]["code"], response["error"]["param"]) == (404, "model_not_found", "model")
            assert "there is k2, trained, exported" in response["error"]["message"]


def test_an_adapter_that_names_another_base_is_noted(capsys, tmp_path):
    shutil.copytree(GOLDEN / "lora" / "trained", tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "a/b"}))
    load_adapters([f"one={GOLDEN / 'lora' / 'trained'}", f"two={tmp_path / 'moved'}"], GOLDEN / "k2")
    note = f"note: adapter two names the base hf://a/b, and is used with {GOLDEN / 'k2'}\n"
    assert capsys.readouterr().err == note


def test_generate_and_eval_merge_an_adapter_into_the_checkpoint(capsys, tmp_path, monkeypatch):
    """As its own directory, whose base is the same model, is merged; the base stays without it."""
    monkeypatch.setattr("mla_moe.cli.generate.ByteTokenizer", lambda: SimpleNamespace(vocab_size=32, name=""))
    monkeypatch.setattr("mla_moe.cli.generate.load_chat_tokenizer", lambda *_: None)
    shutil.copytree(GOLDEN / "k2", tmp_path / "base")
    found, _ = load_model_and_tokenizer(tmp_path / "base", GOLDEN / "lora" / "trained")
    assert capsys.readouterr().err.endswith(f"names the base {GOLDEN / 'k2'}, and is used with {tmp_path / 'base'}\n")
    merged = mla_moe.load_pretrained(GOLDEN / "lora" / "trained")
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(found), nnx.state(merged)))
    loaded, paths = [], (GOLDEN / "k2", GOLDEN / "lora" / "trained")
    for command in (["generate", "--prompt", "a"], ["eval", "--task", "arithmetic"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"mla_moe.cli.{command[0]}.load_model_and_tokenizer", lambda *paths: loaded.append(paths))
            with pytest.raises(TypeError, match="NoneType"):
                main([command[0], str(paths[0]), "--adapter", str(paths[1]), *command[1:]])
    assert loaded == [paths] * 2
    with pytest.raises(ConfigError, match=r"^adapter = .*k2': is neither a run nor a directory in PEFT's layout"):
        load_model_and_tokenizer(tmp_path / "base", GOLDEN / "k2")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["trained"], "adapter = 'trained': write NAME=PATH"),
        (["a=x", "a=y"], "each adapter needs a name of its own"),
        (["k2=lora/trained"], "adapter = 'k2': is the name of the model itself"),
        (["a=lora"], "is neither a run nor a directory in PEFT's layout"),
        (["a=broken"], "has NaN or infinity"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(base, values, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "lora", tmp_path / "lora")
    shutil.copytree(GOLDEN / "lora" / "trained", tmp_path / "broken")
    weights = tmp_path / "broken" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, weights)
    monkeypatch.setattr("mla_moe.cli.serve.load_model_and_tokenizer", lambda _: (base, None))
    assert main(["serve", str(GOLDEN / "k2"), *(f"--adapter={value}" for value in values)]) == 2
    assert message in capsys.readouterr().err
