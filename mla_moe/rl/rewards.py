import re
from typing import NamedTuple
class Scores(NamedTuple):
    values: dict
    total: float
ANY = r"((?:(?!<think>|</think>|<answer>|</answer>).)*)"
def parse(text):
    m = re.fullmatch(rf"\s*<think>{ANY}</think>\s*<answer>{ANY}</answer>\s*", text, re.S)
    a = re.findall(rf"<answer>{ANY}</answer>", text, re.S)
    return bool(m), a[-1] if a else None
def judge(task, items):
    out = []
    for prompt, text, example in items:
        ok, ans = parse(text)
        acc = 0.0 if ans is None else task.score(example, ans)
        out.append(Scores({"format": float(ok), "accuracy": acc}, float(ok) + acc))
    return out
