"""Every architecture of the registry but DeepSeek's own: what transformers 5.24.0 computes of tiny random models
(`tests/golden/make_family.py`). DeepSeek's own are in `test_golden.py`."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mla_moe import generate, load_pretrained, save_pretrained
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.files import CheckpointError
from mla_moe.checkpoint.hf_mapping import by_tensor, tensor_mappings
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.checkpoint.safetensors_writer import TensorEntry, write_checkpoint
from mla_moe.nn.abstract_model import AbstractModel, model_arrays
from tests.golden.family import CASES, HERE, NEW_TOKENS, batch, cotangent, projections, prompts, weights

FIRST = [case for case in CASES if case.endswith("_1")]
REST = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in FIRST]


def write(case, path, extra=None):
    """The checkpoint of a case as transformers saves it, with `extra` tensors by their shapes, and its golden file."""
    golden = np.load(HERE / f"{case}.npz")
    tensors = weights(case, json.loads(str(golden["tensors"])) | (extra or {}))
    dtypes = {name: np.dtype(np.float32 if name.endswith("bias") else ml_dtypes.bfloat16) for name in tensors}
    entries = [TensorEntry(n, dtypes[n], t.shape, lambda t=t: [t]) for n, t in tensors.items()]
    write_checkpoint(path, dict(CASES[case]), entries, 1 << 30, {})
    return golden


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A case's directory and golden file, written once."""
    written = {}

    def get(case):
        if case not in written:
            directory = tmp_path_factory.mktemp("family") / case
            written[case] = directory, write(case, directory)
        return written[case]

    return get


@pytest.mark.parametrize("case", [*FIRST, *REST])
def test_logits_and_gradients_equal_transformers(case, checkpoint):
    directory, golden = checkpoint(case)
    model, weights = load_pretrained(directory, dtype=jnp.float32), cotangent(case)
    inputs = jax.tree.map(jnp.asarray, batch(case))
    arrays, abstract = model_arrays(model), AbstractModel(model.cfg)
    trained = {path: arrays[path] for path in abstract.param_paths}

    @jax.jit
    def run(trained):
        logits = abstract.merge(arrays | trained)(**inputs)
        return (logits * weights).sum(), logits

    (_, logits), gradients = jax.value_and_grad(run, has_aux=True)(trained)
    real = batch(case)["segment_ids"] != 0
    assert np.abs(np.asarray(logits) - golden["logits"])[real].max() <= 2e-4
    names = json.loads(str(golden["names"]))
    expected = dict(zip(names, golden["gradients"], strict=True))
    compared = [p for p in by_tensor(tensor_mappings(model.cfg, copies=False)) if p[0].name in expected]
    assert {name for name, (norm, *_) in expected.items() if norm} <= {parts[0].name for parts in compared}
    for parts in compared:
        name, shape = parts[0].name, parts[0].stacked_shape or parts[0].shape
        ours = np.concatenate([m.to_hf_tensor(np.asarray(gradients[m.path])[m.index]) for m in parts]).reshape(shape)
        np.testing.assert_allclose(
            projections(case, name, ours), expected[name], atol=1e-3 * expected[name][0] + 1e-7, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("num_nextn_predict_layers")])
def test_mtp_module_equals_transformers(case, checkpoint):
    directory, golden = checkpoint(case)
    model, tokens = load_pretrained(directory, dtype=jnp.float32), jnp.asarray(batch(case)["tokens"][:1])
    h, _ = model.hidden(tokens)
    logits = model.logits(model.mtp_hidden(h[:, :-1], tokens[:, 1:])[0])
    np.testing.assert_allclose(logits, golden["mtp_logits"], atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_greedy_text_equals_transformers(case, checkpoint):
    directory, golden = checkpoint(case)
    new = generate(load_pretrained(directory, dtype=jnp.float32), prompts(case), max_new_tokens=NEW_TOKENS)
    np.testing.assert_array_equal(new, golden["text"])


@pytest.mark.parametrize("case", [*FIRST, *REST])
def test_conversion_to_orbax_and_back_and_saving_keep_every_byte(case, checkpoint, tmp_path):
    """As does saving the loaded model. transformers loads both (`make_family.py --check`)."""
    directory, _ = checkpoint(case)
    convert(directory, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    save_pretrained(load_pretrained(directory), tmp_path / "saved", like=directory)
    want = SafetensorsReader(directory)
    for name in ("back", "saved"):
        got = SafetensorsReader(tmp_path / name)
        assert set(got.stored) == set(want.stored)
        for tensor, location in want.stored.items():
            assert got.stored[tensor].dtype == location.dtype
            assert got[tensor].tobytes() == want[tensor].tobytes(), tensor


def test_quantization_beside_a_vision_tower_is_not_claimed_of_weights_in_bfloat16(tmp_path):
    write("kimi_k25_1", tmp_path / "released", {"vision_tower.bias": ()})
    file = tmp_path / "released" / "config.json"
    config = json.loads(file.read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    file.write_text(json.dumps(config | {"text_config": config["text_config"] | {"quantization_config": quantization}}))
    convert(tmp_path / "released", tmp_path / "copy")
    convert(tmp_path / "released", tmp_path / "orbax", to="orbax")
    for name in ("copy", "orbax"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["text_config"] == config["text_config"]
        assert "quantization_config" not in written
    assert SafetensorsReader(tmp_path / "copy").stored["vision_tower.bias"].shape == (), "a number is kept too"


def test_norm_that_dense_layers_of_axk1_do_not_use_is_kept_and_named(tmp_path, caplog):
    name = "model.layers.0.post_mlp_layernorm.weight"
    write("axk1_1", tmp_path / "released", {name: (15,)})
    convert(tmp_path / "released", tmp_path / "copy", dtype=np.float32)
    assert name in SafetensorsReader(tmp_path / "copy").stored
    load_pretrained(tmp_path / "copy")
    assert f"1 tensors are no part of the model and not used, {name} among them" in caplog.text
    write("axk1_1", tmp_path / "other", {"model.layers.1.post_mlp_layernorm.bias": (15,)})
    with pytest.raises(CheckpointError, match=r"layers.1.post_mlp_layernorm.bias is unknown"):
        load_pretrained(tmp_path / "other")
