import json
import math

import pytest

from mla_moe import ConfigError, preset
from mla_moe.config import (
    DataConfig,
    DPOConfig,
    KernelConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    SampleConfig,
    ScheduleConfig,
    SFTConfig,
    TrainingConfig,
    load_recipe,
)

RECIPE = Recipe(
    run_dir="runs/x", model=preset("deepseek-v3"), data=DataConfig(train=("a", "b")), optimizer=OptimizerConfig("muon")
)


@pytest.mark.smoke
def test_json_round_trip():
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.stepz", 3, "no such field"),
        ("training.steps", "3", "must be of type int"),
        ("training.steps", True, "must be of type int"),
        ("training.remat", "some", "one of 'none'"),
        ("data.train", "a", "a list"),
        ("model", 3, "an object"),
        ("model.vocab_size", None, "must be of type int"),
        ("optimizer.schedule.peak_lr", -1.0, "positive"),
        ("data.max_lost_bytes_fraction", 1.0, "less than 1"),
        ("run_dir", "hf://org/run", "is a URL"),
        ("init_from", "ftp://host/run", "is a URL"),
        ("init_from", "hf://org", "namespace/name"),
        ("data.tokenizer", "https://host/tokenizer.json", "is a URL"),
        ("task.name", "https://host/a.jsonl", "is a URL"),
    ],
)
def test_errors_name_the_field(path, value, message):
    recipe = json.loads(RECIPE.to_json())
    *parents, last = path.split(".")
    node = recipe
    for name in parents:
        node = node[name]
    node[last] = value
    with pytest.raises(ConfigError, match=message) as error:
        Recipe.from_json(json.dumps(recipe))
    assert path in error.value.field


@pytest.mark.parametrize("suffix", [".json", ".py"])
def test_a_byte_order_mark_is_no_text(suffix, tmp_path):
    code = "from mla_moe.config import Recipe\nrecipe = Recipe(run_dir='runs/x')\n"
    text = RECIPE.to_json() if suffix == ".json" else code
    path = tmp_path / f"recipe{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_recipe(path).run_dir == "runs/x"


def test_missing_field_and_malformed_json():
    with pytest.raises(ConfigError, match="run_dir"):
        Recipe.from_json("{}")
    with pytest.raises(ConfigError, match="JSON"):
        Recipe.from_json("{")


def test_integers_are_valid_floats():
    recipe = json.loads(RECIPE.to_json())
    recipe["optimizer"]["max_grad_norm"] = 2
    assert Recipe.from_json(json.dumps(recipe)).optimizer.max_grad_norm == 2.0


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TrainingConfig(batch_size=10, gradient_accumulation_steps=3), "training.gradient_accumulation_steps"),
        (lambda: TrainingConfig(steps=-1), "training.steps"),
        (lambda: TrainingConfig(router_bias_freeze_fraction=2.0), "training.router_bias_freeze_fraction"),
        (lambda: ScheduleConfig(warmup_fraction=0.5, decay_fraction=0.6), "optimizer.schedule"),
        (lambda: OptimizerConfig(beta2=1.0), "optimizer.beta2"),
        (lambda: OptimizerConfig(max_grad_norm=0.0), "optimizer.max_grad_norm"),
        (lambda: MeshConfig(data=-1, expert=-1), "mesh"),
        (lambda: MeshConfig(fsdp=0), "mesh.fsdp"),
        (lambda: ScheduleConfig(peak_lr=math.inf), "optimizer.schedule.peak_lr"),
        (lambda: OptimizerConfig(eps=0.0), "optimizer.eps"),
        (lambda: OptimizerConfig(weight_decay=math.inf), "optimizer.weight_decay"),
        (lambda: OptimizerConfig(muon_peak_lr=math.inf), "optimizer.muon_peak_lr"),
        (lambda: TrainingConfig(aux_loss_weight=math.inf), "training.aux_loss_weight"),
        (lambda: KernelConfig(attention="flash"), "kernels.attention"),
        (lambda: SampleConfig(temperature=-1.0), "sample.temperature"),
        (lambda: SampleConfig(max_new_tokens=0), "sample.max_new_tokens"),
        (lambda: Recipe(run_dir="x", seed=-1), "seed"),
        (lambda: DataConfig(train=()), "data.train"),
        (lambda: DataConfig(tokenizer="bpe:10"), "data.tokenizer"),
        (lambda: Recipe(run_dir="x", training=TrainingConfig(sequence_length=4096)), "training.sequence_length"),
    ],
)
def test_invalid_values_name_the_field(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


def test_load_recipe(tmp_path):
    (tmp_path / "a.py").write_text("from mla_moe.config import Recipe\nrecipe = Recipe(run_dir='here')\n")
    (tmp_path / "b.json").write_text(RECIPE.to_json())
    (tmp_path / "c.py").write_text("recipe = 3\n")
    assert load_recipe(tmp_path / "a.py").run_dir == "here"
    assert load_recipe(tmp_path / "b.json") == RECIPE
    with pytest.raises(ConfigError, match="must bind"):
        load_recipe(tmp_path / "c.py")
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(tmp_path / "d.py")


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ("optimizer=OptimizerConfig(name='Muon')", "optimizer.name"),  # which importers construct alone
        ("training=TrainingConfig(steps=2.0)", "recipe.training.steps"),
        ("training=TrainingConfig(compute_dtype='float16')", "recipe.training.compute_dtype"),
        ("data=DataConfig(train='books/*.txt')", "recipe.data.train"),
    ],
)
def test_types_are_checked_in_a_python_file(tmp_path, section, field):
    path = tmp_path / "a.py"
    path.write_text(f"from mla_moe.config import *\nrecipe = Recipe(run_dir='here', {section})\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert error.value.field == field


@pytest.mark.parametrize("path", ["configs/quickstart.py", "configs/r1_pipeline.py"])
def test_recipes_in_configs_load(path, request):
    assert load_recipe(request.config.rootpath / path).training.steps > 0


@pytest.mark.parametrize("section", [SFTConfig(), DPOConfig()])
def test_stages_after_pretraining_for_epochs_have_their_own_steps(section):
    training = section.training(TrainingConfig(steps=0, epochs=2.0), 7)
    assert (training.steps, training.epochs) == (7, None)
