"""QLoRA: adapters of a base in FP8, INT8 or INT4, which no step dequantizes as a whole."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mla_moe
from mla_moe import ConfigError, LoRAConfig
from mla_moe.checkpoint.base_reference import BaseReference
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.data_position import FixedPosition
from mla_moe.checkpoint.manager import CheckpointManager
from mla_moe.checkpoint.quantized_base import QuantizedBase
from mla_moe.checkpoint.reader import load_arrays, open_checkpoint
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    SFTConfig,
    TaskConfig,
    TrainingConfig,
)
from mla_moe.inference.weights import prepare_for_inference
from mla_moe.nn.abstract_model import AbstractModel, model_arrays
from mla_moe.nn.lora import merge_adapters
from mla_moe.nn.param import Precision
from mla_moe.nn.quantized import dequantize_weights
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.console import Console
from mla_moe.training.initialization import starting_arrays
from mla_moe.training.metrics import read_rows
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.run_directory import open_run_directory
from mla_moe.training.sft import train_sft
from mla_moe.training.step import init_state, make_train_step

OPTIMIZER = OptimizerConfig(schedule=ScheduleConfig(peak_lr=0.002, warmup_fraction=0, decay_fraction=0), weight_decay=0)
FORMATS = ("fp8", "experts=int4", "moe_layers/attention/*=int8", "moe_layers/attention/kv_b=none")


@pytest.fixture(scope="module")
def model_cfg(cfg):
    """Widths that groups of 32 divide, and of which blocks of 128 are no multiple."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": 96, "intermediate_size": 160, "n_routed_experts": 4}
    heads = {"num_attention_heads": 5, "qk_nope_head_dim": 40, "qk_rope_head_dim": 8, "v_head_dim": 32}
    latents = {
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 0,
        "n_group": 2,
        "topk_group": 1,
    }
    return dataclasses.replace(cfg, **sizes, **heads, **latents)


@pytest.fixture(scope="module")
def base(model_cfg, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    model = mla_moe.Transformer(model_cfg, rngs=nnx.Rngs(0))
    mla_moe.save_pretrained(model, path / "float32")
    return path


def train(model, mesh, arrays, steps=20):
    """Losses of some steps, and the compiled step."""
    training = TrainingConfig(steps=20, batch_size=8, aux_loss_weight=0.0, router_bias_update_rate=0.0, loss_chunk=13)
    tx = make_optimizer(OPTIMIZER, 20, model)
    state, step, losses = init_state(model, tx, 0, mesh, dict(arrays)), None, []
    before = {path: np.asarray(state.frozen[path]) for path in model.frozen_paths}
    for row in np.random.default_rng(0).integers(0, 64, (steps, 8, 14), np.int32):
        ones = np.ones((8, 13), np.int32)
        batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "segment_ids": ones, "positions": ones * np.arange(13)}
        batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
        step = step or make_train_step(model, tx, training, mesh).lower(state, batch).compile()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert all(np.array_equal(state.frozen[path], before[path]) for path in before)
    return losses, step


def dequantized(model, arrays):
    """The same model with a base of floats."""
    plain = AbstractModel(model.cfg, lora=dataclasses.replace(model.lora, quantize_base=()))
    merged = model.merge(arrays)
    dequantize_weights(merged, jnp.float32)
    return plain, model_arrays(merged)


