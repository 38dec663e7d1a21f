"""Adapters in PEFT's layout: read, merged, written, and refused. Logits are PEFT's (tests/golden/make_lora.py)."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mla_moe
from mla_moe import ConfigError, LoRAConfig
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.peft import write_peft
from mla_moe.checkpoint.reader import load_arrays, open_checkpoint
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.config import MeshConfig
from mla_moe.nn.abstract_model import AbstractModel, model_variables
from mla_moe.parallel.mesh import make_mesh
from tests.golden.export_lora import random_adapters

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "lora" / "expected.npz")


@pytest.mark.parametrize("name", ["trained", "exported"])
def test_logits_are_those_of_peft(expected, name):
    """Adapters that PEFT wrote, and adapters that this package wrote, merged on the host and beside their weights."""
    tokens = jnp.asarray(expected["tokens"][0])
    logits = mla_moe.load_pretrained(GOLDEN / "lora" / name, dtype=np.float32)(tokens)
    np.testing.assert_allclose(logits, expected[name], atol=1e-4)
    source, mesh = open_checkpoint(GOLDEN / "lora" / name), make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = AbstractModel(source.cfg, lora=source.lora)
    model = abstract.merge(load_arrays(source.unmerged(), abstract, mesh))
    np.testing.assert_allclose(model(tokens), expected[name], atol=1e-4)
    merged = mla_moe.merge_adapters(model)
    np.testing.assert_allclose(merged(tokens), expected[name], atol=1e-4)
    assert not any("lora" in path for path in model_variables(merged))


def same_tensors(a, b):
    first, second = SafetensorsReader(a), SafetensorsReader(b)
    assert first.stored.keys() == second.stored.keys()
    for tensor in first.stored:
        np.testing.assert_array_equal(first[tensor], second[tensor])


def test_written_files_are_the_committed_ones_and_read_back(tmp_path):
    """Those that PEFT's logits are of; and PEFT's own tensors come back unchanged."""
    write_peft(random_adapters(), tmp_path / "new", None)
    same_tensors(tmp_path / "new", GOLDEN / "lora" / "exported")
    configs = [path / "adapter_config.json" for path in (tmp_path / "new", GOLDEN / "lora" / "exported")]
    assert configs[0].read_text() == configs[1].read_text()
    convert(GOLDEN / "lora" / "trained", tmp_path / "again")
    same_tensors(tmp_path / "again", GOLDEN / "lora" / "trained")


def test_merged_checkpoint_is_complete(expected, tmp_path):
    convert(GOLDEN / "lora" / "trained", tmp_path / "merged", dtype=np.float32, merge_adapter=True)
    logits = mla_moe.load_pretrained(tmp_path / "merged")(jnp.asarray(expected["tokens"][0]))
    np.testing.assert_allclose(logits, expected["trained"], atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type = 'IA3': .*only LORA"),
        ("use_dora", True, "use_dora = True: .*not supported"),
        ("base_model_name_or_path", "/no/such", "base = '/no/such': is the base of the adapters"),
        ("alpha_pattern", {"(a+)+b": 1}, "alpha_pattern = .*only names of modules are read"),
    ],
)
def test_adapters_that_cannot_be_computed_are_refused(tmp_path, field, value, message):
    directory = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "lora" / "trained", directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(GOLDEN / "k2"), field: value}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(directory)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    directory = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "lora" / "trained", directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(GOLDEN / "v3")}))
    with pytest.raises(ConfigError, match=r"adapter = .*does not fit its base|differ in rank"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRAConfig(rank=2, targets=("head",)), r"lora.targets = 'head': matches no matrix"),
        (LoRAConfig(rank=2, targets=()), r"lora.targets = \(\): give at least one"),
    ],
)
def test_targets_without_a_matrix_are_refused(lora, message):
    with pytest.raises(ConfigError, match=message):
        AbstractModel(open_checkpoint(GOLDEN / "k2").cfg, lora=lora)


@pytest.mark.parametrize("target", ["attention=x", "attention=0", "experts=4:-1"])
def test_malformed_targets_are_refused(target):
    with pytest.raises(ConfigError, match=r"^lora.targets = "):
        LoRAConfig(rank=2, targets=(target,))
