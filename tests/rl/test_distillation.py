"""On-policy distillation, and rejection sampling from another model."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import mla_moe
from mla_moe import ConfigError
from mla_moe.config import KernelConfig, LoRAConfig, RejectionConfig, RLConfig, SFTConfig
from mla_moe.inference.engine import Engine
from mla_moe.parallel.mesh import make_mesh
from mla_moe.rl import rejection_sampling
from mla_moe.rl.preflight import preflight
from mla_moe.rl.rejection_sampling import train_rejection
from mla_moe.rl.teacher import Teacher
from mla_moe.rl.teacher_endpoint import TeacherEndpoint
from mla_moe.rl.trainer import train_rl
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import ByteTokenizer, train_bpe
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_context import RunContext
from mla_moe.training.run_directory import open_run_directory


@pytest.fixture(scope="module")
def teacher_cfg(recipe):
    """Wider than the student, with other experts, another attention and an MTP module, which is not used."""
    return dataclasses.replace(
        recipe.model, hidden_size=48, num_attention_heads=4, n_routed_experts=4, n_group=1, topk_group=1,
        q_lora_rank=None, num_hidden_layers=2, num_nextn_predict_layers=1, initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(teacher_cfg, tmp_path_factory):
    """Tokens have similar embeddings, so that its distribution depends little on the context and is soon learned."""
    path, model = tmp_path_factory.mktemp("teacher") / "model", mla_moe.Transformer(teacher_cfg, rngs=nnx.Rngs(5))
    model.embed[...] = model.embed[...][:1] + 0.2 * model.embed[...]
    mla_moe.save_pretrained(model, path)
    return str(path)


@pytest.fixture
def distill(recipe, base, tmp_path):
    optimizer = dataclasses.replace(
        recipe.rl.optimizer, schedule=dataclasses.replace(recipe.rl.optimizer.schedule, decay_fraction=0.0)
    )

    def distill(teacher, lora=LoRAConfig(), **rl):
        changes = {"objective": "distillation", "teacher": teacher, "group_size": 1, "prompts_per_step": 16}
        changes |= {"eval_every": 0, "eval_samples": 0, "optimizer": optimizer} | rl
        run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        settings = dataclasses.replace(
            recipe,
            run_dir=str(run_dir),
            init_from=base,
            lora=lora,
            rl=dataclasses.replace(recipe.rl, **changes),
        )
        train_rl(settings, open_run_directory(settings), Console(enabled=True))
        return [row for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]

    return distill


@pytest.mark.slow
def test_the_student_moves_to_the_distribution_of_the_teacher(distill, teacher, capsys, monkeypatch):
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    steps = distill(teacher, steps=10, minibatches=1)
    kl = [row["distillation/reverse_kl"] for row in steps]
    assert np.mean(kl[-2:]) < 0.6 * kl[0], kl
    assert all(row["loss"] == pytest.approx(row["distillation/reverse_kl"], rel=1e-4) for row in steps)
    assert all(row["sampler_logprob_diff_max"] < 1e-4 for row in steps)
    assert not {"kl", "tis_weight", "clip_ratio/low"} & set(steps[0])
    assert {"reward", "accuracy", "response_length", "entropy", "grad_norm"} <= set(steps[0])
    assert steps[0]["filtered_groups"] == 0
    out = capsys.readouterr().out
    assert "distillation, teacher" in out
    assert "has no signal" not in out


@pytest.mark.slow
@pytest.mark.thorough  # the test before has such a teacher too
def test_a_student_equal_to_its_teacher_does_not_move(distill, base):
    """In packed sequences on eight devices, whose experts the student replays and the teacher routes itself. The
    student has new adapters, which change nothing at first."""
    (step,) = distill(base, LoRAConfig(rank=4), steps=1, minibatches=1)
    assert step["distillation/reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert step["grad_norm"] < 1e-4


@pytest.mark.slow
def test_another_model_generates_the_completions_of_rejection_sampling(recipe, base, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection_sampling, "_is_correct", lambda completion: True)
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    settings = dataclasses.replace(
        recipe,
        run_dir=str(tmp_path / "run"),
        init_from=base,
        sft=SFTConfig(batch_size=8, sequence_length=32),
        rl=dataclasses.replace(recipe.rl, steps=0),
        rejection=RejectionConfig(steps=1, prompts=4, samples=3, sampler=teacher),
    )
    loaded = []
    load = Teacher.load
    monkeypatch.setattr(Teacher, "load", lambda self: loaded.append(self.model.cfg.hidden_size) or load(self))
    train_rejection(settings, open_run_directory(settings), Console(enabled=True))
    assert loaded == [48]
    assert (tmp_path / "run" / "rejection.jsonl").read_text().count("\n") > 0


def context(recipe, tmp_path, tokenizer="byte"):
    return RunContext.create(
        dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=tokenizer)),
        tmp_path,
        Console(enabled=False),
    )


def test_teacher_is_loaded_in_the_compute_dtype_without_its_mtp_module(recipe, teacher, tmp_path):
    training = dataclasses.replace(recipe.training, compute_dtype="bfloat16")
    found = Teacher(teacher, "rl.teacher", context(dataclasses.replace(recipe, training=training), tmp_path))
    arrays, wanted = found.load(), mla_moe.load_pretrained(teacher)
    assert arrays["head"].dtype == "bfloat16"
    np.testing.assert_array_equal(arrays["head"], wanted.head[...].astype("bfloat16"))
    assert not any(path.startswith("mtp/") for path in arrays)
    assert found.bytes_per_device > 0


def test_a_teacher_that_does_not_fit_the_student_is_refused(recipe, teacher, teacher_cfg, tmp_path):
    def refused(message, path=teacher, recipe=recipe, tokenizer="byte"):
        with pytest.raises(ConfigError, match=message) as error:
            Teacher(path, "rl.teacher", context(recipe, tmp_path, tokenizer))
        assert error.value.field.startswith("rl.teacher")

    other = tmp_path / "other"
    cfg = dataclasses.replace(teacher_cfg, vocab_size=300)
    mla_moe.save_pretrained(mla_moe.Transformer(cfg, rngs=nnx.Rngs(0)), other)
    refused("has 300 logits and the student 258", str(other))
    model = dataclasses.replace(recipe.model, vocab_size=300)
    paths = []
    for name in ("test_distillation.py", "test_trainer.py"):
        paths.append(tmp_path / f"{name}.json")
        train_bpe([Path(__file__).with_name(name).read_text()], 300, paths[-1])
    larger = dataclasses.replace(recipe, model=model)
    refused("has other tokens than", str(other), larger, str(paths[0]))  # bytes
    (other / "tokenizer.json").write_bytes(paths[1].read_bytes())
    refused("has other tokens than", str(other), larger, str(paths[0]))
    (other / "tokenizer.json").write_bytes(paths[0].read_bytes())
    Teacher(str(other), "rl.teacher", context(larger, tmp_path, str(paths[0])))
    long = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, max_position_embeddings=512),
        rl=dataclasses.replace(recipe.rl, max_new_tokens=200),
    )  # fmt: skip
    refused("has 128 positions, fewer than", recipe=long)
    with pytest.raises(ConfigError, match=r"rejection.sampler = .*has 300 logits"):
        preflight(dataclasses.replace(recipe, rejection=RejectionConfig(steps=1, sampler=str(other))), {"rl"})


def test_a_run_is_not_its_own_teacher(recipe, base):
    """Its newest checkpoint would be the student itself when the run is resumed."""
    for path in (base, f"{base}/checkpoints/rl"):
        rl = dataclasses.replace(recipe.rl, objective="distillation", teacher=path, steps=1)
        with pytest.raises(ConfigError, match=r"rl\.teacher = .*own run"):
            preflight(dataclasses.replace(recipe, run_dir=base, rl=rl), ())


def test_teacher_is_dropless_where_the_student_is_not(recipe, teacher, tmp_path):
    kernels = KernelConfig(capacity_factor=0.1)
    found = Teacher(teacher, "rl.teacher", context(dataclasses.replace(recipe, kernels=kernels), tmp_path))
    assert found.model.kernels.capacity_factor is None


@pytest.mark.parametrize("changes", [{"objective": "distillation"}, {"teacher": "somewhere"}])
def test_teacher_and_objective_belong_together(changes):
    with pytest.raises(ConfigError, match=r"rl\.teacher"):
        RLConfig(**changes)
    assert RLConfig(objective="distillation", teacher="somewhere", group_size=1, steps=1).steps == 1


@pytest.mark.slow
def test_a_teacher_behind_an_endpoint_equal_to_the_student_does_not_move_it(distill, base):
    """`mla-moe serve` scores the sampled tokens: every score is at its own token, of packed sequences on eight
    devices."""
    serving = pytest.importorskip("tests.inference.serving")
    tokenizer = load_chat_tokenizer(Path(base), ByteTokenizer())
    engine = Engine(mla_moe.load_pretrained(base), max_num_seqs=8, max_model_len=128, decode=tokenizer.decode)
    with serving.serving(serving.server.application(engine, tokenizer, "base", max_waiting=256)) as port:
        url = f"http://127.0.0.1:{port}/v1"
        (step,) = distill(url, teacher_model="base", steps=1, minibatches=1)
        (top,) = distill(url, teacher_model="base", teacher_top_k=5, steps=1, minibatches=1)
        with pytest.raises(ConfigError, match=r"rl\.teacher = .*responded with status 404.*teacher_model"):
            TeacherEndpoint(url, "other", 258, ByteTokenizer().token_bytes).check()
    assert step["distillation/reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert step["grad_norm"] < 1e-3
    assert step["distillation/teacher_retries"] == 0
    assert top["distillation/reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert top["grad_norm"] < 1e-3
