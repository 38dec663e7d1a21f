"""A reward of one's own: answers that are right are worth more the sooner they come.

    python train.py RECIPE --task.reward_function examples/reward.py:brief --task.reward_function-weight 0.5

It runs in a process of its own; what it raises is counted, and worth 0.
"""

import re


def brief(prompt: str, completion: str, example) -> float:
    """`example` has `question`, `answer` and `record`, the whole line of a file of questions."""
    found = re.search(r"<answer>(.*?)</answer>", completion)
    right = found is not None and found[1].strip() == example.answer
    return 1 - len(completion) / 200 if right else 0.0
