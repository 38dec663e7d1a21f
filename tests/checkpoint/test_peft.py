"""Adapters in PEFT's layout: read, merged, written, and refused. Logits are PEFT's (tests/golden/make_lora.py)."""

import fnmatch
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import mla_moe
from mla_moe import ConfigError, LoRAConfig, ModelConfig
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.peft import _alpha, peft_config, write_peft
from mla_moe.checkpoint.reader import load_arrays, open_checkpoint, read_model_config
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.cli.generate import load_model_and_tokenizer
from mla_moe.config import MeshConfig
from mla_moe.config.lora import GROUPS
from mla_moe.nn.abstract_model import AbstractModel, model_variables
from mla_moe.parallel.mesh import make_mesh
from tests.golden.export_lora import random_adapters
from tests.golden.family import CASES

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


def copied(directory, **fields):
    """The trained adapter in another directory, with other values in its configuration."""
    shutil.copytree(GOLDEN / "lora" / "trained", directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(GOLDEN / "k2")} | fields
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type = 'IA3': .*only LORA"),
        ("use_dora", True, "use_dora = True: .*not supported"),
        ("use_qalora", True, "use_qalora = True: .*not supported"),
        ("arrow_config", {"top_k": 2}, "arrow_config = .*not supported"),
        ("layers_to_transform", [0], r"layers_to_transform = \[0\]: .*not supported"),
        ("of_a_later_version", 1, "of_a_later_version = 1: .*not supported"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights = 'pissa_niter_4': .*changes the base"),
        ("use_rslora", "false", "use_rslora = 'false': must be of type bool"),
        ("lora_alpha", "8", "lora_alpha = '8': must be of type float"),
        ("lora_alpha", 0, "lora.alpha = 0.0: must be a positive number"),
        ("target_parameters", 5, "target_parameters = 5: must be a list"),
        ("base_model_name_or_path", "/no/such", "base = '/no/such': is the base of the adapters"),
        ("base_model_name_or_path", "", "base_model_name_or_path = '': .*name a directory"),
        ("base_model_name_or_path", None, "base_model_name_or_path = None: must be of type str"),
        ("base_model_name_or_path", "a" * 300, "base_model_name_or_path = 'a.*is too long"),
        ("alpha_pattern", {"(a+)+b": 1}, "alpha_pattern = .*only names of modules are read"),
        ("alpha_pattern", {r"layers\.\d\.self_attn\.o_proj": 1}, "alpha_pattern = .*only names of modules are read"),
        ("alpha_pattern", {"o_proj": None}, "alpha_pattern.o_proj = None: must be of type float"),
        ("alpha_pattern", [1], r"alpha_pattern = \[1\]: must be an object"),
    ],
)
def test_adapters_that_cannot_be_computed_are_refused(tmp_path, field, value, message):
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(copied(tmp_path / "adapter", **{field: value}))


def test_dropout_is_that_of_modules(tmp_path):
    """PEFT refuses it of parameters, which experts are."""
    assert open_checkpoint(copied(tmp_path / "adapter", lora_dropout=0.25)).lora.dropout == 0.25
    cfg = open_checkpoint(GOLDEN / "k2").cfg
    for targets, written in ((("attention",), 0.25), (("attention", "experts"), 0.0)):
        lora = LoRAConfig(rank=2, targets=targets, dropout=0.25)
        assert peft_config(cfg, lora, "base")["lora_dropout"] == written


def test_the_base_of_an_adapter_is_no_adapter(tmp_path):
    for name, base in (("itself", "itself"), ("one", "other"), ("other", "one")):
        copied(tmp_path / name, base_model_name_or_path=str(tmp_path / base))
    for name in ("itself", "one"):
        with pytest.raises(ConfigError, match=r"is the base of the adapters in .* has adapters itself; merge them"):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("o_proj", "o_proj"),
        (".*_proj", "proj"),
        (r".*\.q_b_proj$", "q_b_proj"),
        ("^o_proj", None),
        (r"^model\.layers\.0\.self_attn\.o_proj$", "o_proj"),
        ("proj", None),
    ],
)
def test_alpha_patterns_match_as_in_peft(pattern, matched):
    """`re.match(rf"(.*\\.)?({pattern})$", name)` in PEFT's `get_pattern_key`."""
    for target in ("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_b_proj"):
        expected = 3.0 if matched and target.endswith(matched) else 8.0
        assert _alpha({pattern: 3}, target, 8.0) == expected
        assert (re.match(rf"(.*\.)?({pattern})$", target) is not None) == (expected == 3.0)


def test_a_tensor_of_no_matrix_is_named(tmp_path):
    directory = copied(tmp_path / "adapter")
    tensors = SafetensorsReader(directory)
    arrays = {name: np.array(tensors[name]) for name in tensors.stored}
    name = next(iter(arrays))
    save_file(arrays | {name: np.zeros((), np.float32)}, directory / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=rf"adapter = '{name}': .*has shape \[\], not a matrix's"):
        open_checkpoint(directory)


def test_an_adapter_has_the_tokenizer_and_the_model_of_its_base(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "k2", base)
    words = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    }
    (base / "tokenizer.json").write_text(json.dumps(words))
    (base / "tokenizer_config.json").write_text(json.dumps({"bos_token": "a", "eos_token": "b"}))
    adapter = copied(tmp_path / "adapter", base_model_name_or_path=str(base))
    assert load_model_and_tokenizer(adapter)[1].stop_ids == (1,)
    assert read_model_config(adapter) == open_checkpoint(base).cfg


def test_tensors_that_do_not_fit_are_named(tmp_path):
    directory = copied(tmp_path / "adapter", base_model_name_or_path=str(GOLDEN / "v3"))
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


@pytest.mark.parametrize("case", ["glm4_moe_lite_1", "longcat_flash_1"])
def test_every_matrix_is_in_one_group_of_targets(case):
    """Of LongCat-Flash those of both layers of a pair."""
    for path in AbstractModel(ModelConfig.from_hf(CASES[case])).adaptable_paths:
        groups = [name for name, glob in GROUPS.items() if fnmatch.fnmatch(path, glob)]
        name = next(part for part in ("attention", "shared", "router", "moe", "mlp") if f"/{part}/" in path)
        assert groups == [{"moe": "experts", "mlp": "dense"}.get(name, name)], path


@pytest.mark.parametrize("target", ["attention=x", "attention=0", "experts=4:-1"])
def test_malformed_targets_are_refused(target):
    with pytest.raises(ConfigError, match=r"^lora.targets = "):
        LoRAConfig(rank=2, targets=(target,))