def load(base, lora, mesh, **options):
    source = open_checkpoint(base / "float32")
    model = AbstractModel(source.cfg, lora=lora, **options)
    arrays = load_arrays(source, model, mesh, paths=[*model.frozen_paths, *model.bias_paths])
    return model, arrays | model.init(0, mesh, model.adapter_paths)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("formats", "sizes", "remat"),
    [
        (FORMATS, {"fsdp": 2, "expert": 2}, "none"),
        pytest.param(
            ("int8", "experts=fp8"), {"fsdp": 2, "expert": 2, "tensor": 2}, "dots", marks=pytest.mark.thorough
        ),
        (("int4",), {}, "none"),
    ],
)
def test_training_is_that_of_the_dequantized_base(base, formats, sizes, remat):
    """On a mesh as on one device. No float array of the program has the matrices of all layers."""
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    mesh = make_mesh(MeshConfig(data=1, **sizes), jax.devices()[: 2 ** len(sizes)])
    lora = LoRAConfig(rank=4, alpha=8.0, quantize_base=formats)
    model, arrays = load(base, lora, mesh, remat=remat)
    assert {arrays[path].dtype.name for path in model.formats} <= {"int8", "uint8"}
    losses, step = train(model, mesh, arrays)
    local, on_one = load(base, lora, one)
    expected, plain_step = train(*((plain := dequantized(local, on_one))[0], one, plain[1]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)

    def stacks(program):
        """Float arrays with all layers of a matrix: `[3, …]` of its size, or of that of its shard."""
        shards = {p: (x.size, math.prod(x.sharding.shard_shape(x.shape))) for p, x in arrays.items()}
        codes = [p for p in model.formats if p.startswith("moe_layers")]
        sizes = {n * (1 + (model.formats[p] == "int4")) for p in codes for n in shards[p]}
        shapes = re.findall(r"\b(?:f32|bf16|f16)\[(3,[\d,]+)\]", program.as_text())
        return {shape for shape in shapes if math.prod(map(int, shape.split(","))) in sizes}

    assert not stacks(step)
    if not sizes:
        assert stacks(plain_step)


def test_a_checkpoint_in_the_same_format_is_taken_as_it_is(base, model_cfg):
    """Matrices of DeepSeek's FP8 blocks and Kimi's INT4, complete and as shards of any bounds."""
    model = mla_moe.load_pretrained(base / "float32")
    rng = np.random.default_rng(0)
    for form in ("fp8", "int4"):
        if not (base / form).exists():
            mla_moe.save_pretrained(model, base / form, jnp.bfloat16, quantize=form)
        source = open_checkpoint(base / form)
        formats = ("fp8",) if form == "fp8" else ("experts=int4",)
        reader = QuantizedBase(source, LoRAConfig(rank=1, quantize_base=formats))
        assert len(reader.formats) == (16 if form == "fp8" else 2)
        for path in reader.formats:
            shape = AbstractModel(model_cfg).variables[path].get_value().shape
            full = tuple(slice(0, n) for n in shape)
            values = reader.dequantized(path, full)
            np.testing.assert_array_equal(values, source.read(path, np.float32, full))
            starts = [int(rng.integers(0, n)) for n in shape]
            part = tuple(slice(i, int(rng.integers(i + 1, n + 1))) for i, n in zip(starts, shape, strict=True))
            inner = {3: (), 4: (2, 3)}.get(len(shape), ()) if "attention" in path else ()
            part = tuple(slice(0, n) if i in inner else p for i, (p, n) in enumerate(zip(part, shape, strict=True)))
            if path.endswith("/o"):
                part = part[0], part[1], slice(0, shape[2]), part[3]
            np.testing.assert_array_equal(reader.dequantized(path, part), values[part])


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_a_matrix_is_quantized_to_its_nearest_codes(base, form):
    source = open_checkpoint(base / "float32")
    reader = QuantizedBase(source, LoRAConfig(rank=1, quantize_base=(form,)))
    path = "moe_layers/moe/down"
    full = tuple(slice(0, n) for n in (3, 4, 96, 160))
    values, given = reader.dequantized(path, full), source.read(path, np.float32, full)
    error = np.abs(values - given)
    if form == "fp8":
        assert (error <= np.maximum(np.abs(given) / 16, np.abs(given).max() / 448 / 512)).all()
    else:
        groups = given.reshape(3, 4, -1, 32 if form == "int4" else 96, 160)
        step = np.abs(groups).max(axis=3, keepdims=True) / {"int8": 127, "int4": 7}[form]
        assert (error.reshape(groups.shape) <= step * (0.51 if form == "int8" else 0.9)).all()


@pytest.mark.slow
def test_merging_dequantizes(base):
    """A model in memory, layer by layer."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model, arrays = load(base, LoRAConfig(rank=2, quantize_base=FORMATS), mesh)
    arrays |= {p: x + 0.01 for p, x in arrays.items() if p.endswith("/b") and "/lora/" in p}
    adapted, tokens = model.merge(arrays), jnp.arange(12)[None] + 3
    merged = merge_adapters(adapted)
    assert all(x.dtype == jnp.float32 for x in model_arrays(merged).values())
    np.testing.assert_allclose(merged(tokens), adapted(tokens), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "expert": 2}, {"expert": 2, "tensor": 2}])
def test_sampling_is_that_of_the_merged_model(base, sizes):
    """The engine keeps codes and adapters; on two devices of `tensor`, shards of the experts end within groups."""
    mesh = make_mesh(MeshConfig(data=1, **sizes), jax.devices()[: 2 ** len(sizes)])
    model, arrays = load(base, LoRAConfig(rank=2, quantize_base=FORMATS), mesh)
    arrays |= {p: x + 0.02 for p, x in arrays.items() if p.endswith("/b") and "/lora/" in p}
    adapted, prompts = model.merge(arrays), [[3, 4, 5], [7, 8, 9, 10, 11], [1, 2], [6, 5, 4, 3]]
    _, state = prepare_for_inference(adapted)
    codes = [x for x in jax.tree.leaves(state) if x.dtype in (jnp.uint8, jnp.int8)]
    assert sum(x.size for x in codes) == sum(arrays[path].size for path in model.formats)
    assert mla_moe.generate(adapted, prompts, max_new_tokens=6) == mla_moe.generate(
        merge_adapters(adapted), prompts, max_new_tokens=6
    )


def test_adapters_that_were_trained_beside_another_base_are_noted(caplog):
    """As those of PEFT's files, which say nothing of quantization."""
    golden = Path(__file__).parents[1] / "golden"
    source, mesh = open_checkpoint(golden / "lora" / "trained"), make_mesh(MeshConfig(), jax.devices()[:1])
    for formats, notes in ((), 0), (("int8",), 1):
        model = AbstractModel(source.cfg, lora=dataclasses.replace(source.lora, quantize_base=formats))
        context = SimpleNamespace(abstract_model=model, mesh=mesh, recipe=SimpleNamespace(model=source.cfg))
        arrays = starting_arrays(golden / "lora" / "trained", context, trained_only=True)
        assert arrays.keys() == {*model.param_paths, *model.bias_paths}
        assert len(caplog.messages) == notes
    assert caplog.messages[0].startswith("lora.quantize_base = ('int8',), and the adapters of ")


def test_experts_beside_quantized_matrices_keep_their_dtype_for_decoding(base):
    """Not packed as integers, as bfloat16 experts are on a CPU whose matmuls of quantized ones do not unpack them."""
    precision = Precision(jnp.float32, jnp.bfloat16, jnp.float32)
    lora = LoRAConfig(rank=1, quantize_base=("moe_layers/moe/gate_up=int8",))
    model, arrays = load(base, lora, make_mesh(MeshConfig(), jax.devices()[:1]), precision=precision)
    _, state = prepare_for_inference(model.merge(arrays))
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"int8", "bfloat16", "float32"}


