"""Checkpoints of strangers: changed headers, configurations, indices and bytes are loaded whole, or refused by name."""

import contextlib
import functools
import json
import shutil

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from mla_moe import ConfigError, ModelConfig, Transformer, save_pretrained
from mla_moe.checkpoint import hf_checkpoint
from mla_moe.checkpoint.reader import open_checkpoint

from .json_values import changed

SIZES = st.sampled_from([0, -1, 2, 10**5, 10**9, 2**63, 10**30, True, 2.0, "2", None, [2]])
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """Most inputs that are read leave the model as it is, and its shapes take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_checkpoint, "AbstractModel", functools.lru_cache(100)(hf_checkpoint.AbstractModel))
        yield


@pytest.fixture(scope="module", params=[None, "int4"])
def good(request, tmp_path_factory):
    """A model of one dense and one MoE layer, also with experts in INT4."""
    folder = tmp_path_factory.mktemp("checkpoint") / "good"
    cfg = ModelConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8,
        moe_intermediate_size=32, n_routed_experts=2, num_experts_per_tok=1, kv_lora_rank=4, qk_nope_head_dim=4,
        qk_rope_head_dim=2, v_head_dim=4, max_position_embeddings=8,
    )  # fmt: skip
    save_pretrained(Transformer(cfg, rngs=nnx.Rngs(0)), folder, quantize=request.param)
    return folder


@contextlib.contextmanager
def copy_of(good):
    folder = good.with_name("changed")
    shutil.rmtree(folder, ignore_errors=True)
    yield shutil.copytree(good, folder)


def read(folder):
    """What is opened can be read in full."""
    with contextlib.suppress(ConfigError):
        checkpoint = open_checkpoint(folder)
        for entry in checkpoint.hf_checkpoint(None)[0]:
            assert sum(chunk.nbytes for chunk in entry.chunks()) == entry.nbytes


@given(st.data())
def test_any_config(good, data):
    with copy_of(good) as folder:
        config = json.loads((folder / "config.json").read_text())
        sizes = st.builds(lambda name, size: config | {name: size}, st.sampled_from(sorted(config)), SIZES)
        (folder / "config.json").write_text(json.dumps(data.draw(changed(config) | sizes)))
        read(folder)


@given(st.data())
def test_any_safetensors(good, data):
    """Changed headers, bytes and lengths."""
    with copy_of(good) as folder:
        raw = bytearray((folder / FILE).read_bytes())
        end = 8 + int.from_bytes(raw[:8], "little")
        if data.draw(st.booleans()):
            header = json.dumps(data.draw(changed(json.loads(raw[8:end])))).encode()
            raw[:end] = len(header).to_bytes(8, "little") + header
        else:
            for _ in range(data.draw(st.integers(1, 4))):
                raw[data.draw(st.integers(0, end) | st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
            del raw[data.draw(st.integers(0, len(raw)) | st.just(len(raw))) :]
        (folder / FILE).write_bytes(raw)
        read(folder)


@given(st.data())
def test_any_index(good, data):
    """An index in place of a single file."""
    with copy_of(good) as folder:
        raw = (folder / FILE).read_bytes()
        names = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "part.safetensors")}
        (folder / FILE).rename(folder / "part.safetensors")
        (folder / INDEX).write_text(json.dumps(data.draw(changed(index) | st.just(index))))
        read(folder)
