"""Make `distillation.npz` beside this script: the reverse KL of a student to a teacher and its gradients, by PyTorch.

    python tests/golden/make_distillation.py

In float64, by the formula Σ_v p (log p − log q) of each token with p and q at a temperature (GKD, arXiv 2306.13649).
The loss is the mean over the tokens that count; it equals that of TRL 1.16 (`GKDTrainer.generalized_jsd_loss`, β = 1),
which the script checks. The teacher is wider than the student.

    student_h, student_head, teacher_h, teacher_head    inputs, float32
    mask                                                the tokens that count
    kl                                                  by token
    loss, grad_h, grad_head                             gradients with respect to the student
"""

from pathlib import Path

import numpy as np
import torch
from trl.experimental.gkd import GKDTrainer

B, T, D, E, V, TEMPERATURE = 3, 11, 6, 9, 40, 0.8


def main() -> None:
    rng = np.random.default_rng(7)
    shapes = {"student_h": (B, T, D), "student_head": (D, V), "teacher_h": (B, T, E), "teacher_head": (E, V)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    mask = rng.random((B, T)) < 0.6
    h, head, teacher_h, teacher_head = (torch.from_numpy(x).double() for x in arrays.values())
    h.requires_grad_()
    head.requires_grad_()
    student, teacher = h @ head, teacher_h @ teacher_head
    log_p = torch.log_softmax(student / TEMPERATURE, dim=-1)
    log_q = torch.log_softmax(teacher / TEMPERATURE, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    loss = kl[torch.from_numpy(mask)].mean()
    labels = torch.where(torch.from_numpy(mask), 0, -100)
    trl = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=1, temperature=TEMPERATURE)
    torch.testing.assert_close(loss, trl)
    grad_h, grad_head = torch.autograd.grad(loss, (h, head))
    arrays |= {"mask": mask, "temperature": TEMPERATURE, "kl": kl.detach().numpy(), "loss": loss.detach().numpy()}
    arrays |= {"grad_h": grad_h.numpy(), "grad_head": grad_head.numpy()}
    np.savez_compressed(Path(__file__).with_name("distillation.npz"), **arrays)
    print(f"loss {loss:.6f}, TRL {trl:.6f}")


if __name__ == "__main__":
    main()
