"""The assumptions about Orbax's file layout in `orbax_layout`, one by one, against the installed Orbax."""

import json
import os

import numpy as np
import orbax.checkpoint as ocp
import pytest

from mla_moe import ConfigError
from mla_moe.checkpoint.orbax_layout import StateArrays, find_step, read_json_item, require_known_format

STATE = {
    "params": {"moe_layers/moe/gate_up": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "embed": np.ones(5)},
    "biases": {"moe_layers/moe/router/bias": np.arange(3, dtype=np.float32)},
    "optimizer": [{"count": np.int32(7)}],
}
MODEL = {"hidden_size": 8, "rope_scaling": None}
NAMES = {"params.moe_layers/moe/gate_up", "params.embed", "biases.moe_layers/moe/router/bias", "optimizer.0.count"}


VERSION = {"format_version": 10**9}


@pytest.fixture(scope="module", params=[True, False], ids=["run", "converted"])
def step(request, tmp_path_factory):
    """A step that Orbax saved last of two: as during training (with OCDBT), or as by a conversion (without)."""
    directory = tmp_path_factory.mktemp("checkpoints")
    model = ocp.args.JsonSave(MODEL)
    if request.param:
        with ocp.CheckpointManager(directory) as manager:
            for number in (1, 2):
                items = ocp.args.Composite(state=ocp.args.StandardSave(STATE), model=model)
                manager.save(number, args=items, custom_metadata=VERSION)
        return directory / "2"
    handlers = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_ocdbt=False), model=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handlers) as checkpointer:
        for number in (1, 2):
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(STATE), model=model)
            checkpointer.save(directory / str(number), items, custom_metadata=VERSION)
    return directory / "2"


def test_items_are_directories_and_the_commit_is_a_file(step):
    moved = "Orbax moved it; change find_step"
    for item in ("state", "model"):
        assert (step / item).is_dir(), f"an item is no longer a directory of its name, {item}: {moved}"
    commit = step / "_CHECKPOINT_METADATA"
    assert commit.is_file(), f"a complete step has no _CHECKPOINT_METADATA: {moved}"


@pytest.mark.parametrize(
    ("saved", "newest"),
    [
        (["rejection/1", "rl/20", "sft/300", "pretrain/4000"], "rejection/1"),
        (["rl/100", "rl/20", "rl/9"], "rl/100"),
        (["rl/4", "rl/9.damaged", "rl/²", "rl.old/7", "kept/8", "pretrain/6"], "rl/4"),
    ],
)
def test_the_newest_checkpoint_is_the_last_step_of_the_last_stage_whatever_the_clock_said(tmp_path, saved, newest):
    for time, name in enumerate(saved):  # the earlier in the list, the older by any clock
        commit = tmp_path / "checkpoints" / name / "_CHECKPOINT_METADATA"
        commit.parent.mkdir(parents=True)
        commit.write_text(json.dumps({"commit_timestamp_nsecs": time}))
        for path in (commit, commit.parent, commit.parent.parent):
            os.utime(path, (time, time))
    assert find_step(tmp_path) == tmp_path / "checkpoints" / newest
    stage = (tmp_path / "checkpoints" / newest).parent
    assert find_step(stage) == tmp_path / "checkpoints" / newest


def test_the_commit_has_the_custom_metadata(step):
    moved = "Orbax moved it; change require_known_format"
    found = json.loads((step / "_CHECKPOINT_METADATA").read_text()).get("custom_metadata")
    assert found == VERSION, f"_CHECKPOINT_METADATA does not have the object custom_metadata: {moved}"
    with pytest.raises(ConfigError, match="newer"):
        require_known_format(step)


def test_a_json_item_is_one_file(step):
    moved = "Orbax moved it; change read_json_item"
    file = step / "model" / "metadata"
    assert file.is_file(), f"an item of JsonSave is no longer the file ITEM/metadata: {moved}"
    assert read_json_item(step, "model") == MODEL, f"ITEM/metadata is not the saved object: {moved}"
    assert read_json_item(step, "digests", required=False) == {}


def test_the_tree_metadata_list_the_keys_of_each_array(step):
    moved = "Orbax moved it; change StateArrays"
    file = step / "state" / "_METADATA"
    assert file.is_file(), f"there is no state/_METADATA: {moved}"
    tree = json.loads(file.read_text()).get("tree_metadata")
    assert isinstance(tree, dict), f"state/_METADATA has no object tree_metadata: {moved}"
    for leaf in tree.values():
        keys = leaf.get("key_metadata")
        assert isinstance(keys, list), f"a leaf of tree_metadata has no list key_metadata: {moved}"
        assert all("key" in entry for entry in keys), f"an entry of key_metadata has no key: {moved}"
    names = {".".join(keys) for keys in StateArrays(step).keys}
    assert names == NAMES, f"the keys in key_metadata are not those of the saved tree: {moved}"


def test_each_array_is_a_zarr_array_under_its_keys(step, request):
    moved = "Orbax moved it; change array_spec"
    ocdbt, arrays = request.node.callspec.params["step"], StateArrays(step)
    assert arrays.uses_ocdbt == ocdbt, f"state/manifest.ocdbt does not tell whether OCDBT is used: {moved}"
    if not ocdbt:
        file = step / "state" / "params.moe_layers/moe/gate_up" / ".zarray"
        assert file.is_file(), f"an array is no longer a Zarr v2 directory named by its keys, joined with '.': {moved}"
    for group in ("params", "biases"):
        for path, expected in STATE[group].items():
            found = arrays[group, path].read().result()
            assert found.dtype == expected.dtype, f"{path} is stored in another dtype: {moved}"
            np.testing.assert_array_equal(found, expected, err_msg=f"{path} has other values: {moved}")
