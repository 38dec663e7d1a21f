"""What a plan says of memory without compiling, against what is known by hand."""

from mla_moe import preset
from mla_moe.config import MeshConfig, Recipe
from mla_moe.parallel.accelerators import CHIPS
from mla_moe.plan import stages
from mla_moe.plan.topology import open_topology


def test_a_cache_holds_a_latent_and_a_key_of_every_token_and_layer():
    topology = open_topology("cpu:8")._replace(chip=CHIPS["v5p"])
    model = preset("tiny")
    recipe = Recipe(run_dir="x", model=model, mesh=MeshConfig(data=1, fsdp=2, expert=4))
    layers, latent, rotated = 3, 32, 16
    assert (model.num_hidden_layers, model.kv_lora_rank, model.qk_rope_head_dim) == (layers, latent, rotated)
    program = stages.decode(recipe, topology, batch=16, context=512)
    assert program.kinds["cache"] == layers * (16 // 8) * 512 * (latent + rotated) * 4
    program = stages.decode(recipe, topology, batch=16, context=512, int8_kv_cache=True)
    assert program.kinds["cache"] == layers * (16 // 8) * 512 * (latent + rotated + 8)
