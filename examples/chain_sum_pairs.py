"""Prompt-completion pairs for SFT on reasoning-gym's `chain_sum`: a bit less than half of the completions have every
reasoning step, the others the shortcut, only the first step. Needs `pip install 'mla_moe[rl]'`.

    python examples/chain_sum_pairs.py runs/chain_sum.jsonl
    python train.py configs/chain_sum.py
"""

import json
import random
import re
import sys
from pathlib import Path

from mla_moe.config import load_recipe
from mla_moe.rl.tasks import open_task

PAIRS = 16_000
SHORTCUT = 0.55
"""Fraction of completions with only the first reasoning step."""


def steps(question: str) -> list[str]:
    """`4 + 3 - 2` → `4 + 3 = 7`, `7 - 2 = 5`."""
    numbers = re.findall(r"(^|[+-]) ?(-?\d+)", question)
    value, worked = int(numbers[0][1]), []
    for sign, digits in numbers[1:]:
        new = value + int(digits) if sign == "+" else value - int(digits)
        worked.append(f"{value} {sign} {digits} = {new}")
        value = new
    return worked


def main(path: Path) -> None:
    task = open_task(load_recipe(Path(__file__).parents[1] / "configs" / "chain_sum.py").task)
    draw = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number in range(PAIRS):
            example = task.example("train", number)
            worked = steps(example.record["metadata"]["expression"])
            assert worked[-1].endswith(f"= {example.answer}")
            shown = worked[:1] if draw.random() < SHORTCUT else worked
            completion = f"<think>{', '.join(shown)}</think><answer>{example.answer}</answer>"
            file.write(json.dumps({"question": example.question, "completion": completion}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
