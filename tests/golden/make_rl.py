"""Make `rl_objective.npz` beside this script: losses of answers and their gradients, by PyTorch's autograd.

    python tests/golden/make_rl.py

Written answer by answer from the papers' formulas (SPEC, R1), in float64. Answers are not packed here: `length_N` cuts
the arrays `[tokens]` into them, and `reward_GS` belongs to them in the same order. Per objective

    OBJECTIVE/{logprob,old,sampler,reference}     inputs
    OBJECTIVE/advantage                           by answer
    OBJECTIVE/{plain,corrected}/{loss,gradient}   with β alone; with off-policy and importance limits as well
"""

from pathlib import Path

import numpy as np
import torch

G, S, MAX_NEW_TOKENS, BETA, DELTA, C = 3, 4, 48, 0.04, 0.03, 1.5
LENGTHS = [1, 7, 48, 3, 20, 1, 2, 31, 5, 13, 1, 9]
CLIP = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}


def advantages(reward_GS: torch.Tensor, objective: str) -> torch.Tensor:
    above = reward_GS - reward_GS.mean(dim=1, keepdim=True)
    if objective == "dr_grpo":
        return above.flatten()
    return (above / (reward_GS.std(dim=1, unbiased=False, keepdim=True) + 1e-6)).flatten()


def objective_of(objective, theta, old, sampler, reference, A, corrected, seen):
    """`J`, to be made large. Lists of answers."""
    low, high = CLIP[objective]
    answers = []
    for i in range(len(A)):
        if objective == "gspo":
            s = (theta[i] - old[i]).mean().exp()
            ratio = s.detach() * (theta[i] - theta[i].detach()).exp()  # GSPO-token
        else:
            ratio = (theta[i] - old[i]).exp()
        gain = torch.minimum(ratio * A[i], ratio.clamp(1 - low, 1 + high) * A[i])
        seen["low"] += int(((ratio < 1 - low) & (A[i] < 0)).sum())
        seen["high"] += int(((ratio > 1 + high) & (A[i] > 0)).sum())
        if corrected:
            weight = (old[i] - sampler[i]).exp()
            seen["truncated"] += int((weight > C).sum())
            gain = gain * weight.clamp(max=C)
            if A[i] < 0 and (sampler[i] - theta[i]).mean() > DELTA:
                seen["masked"] += 1
                gain = gain * 0
        log_r = reference[i] - theta[i]
        kl = log_r.exp() - log_r - 1
        answers.append(gain - (0.0 if objective == "dapo" else BETA) * kl)
    if objective == "dr_grpo":
        return sum(answer.sum() for answer in answers) / (len(A) * MAX_NEW_TOKENS)
    if objective == "dapo":
        return torch.cat(answers).mean()
    return torch.stack([answer.mean() for answer in answers]).mean()


def main() -> None:
    rng = np.random.default_rng(3)
    tokens = sum(LENGTHS)
    reward_GS = rng.choice([0.0, 1.0, 2.0], (G, S)) + rng.choice([0.0, -0.1], (G, S))
    arrays = {"length_N": np.array(LENGTHS), "reward_GS": reward_GS, "max_new_tokens": MAX_NEW_TOKENS}
    arrays |= {"beta": BETA, "off_policy_limit": DELTA, "importance_limit": C}  # keys of the committed file
    for objective in CLIP:
        spread = 1e-3 if objective == "gspo" else 0.3
        theta = -rng.exponential(1.5, tokens)
        old = theta + spread * rng.standard_normal(tokens)
        inputs = {
            "logprob": theta,
            "old": old,
            "sampler": old + 0.3 * rng.standard_normal(tokens),
            "reference": theta + 0.5 * rng.standard_normal(tokens),
        }
        inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
        A = advantages(torch.from_numpy(reward_GS), objective)
        arrays |= {f"{objective}/{name}": value for name, value in inputs.items()}
        arrays[f"{objective}/advantage"] = A.numpy()
        for case in ("plain", "corrected"):
            seen = dict.fromkeys(("low", "high", "truncated", "masked"), 0)
            theta, *fixed = (torch.from_numpy(value).double() for value in inputs.values())
            theta.requires_grad_()
            lists = (x.split(LENGTHS) for x in (theta, *fixed))
            loss = -objective_of(objective, *lists, A, case == "corrected", seen)
            loss.backward()
            arrays[f"{objective}/{case}/loss"] = loss.detach().numpy()
            arrays[f"{objective}/{case}/gradient"] = theta.grad.numpy()
            print(f"{objective:8} {case:10} loss {loss:+.6f}  {seen}")
            assert seen["low"]
            assert seen["high"]
            assert case == "plain" or (seen["truncated"] and seen["masked"])
    np.savez_compressed(Path(__file__).with_name("rl_objective.npz"), **arrays)


if __name__ == "__main__":
    main()