def test_formats_that_do_not_fit_are_refused(cfg):
    with pytest.raises(ConfigError, match=r"^lora.quantize_base = 'int4': groups of 32 inputs do not divide"):
        AbstractModel(cfg, lora=LoRAConfig(rank=1, quantize_base=("int4",)))
    with pytest.raises(ConfigError, match=r"^lora.quantize_base = 'experts=nf4': write NAME=FORMAT or FORMAT"):
        LoRAConfig(rank=1, quantize_base=("experts=nf4",))
    for entry in ("attn=fp8", "router=fp8"):
        with pytest.raises(ConfigError, match=rf"^lora.quantize_base = '{entry}': matches no matrix that can be quant"):
            AbstractModel(cfg, lora=LoRAConfig(rank=1, quantize_base=(entry,)))
    with pytest.raises(ConfigError, match=r"^lora.quantize_base = .*: needs adapters to train; set lora.rank"):
        LoRAConfig(quantize_base=("fp8",))


@pytest.mark.slow
def test_the_base_of_a_run_is_merged_as_it_was_trained_with_and_recognised(base, model_cfg, tmp_path):
    """Dequantized; found where run and base were moved to; and other weights in its place are refused."""
    shutil.copytree(base / "float32", tmp_path / "float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model, arrays = load(tmp_path, LoRAConfig(rank=2, quantize_base=FORMATS), mesh)
    arrays |= {p: x + 0.01 for p, x in arrays.items() if p.endswith("/b") and "/lora/" in p}
    state = init_state(model, make_optimizer(OPTIMIZER, 1, model), 0, mesh, arrays)
    with CheckpointManager(tmp_path / "run", "sft", CheckpointConfig()) as checkpoints:
        reference = BaseReference.create(tmp_path / "float32", state.frozen)
        checkpoints.save(1, state, FixedPosition(), model, reference)
    expected = model_arrays(merge_adapters(model.merge(state.arrays)))
    convert(tmp_path / "run", tmp_path / "merged", merge_adapter=True)
    for path in (tmp_path / "run", tmp_path / "merged"):
        source = open_checkpoint(path)
        for name, array in expected.items():
            full = tuple(slice(0, n) for n in array.shape)
            np.testing.assert_allclose(source.read(name, np.float32, full), array, atol=1e-6, err_msg=name)

    (moved := tmp_path / "elsewhere").mkdir()
    for name in ("run", "float32"):
        (tmp_path / name).rename(moved / name)
    assert open_checkpoint(moved / "run").base_name == str(moved / "float32")
    with CheckpointManager(moved / "run", "sft", CheckpointConfig()) as checkpoints:
        assert checkpoints.base.directory == str(moved / "float32")
    (moved / "float32").rename(moved / "old")
    mla_moe.save_pretrained(mla_moe.Transformer(model_cfg, rngs=nnx.Rngs(1)), moved / "float32")
    with pytest.raises(ConfigError, match=r"^base = .* has changed since the adapters in .* were trained"):
        open_checkpoint(moved / "run")


@pytest.mark.slow
def test_a_run_resumes_and_its_merged_model_has_the_base_of_training(base, model_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    model = dataclasses.replace(model_cfg, vocab_size=258)
    mla_moe.save_pretrained(mla_moe.Transformer(model, rngs=nnx.Rngs(0)), tmp_path / "base")
    rows = [{"prompt": p, "completion": c} for p, c in ("ab", "cd", "ef")]
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sft = SFTConfig(steps=4, data=(str(tmp_path / "sft.jsonl"),), batch_size=2, sequence_length=32, optimizer=OPTIMIZER)
    recipe = Recipe(
        run_dir=str(tmp_path / "run"), init_from=str(tmp_path / "base"), model=model, sft=sft,
        data=DataConfig(train=("nothing is read",), heldout=(), shuffle_buffer_size=2, prefetch=2),
        training=TrainingConfig(steps=0, loss_chunk=16), task=TaskConfig(template="{question}="),
        lora=LoRAConfig(rank=4, quantize_base=FORMATS), checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip
    train_sft(recipe, open_run_directory(recipe), Console(enabled=False))
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl", "sft")]
    again = dataclasses.replace(recipe, resume_step=2)
    train_sft(again, open_run_directory(again), Console(enabled=False))
    assert [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl", "sft")][-1] == losses[-1]

    source = open_checkpoint(tmp_path / "run")
    mesh, tokens = make_mesh(MeshConfig(), jax.devices()[:1]), jnp.arange(24)[None] + 40
    abstract = AbstractModel(model, lora=recipe.lora)
    logits = abstract.merge(load_arrays(source.unmerged(), abstract, mesh))(tokens)
    np.testing.assert_allclose(mla_moe.load_pretrained(tmp_path / "run")(tokens), logits, atol=2e-5)
    convert(tmp_path / "run", tmp_path / "merged", merge_adapter=True)
    np.testing.assert_allclose(mla_moe.load_pretrained(tmp_path / "merged")(tokens), logits, atol=2e-5)
