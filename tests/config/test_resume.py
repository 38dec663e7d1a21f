import dataclasses

from mla_moe import Yarn
from mla_moe.config import ModelConfig, Recipe
from mla_moe.config.resume import leaves

LEAVES = leaves(Recipe("x"))
"""By dotted name; `model.rope_scaling` is None here."""

FREE = (
    "run_dir mesh. checkpoint. sample. kernels.attention kernels.grouped_matmul kernels.dispatch "
    "kernels.compiler_options data.prefetch data.max_lost_bytes_fraction training.loss_chunk training.remat "
    "training.max_skipped_steps training.loss_spike_threshold training.log_every training.eval_every "
    "rl.micro_batch_size rl.max_num_seqs rl.eval_every data.max_record_bytes training.max_step_minutes profile. "
    "resume_step resume_changes track sft.eval_every sft.eval_samples dpo.eval_every"
)


def changeable(*started):
    return {name for name, leaf in LEAVES.items() if leaf.may_change(set(started))}


def section(*names):
    return {name for name in LEAVES if name.startswith(names)}


def test_fields_that_may_change_at_any_restart():
    assert changeable("pretrain", "sft", "rl", "rejection") == section(*FREE.split())


def test_sections_may_change_until_a_stage_that_uses_them_starts():
    free = changeable("pretrain", "sft", "rl", "rejection")
    assert changeable("pretrain") == free | section("task.", "lora.", "sft.", "dpo.", "rl.", "rejection.")
    assert changeable("pretrain", "sft") == free | section("dpo.", "rl.", "rejection.")
    assert changeable("rl") == free | section("rejection.")
    assert changeable("rejection") == free


def test_fields_that_may_change_if_that_is_stated():
    """Those of the newest stage; those of stages that have not started may change in any case."""

    def stated(*started):
        return {name for name, leaf in LEAVES.items() if leaf.may_change_if_stated(set(started))}

    def of(prefix, *names, optimizer):
        fields = {f"{prefix}.{name}" for name in names} | {f"{optimizer}.muon_peak_lr"}
        return fields | {name for name in LEAVES if name.startswith(f"{optimizer}.schedule.")}

    sizes = "steps", "epochs", "batch_size", "gradient_accumulation_steps"
    rejection = {"rejection.steps"}
    rl = rejection | of("rl", "steps", "prompts_per_step", "kl_coef", optimizer="rl.optimizer")
    dpo = rl | of("dpo", *sizes, optimizer="dpo.optimizer")
    sft = dpo | of("sft", *sizes, optimizer="sft.optimizer")
    pretrain = sft | of("training", *sizes, optimizer="optimizer") | {"data.weights"}
    assert stated("pretrain", "sft", "dpo", "rl", "rejection") == rejection
    assert stated("pretrain", "sft", "rl") == rl
    assert stated("dpo") == dpo
    assert stated("pretrain", "sft") == sft
    assert stated("pretrain") == pretrain


def test_fields_that_must_be_equal_to_restore_the_full_state_of_another_run():
    equal = {name for name, leaf in LEAVES.items() if leaf.equal_for_full_state}
    assert equal == section("data.") - {"data.prefetch", "data.max_lost_bytes_fraction", "data.max_record_bytes"} | {
        "seed", "optimizer.name", "optimizer.freeze", "training.batch_size", "training.sequence_length",
        "model.num_nextn_predict_layers",
    }  # fmt: skip


def test_model_fields_that_may_differ_from_the_checkpoint():
    fields = dataclasses.fields(ModelConfig)
    assert {f.name for f in fields if f.metadata.get("init_from") == "may_differ"} == {
        "max_position_embeddings", "rope_theta", "rope_scaling", "initializer_range", "num_nextn_predict_layers",
    }  # fmt: skip


def test_optional_section_has_the_policy_of_its_field():
    yarn = Yarn(factor=2.0, original_max_position_embeddings=32)
    recipe = Recipe("x", model=dataclasses.replace(Recipe("x").model, rope_scaling=yarn))
    assert leaves(recipe)["model.rope_scaling.factor"].value == 2.0
    assert not leaves(recipe)["model.rope_scaling.factor"].may_change({"pretrain"})
