"""The router (gate) of DeepSeek-V2 and V3: top-k experts per token and their weights, computed in float32."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_moe.config import MoEConfig
from mla_moe.nn.lora import project
from mla_moe.nn.param import matrix, router_bias
from mla_moe.ops.dropout import FeatureDropout
from mla_moe.parallel.sharded_einsum import plain_einsum


class Routing(NamedTuple):
    """The K experts of each token, the weights of their outputs, and the scores of all experts."""

    experts_NK: Int[Array, "N K"]
    weights_NK: Float[Array, "N K"]
    scores_NE: Float[Array, "N E"]
    logits_NE: Float[Array, "N E"] | None = None
    """Logits of the scores, for the router z-loss, which is 0 without them."""


RouterFunction = Callable[..., Routing]
"""What `MoE` takes as `router`: `router(x_ND)` gives the `Routing` of N tokens, and `router(x_ND, replay_NK)` that with
these experts, where an entry is not −1; a router that is never called with a replay need not take one.

K is `num_experts_per_tok` and E `router_width`, which counts zero-computation experts too. Gradients flow through the
weights, through the scores only by the auxiliary loss, and through the logits only by the router z-loss; the experts of
a token are distinct. It is an `nnx.Module`, if it has parameters, or a function. Under a mesh it runs on each device's
tokens, with all parameters, so it has no state that it changes.
"""


class FunctionRouter(nnx.Module):
    """A router without parameters."""

    def __init__(self, function: RouterFunction):
        self.function = function

    def __call__(self, *args: Array) -> Routing:
        return self.function(*args)


class Router(nnx.Module):
    """Top-k router. With `router_bias` (auxiliary-loss-free load balancing; DeepSeek-V3, section 2.1.2) it has a bias
    per expert, which affects the selection and not the weights."""

    def __init__(self, cfg: MoEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        axes = {"embed": cfg.hidden_size, "router": cfg.router_width}
        self.weight = matrix(rngs, axes, contracts=("embed",), std=cfg.initializer_range, dtype=jnp.float32)
        if cfg.router_bias:
            self.bias = router_bias(cfg.router_width)

    def __call__(
        self,
        x_ND: Float[Array, "N D"],
        replay_NK: Int[Array, "N K"] | None = None,
        adapter_ids_N: Int[Array, "N"] | None = None,
        dropout: FeatureDropout | None = None,
    ) -> Routing:
        """Route N tokens. Routing replay: `replay_NK` gives their experts, −1 for the router's choice; the weights come
        from the router in both cases. `adapter_ids_N` and `dropout`: see `project`."""
        x32_ND = x_ND.astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            inputs = x32_ND, self, "weight", jnp.float32, adapter_ids_N, dropout
            logits_NE = project(plain_einsum, "ND,DE->NE", *inputs)
        bias_E = self.bias[...] if self.cfg.router_bias else None
        return gate(self.cfg, logits_NE, bias_E, replay_NK)


def gate(
    cfg: MoEConfig,
    logits_NE: Float[Array, "N E"],
    bias_E: Float[Array, "E"] | None = None,
    replay_NK: Int[Array, "N K"] | None = None,
) -> Routing:
    """Select experts by score + bias, within the groups of the highest group scores, and weight them by score.

    DeepSeek-V3 (equations 12-16) has sigmoid scores, a bias, and as a group's score the sum of its two best experts;
    DeepSeek-V2 has softmax scores, no bias, and as a group's score its best expert.
    """
    scores_NE = jax.nn.softmax(logits_NE, axis=-1) if cfg.scoring_func == "softmax" else jax.nn.sigmoid(logits_NE)
    selection_NE = jax.lax.stop_gradient(scores_NE)
    if bias_E is not None:
        selection_NE += bias_E
    if cfg.n_group > 1:
        by_group_NGe = selection_NE.reshape(len(selection_NE), cfg.n_group, -1)
        top2 = cfg.group_score == "top2"
        best_NG = jax.lax.top_k(by_group_NGe, 2)[0].sum(axis=-1) if top2 else by_group_NGe.max(axis=-1)
        _, groups = jax.lax.top_k(best_NG, cfg.topk_group)
        kept_NG = jax.nn.one_hot(groups, cfg.n_group, dtype=jnp.bool_).any(axis=1)
        # Not 0 outside the groups, which is above a negative bias.
        selection_NE = jnp.where(kept_NG[:, :, None], by_group_NGe, -jnp.inf).reshape(selection_NE.shape)
    _, experts_NK = jax.lax.top_k(selection_NE, cfg.num_experts_per_tok)
    if replay_NK is not None:
        experts_NK = jnp.where(replay_NK >= 0, replay_NK, experts_NK)
    weights_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=-1)
    if cfg.norm_topk_prob:
        weights_NK /= weights_NK.sum(axis=-1, keepdims=True) + 1e-20
    return Routing(experts_NK, weights_NK * cfg.routed_scaling_factor, scores_NE, logits_NE)
