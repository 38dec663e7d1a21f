"""`load_pretrained` and `save_pretrained`: round trips, dtypes, sharding, and invalid files."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mla_moe import ConfigError, ModelConfig, Transformer
from mla_moe.checkpoint.files import CheckpointError
from mla_moe.checkpoint.hf_checkpoint import HFTensors
from mla_moe.checkpoint.hf_mapping import tensor_mappings
from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.config import MeshConfig
from mla_moe.nn.abstract_model import AbstractModel, model_arrays
from mla_moe.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["v2_greedy", "v2_group_limited", "v3", "k2", "moonlight", "tied"]


def tensors(directory):
    reader = SafetensorsReader(directory)
    return {name: (str(reader[name].dtype), reader[name].shape, reader[name].tobytes()) for name in reader.stored}


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_shard_bytes", [5 << 30, 20_000])
def test_load_then_save_is_lossless(case, max_shard_bytes, tmp_path):
    save_pretrained(load_pretrained(GOLDEN / case), tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert tensors(tmp_path / "out") == tensors(GOLDEN / case)
    before, after = (json.loads((d / "config.json").read_text()) for d in (GOLDEN / case, tmp_path / "out"))
    assert ModelConfig.from_hf(after) == ModelConfig.from_hf(before)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (max_shard_bytes == 20_000)


def test_save_then_load_is_lossless(cfg, v2_cfg, tmp_path):
    for number, config in enumerate((cfg, v2_cfg)):
        model = Transformer(config, rngs=nnx.Rngs(0))
        save_pretrained(model, tmp_path / str(number))
        again = model_arrays(load_pretrained(tmp_path / str(number)))
        for path, x in model_arrays(model).items():
            assert x.dtype == again[path].dtype
            np.testing.assert_array_equal(x, again[path], err_msg=path)


def test_each_element_is_mapped_once(cfg):
    count = {path: np.zeros(v.get_value().shape, int) for path, v in AbstractModel(cfg).variables.items()}
    names = [mapping.name for mapping in tensor_mappings(cfg)]
    for mapping in tensor_mappings(cfg):
        count[mapping.path][mapping.index] += 1
    assert len(names) == len(set(names))
    for path, c in count.items():
        assert (c == (2 if path in ("embed", "head") else 1)).all(), path


def test_each_device_gets_its_shard():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    full, sharded = (model_arrays(load_pretrained(GOLDEN / "v3", mesh=m)) for m in (None, mesh))
    gate_up = sharded["moe_layers/moe/gate_up"]
    assert gate_up.sharding.shard_shape(gate_up.shape) == (2, 2, 12, 2, 10)
    for path, x in full.items():
        np.testing.assert_array_equal(x, sharded[path], err_msg=path)


def test_dtypes_are_kept_or_set():
    kept = model_arrays(load_pretrained(GOLDEN / "k2"))
    wide = model_arrays(load_pretrained(GOLDEN / "k2", dtype=jnp.float32))
    assert kept["embed"].dtype == jnp.bfloat16
    assert {x.dtype for x in wide.values()} == {jnp.dtype(jnp.float32)}
    assert {p for p, x in kept.items() if x.dtype == jnp.float32} == {p for p in kept if "router" in p}


def test_each_tensor_is_saved_in_the_dtype_of_its_file(broken):
    """Also float32 norms beside bfloat16 matrices, and a bfloat16 router bias."""
    reader = SafetensorsReader(broken)
    given = {name: np.array(reader[name]) for name in reader.stored}
    for name, x in given.items():
        if name.endswith("norm.weight"):
            given[name] = x.astype(np.float32) + np.float32(1e-6)
        elif name.endswith("e_score_correction_bias"):
            given[name] = x.astype(jnp.bfloat16)
    save_file(given, broken / "model.safetensors")
    model = load_pretrained(broken)
    assert model_arrays(model)["moe_layers/moe/router/bias"].dtype == jnp.float32
    assert np.isfinite(jax.jit(lambda model, tokens: model(tokens))(model, jnp.ones((1, 4), jnp.int32))).all()
    save_pretrained(model, broken.parent / "out")
    assert tensors(broken.parent / "out") == tensors(broken)


def test_experts_of_two_dtypes_are_promoted_to_a_common_one(broken):
    reader, names = SafetensorsReader(broken), [f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(2)]
    given = {name: np.array(reader[name]) for name in reader.stored}
    given[names[0]] = given[names[0]].astype(np.float16)
    save_file(given, broken / "model.safetensors")
    down = model_arrays(load_pretrained(broken))["moe_layers/moe/down"]
    assert down.dtype == jnp.float32
    for e, name in enumerate(names):
        np.testing.assert_array_equal(down[0, e], given[name].astype(np.float32).T)


def test_a_repeated_embedding_is_accepted_as_the_tied_head_and_another_head_is_not(tmp_path):
    reader = SafetensorsReader(GOLDEN / "tied")
    given = {name: np.array(reader[name]) for name in reader.stored}
    assert "lm_head.weight" not in given
    shutil.copy(GOLDEN / "tied" / "config.json", tmp_path)
    save_file(given | {"lm_head.weight": given["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    assert "head" not in model_arrays(load_pretrained(tmp_path))
    save_file(given | {"lm_head.weight": given["model.embed_tokens.weight"] * 2}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight': differs from model\.embed"):
        load_pretrained(tmp_path)


@pytest.mark.slow
def test_an_mtp_module_may_have_its_own_embedding_and_head(broken):
    reader, name = SafetensorsReader(broken), "model.layers.3.embed_tokens.weight"
    given = {name: np.array(reader[name]) for name in reader.stored}
    given[name] = given[name][::-1]
    save_file({n: np.ascontiguousarray(x) for n, x in given.items()}, broken / "model.safetensors")
    model = load_pretrained(broken)
    assert not model.cfg.mtp_shares_embedding
    h, tokens = jnp.ones((1, 4, model.cfg.hidden_size), jnp.bfloat16), jnp.arange(4)[None]
    own, shared = model.mtp_hidden(h, tokens)[0], load_pretrained(GOLDEN / "v3").mtp_hidden(h, tokens)[0]
    last = model.cfg.vocab_size - 1
    np.testing.assert_array_equal(model.mtp_hidden(h, last - tokens)[0], shared)
    assert not np.array_equal(own, shared)
    assert set(model_arrays(model)) >= {"mtp/embed", "mtp/head"}
    save_pretrained(model, broken.parent / "out")
    assert tensors(broken.parent / "out") == tensors(broken)


def test_rotary_frequencies_in_the_files_are_ignored(broken):
    """As in Moonlight's and Kimi's files, here even of a wrong length."""
    reader = SafetensorsReader(broken)
    given = {name: np.array(reader[name]) for name in reader.stored}
    given["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(7, np.float32)
    save_file(given, broken / "model.safetensors")
    assert load_pretrained(broken).cfg == load_pretrained(GOLDEN / "v3").cfg


def test_each_device_reads_only_its_shard(monkeypatch):
    read, count = HFTensors.read, []

    def counting(*args):
        count.append(read(*args).size)
        return read(*args)

    monkeypatch.setattr(HFTensors, "read", counting)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2))
    full = model_arrays(load_pretrained(GOLDEN / "v3"))
    everything = sum(count)
    assert everything == sum(x.size for x in full.values())
    count.clear()
    sharded = model_arrays(load_pretrained(GOLDEN / "v3", mesh=mesh))
    indices = [x.sharding.devices_indices_map(x.shape).values() for x in sharded.values()]
    distinct = [len(set(map(str, index))) for index in indices]
    shard = [np.prod(x.sharding.shard_shape(x.shape)) for x in sharded.values()]
    assert sum(count) <= sum(8 * s for s in shard)
    assert sum(d * s for d, s in zip(distinct, shard, strict=True)) == everything
    for path, x in full.items():
        np.testing.assert_array_equal(x, sharded[path], err_msg=path)


def test_a_sharded_model_is_saved_completely(tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2))
    save_pretrained(load_pretrained(GOLDEN / "v3", mesh=mesh), tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(GOLDEN / "v3")


def test_an_mtp_module_without_tensors_is_dropped_with_a_warning(broken, caplog):
    """transformers saves V3 without the MTP module, and keeps its number in config.json."""
    header, data = header_of(broken / "model.safetensors")
    rewrite(broken / "model.safetensors", {k: v for k, v in header.items() if "layers.3." not in k}, data)
    assert load_pretrained(broken).cfg.num_nextn_predict_layers == 0
    assert "no MTP module" in caplog.text


@pytest.fixture
def broken(tmp_path):
    """A copy of a checkpoint, to be changed by a test."""
    shutil.copytree(GOLDEN / "v3", tmp_path / "copy")
    return tmp_path / "copy"


def header_of(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def damage_header(change):
    def damage(directory):
        header, data = header_of(directory / "model.safetensors")
        data = change(header, data) or data
        rewrite(directory / "model.safetensors", header, data)

    return damage


def configure(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def index_to(name):
    def damage(directory):
        (directory / "model.safetensors").rename(directory / "model-1.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))

    return damage


def index_that_is_a_list(directory):
    index_to("")(directory)
    (directory / "model.safetensors.index.json").write_text("[]")


def update(name, **fields):
    return damage_header(lambda header, _: header[name].update(fields))


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def overwrite(raw):
    return lambda directory: (directory / "model.safetensors").write_bytes(raw)


def remove(name):
    return lambda directory: (directory / name).unlink()


def replace(name, create):
    """Something that is no file instead of one."""

    def damage(directory):
        (directory / name).unlink(missing_ok=True)
        create(directory / name)

    return damage


def index_that_is_a_pipe(directory):
    index_to("")(directory)
    replace(INDEX, os.mkfifo)(directory)


def index_of_a_directory(directory):
    (directory / "model.safetensors").unlink()
    (directory / "more.safetensors").mkdir()


def sparse(path):
    with path.open("wb") as file:
        file.truncate(10**11)


INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
DAMAGED = {
    "missing tensor": (damage_header(lambda h, _: h.pop(NORM) and None), "model.norm.weight is missing"),
    "unknown tensor": (damage_header(lambda h, _: h.update(evil=NOTHING)), "evil is unknown"),
    "another shape": (update(NORM, shape=[12, 2]), r"has shape \[12, 2\], not \[24\]"),
    "shape and size disagree": (update(NORM, shape=[23]), "bytes, which is not bfloat16"),
    "offsets beyond the end": (update(NORM, data_offsets=[10**9, 10**9 + 48]), "truncated"),
    "offsets backwards": (update(NORM, data_offsets=[48, 0]), "data_offsets"),
    "negative shape": (update(NORM, shape=[-24]), "needs a dtype, a shape"),
    "unknown dtype": (update(NORM, dtype="Q4"), "has type 'Q4'"),
    "dtype is not a string": (update(NORM, dtype=["F32"]), "has type \\['F32'\\]"),
    "integers": (update(BIAS, dtype="I32"), "has type int32, not float32, float16, bfloat16"),
    "nested too deeply": (overwrite((10**6).to_bytes(8, "little") + b"[" * 10**6), "not JSON"),
    "other quantization": (
        lambda d: configure(d, quantization_config={"quant_method": "compressed-tensors"}),
        "write bfloat16 with compressed-tensors",
    ),
    "overlap": (update(NORM, data_offsets=[0, 48]), "overlaps"),
    "truncated": (truncate, "truncated"),
    "empty": (overwrite(b""), "truncated"),
    "huge header": (overwrite(b"\xff" * 7 + b"\x7f" + b"{}"), "longer than the file"),
    "not JSON": (overwrite((4).to_bytes(8, "little") + b"nope"), "not JSON"),
    "index names a file outside": (index_to("../model.safetensors"), "in the directory itself"),
    "index names an absolute path": (index_to("/etc/passwd"), "in the directory itself"),
    "index names a missing file": (index_to("other.safetensors"), "is missing"),
    "index is not an object": (index_that_is_a_list, "JSON object"),
    "no files": (remove("model.safetensors"), "holds no .safetensors file"),
    "no config": (remove("config.json"), "no such file"),
    "config is a pipe": (replace("config.json", os.mkfifo), "config.json.* is not a regular file"),
    "config is a device": (replace("config.json", lambda path: path.symlink_to("/dev/zero")), "is not a regular file"),
    "config is a loop of links": (replace("config.json", lambda path: path.symlink_to(path)), "is not a regular file"),
    "config is 100 GB": (replace("config.json", sparse), "is larger than 32 MB"),
    "index is a pipe": (index_that_is_a_pipe, "index.json.* is not a regular file"),
    "a directory for a file": (index_of_a_directory, "more.safetensors.* is not a file"),
    "a million dimensions": (update(NORM, shape=[2**62] * 10**6), "needs a dtype, a shape"),
    "a billion layers": (lambda d: configure(d, num_hidden_layers=10**9), "names .* tensors or more, and the files"),
    "a billion experts": (lambda d: configure(d, n_routed_experts=2**30), "names .* tensors or more, and the files"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_checkpoints_are_rejected(broken, damage, message):
    damage(broken)
    with pytest.raises(ConfigError, match=message):
        load_pretrained(broken)


def test_files_may_be_links(broken, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for path in broken.iterdir():
        (tmp_path / "elsewhere" / path.name).symlink_to(path)
    assert load_pretrained(tmp_path / "elsewhere").cfg == load_pretrained(broken).cfg
    save_pretrained(load_pretrained(broken), tmp_path / "shards", max_shard_bytes=20_000)
    for shard in list((tmp_path / "shards").glob("*.safetensors")):
        shard.rename(tmp_path / shard.name)
        shard.symlink_to(tmp_path / shard.name)
    assert tensors(tmp_path / "shards") == tensors(broken)


def test_model_safetensors_has_priority_over_other_files(broken, tmp_path):
    """Over an index and shards of an earlier save, an adapter, and `consolidated.safetensors`."""
    model = load_pretrained(GOLDEN / "v3", dtype=jnp.float32)
    save_pretrained(model, tmp_path / "old", max_shard_bytes=20_000)
    for path in (tmp_path / "old").iterdir():
        if path.name != "config.json":
            shutil.copy(path, broken)
    save_file({"lora": np.zeros(2, np.float32)}, broken / "adapter_model.safetensors")
    shutil.copy(broken / "model.safetensors", broken / "consolidated.safetensors")
    assert tensors(broken) == tensors(GOLDEN / "v3")
    assert load_pretrained(broken).embed[...].dtype == jnp.bfloat16


@given(st.data())
def test_any_header_is_read_or_rejected(tmp_path_factory, data):
    """Random bytes, and a valid file with some bytes changed, raise nothing but `CheckpointError`."""
    directory = tmp_path_factory.getbasetemp() / "fuzz"
    directory.mkdir(exist_ok=True)
    good = (GOLDEN / "v2_greedy" / "model.safetensors").read_bytes()
    if data.draw(st.booleans()):
        raw = data.draw(st.binary(max_size=200))
    else:
        raw = bytearray(good)
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    (directory / "model.safetensors").write_bytes(bytes(raw))
    with contextlib.suppress(CheckpointError):
        reader = SafetensorsReader(directory)
        for name, stored in reader.stored.items():
            assert reader[name].shape == stored.shape


def test_a_failed_save_leaves_no_files(tmp_path, cfg, monkeypatch):
    model = Transformer(cfg, rngs=nnx.Rngs(0))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("mla_moe.checkpoint.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    save_pretrained(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        save_pretrained(model, tmp_path / "out")


def test_code_in_a_checkpoint_is_not_executed(broken):
    config = json.loads((broken / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "evil.py").write_text("raise SystemExit('ran')\n")
    assert load_pretrained(broken).cfg == load_pretrained(GOLDEN / "v3").cfg
