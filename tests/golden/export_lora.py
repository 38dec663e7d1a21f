"""Write `lora/exported` beside this script: random adapters of several ranks for the model in `k2`."""

import shutil
from pathlib import Path

import numpy as np

from mla_moe.checkpoint.adapter import AdapterCheckpoint
from mla_moe.checkpoint.peft import write_peft
from mla_moe.checkpoint.reader import open_checkpoint
from mla_moe.config import LoRAConfig
from mla_moe.nn.abstract_model import AbstractModel

HERE = Path(__file__).parent
LORA = LoRAConfig(
    rank=3, alpha=6.0, rslora=True,
    targets=(
        "attention", "dense", "shared=2", "experts=5:7", "moe_layers/moe/down=4", "moe_layers/attention/q_b=6:2.5",
    ),
)  # fmt: skip


def random_adapters() -> AdapterCheckpoint:
    base, random = open_checkpoint(HERE / "k2"), np.random.default_rng(0)
    model = AbstractModel(base.cfg, lora=LORA)
    shapes = {path: model.variables[path].get_value().shape for path in model.adapter_paths}
    arrays = {path: (0.3 * random.standard_normal(shape)).astype(np.float32) for path, shape in shapes.items()}
    own = {path: (lambda array=array: array) for path, array in arrays.items()}
    return AdapterCheckpoint(base, "../../k2", LORA, base.directory, own)


if __name__ == "__main__":
    shutil.rmtree(HERE / "lora" / "exported", ignore_errors=True)
    write_peft(random_adapters(), HERE / "lora" / "exported", None)
