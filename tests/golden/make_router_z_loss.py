"""Make `router_z_loss.npz` beside this script: ST-MoE's router z-loss (arXiv 2202.08906, equation 5) in PyTorch.

    python tests/golden/make_router_z_loss.py

In the file: activations `x` [B, T, D], where they are no padding, the router's `weight` [D, E], the loss's sum over the
tokens, and its gradients with respect to both.
"""

from pathlib import Path

import numpy as np
import torch

B, T, D, E = 8, 6, 32, 8


def main() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(B, T, D, requires_grad=True), (0.5 * torch.randn(D, E)).requires_grad_()
    not_padding = torch.arange(T) < torch.tensor([6, 1, 4, 0, 6, 2, 5, 3])[:, None]
    loss = (torch.log(torch.exp(x @ weight).sum(dim=-1)) ** 2)[not_padding].sum()
    loss.backward()
    arrays = {"x": x, "weight": weight, "loss": loss, "x_gradient": x.grad, "weight_gradient": weight.grad}
    found = {name: array.detach().numpy() for name, array in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("router_z_loss.npz"), **found, not_padding=not_padding)


if __name__ == "__main__":
    main()
