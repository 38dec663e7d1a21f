"""A reward function: a correct answer gets a higher reward if the completion is shorter.

    python train.py RECIPE --task.reward-functions examples/reward.py:brief --task.reward-weights 0.5

It runs in a worker process; a call that raises is counted as a failure, with a reward of 0.
"""

import re
from typing import Any


def brief(prompt: str, completion: str, example: Any) -> float:
    """`example` has `question`, `answer` and `record`, the full record of the example in its task."""
    found = re.search(r"<answer>(.*?)</answer>", completion)
    correct = found is not None and found[1].strip() == example.answer
    return 1 - len(completion) / 200 if correct else 0.0
