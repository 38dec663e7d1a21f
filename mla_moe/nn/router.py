"""The router (gate) of DeepSeek-V2 and V3: top-k experts per token and their weights, computed in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_moe.config import ModelConfig
from mla_moe.nn.param import RouterBias, matrix


class Routing(NamedTuple):
    """The K experts of each token, the weights of their outputs, and the scores of all experts."""

    experts_NK: Int[Array, "N K"]
    weights_NK: Float[Array, "N K"]
    scores_NE: Float[Array, "N E"]


class Router(nnx.Module):
    """Top-k router. With `noaux_tc` (auxiliary-loss-free load balancing; DeepSeek-V3, section 2.1.2) it has a bias per
    expert, which affects the selection and not the weights."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        axes = {"embed": cfg.hidden_size, "router": cfg.n_routed_experts}
        self.weight = matrix(rngs, axes, contracts=("embed",), std=cfg.initializer_range, dtype=jnp.float32)
        if cfg.topk_method == "noaux_tc":
            self.bias = RouterBias(jnp.zeros(cfg.n_routed_experts, jnp.float32), axes=("router",), contracts=())

    def __call__(self, x_ND: Float[Array, "N D"], replay_NK: Int[Array, "N K"] | None = None) -> Routing:
        """Route N tokens. Routing replay: `replay_NK` gives their experts, −1 for the router's choice; the weights come
        from the router in both cases."""
        logits_NE = jnp.einsum("ND,DE->NE", x_ND.astype(jnp.float32), self.weight[...], precision="highest")
        if self.cfg.topk_method == "noaux_tc":
            return sigmoid_gate(self.cfg, logits_NE, self.bias[...], replay_NK)
        return softmax_gate(self.cfg, logits_NE, replay_NK)


def sigmoid_gate(
    cfg: ModelConfig,
    logits_NE: Float[Array, "N E"],
    bias_E: Float[Array, "E"],
    replay_NK: Int[Array, "N K"] | None = None,
) -> Routing:
    """DeepSeek-V3 (`noaux_tc`; equations 12-16): select by score + bias within the best groups, weight by score."""
    scores_NE = jax.nn.sigmoid(logits_NE)
    selection_NE = jax.lax.stop_gradient(scores_NE) + bias_E
    if cfg.n_group > 1:
        best_two_NG = jax.lax.top_k(_by_group(cfg, selection_NE), 2)[0].sum(axis=-1)
        selection_NE = _mask_groups(cfg, selection_NE, best_two_NG)
    experts_NK = _top_k(cfg, selection_NE, replay_NK)
    weights_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=-1)
    if cfg.norm_topk_prob:
        weights_NK /= weights_NK.sum(axis=-1, keepdims=True) + 1e-20
    return Routing(experts_NK, weights_NK * cfg.routed_scaling_factor, scores_NE)


def softmax_gate(
    cfg: ModelConfig, logits_NE: Float[Array, "N E"], replay_NK: Int[Array, "N K"] | None = None
) -> Routing:
    """DeepSeek-V2: the highest softmax scores, of all experts (`greedy`) or within the groups that contain the highest
    ones (`group_limited_greedy`)."""
    scores_NE = jax.nn.softmax(logits_NE, axis=-1)
    selection_NE = jax.lax.stop_gradient(scores_NE)
    if cfg.topk_method == "group_limited_greedy":
        selection_NE = _mask_groups(cfg, selection_NE, _by_group(cfg, selection_NE).max(axis=-1))
    experts_NK = _top_k(cfg, selection_NE, replay_NK)
    weights_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=-1)
    return Routing(experts_NK, weights_NK * cfg.routed_scaling_factor, scores_NE)


def _top_k(
    cfg: ModelConfig, selection_NE: Float[Array, "N E"], replay_NK: Int[Array, "N K"] | None
) -> Int[Array, "N K"]:
    _, experts_NK = jax.lax.top_k(selection_NE, cfg.num_experts_per_tok)
    return experts_NK if replay_NK is None else jnp.where(replay_NK >= 0, replay_NK, experts_NK)


def _by_group(cfg: ModelConfig, x_NE: Float[Array, "N E"]) -> Float[Array, "N G e"]:
    return x_NE.reshape(x_NE.shape[0], cfg.n_group, -1)


def _mask_groups(
    cfg: ModelConfig, selection_NE: Float[Array, "N E"], group_scores_NG: Float[Array, "N G"]
) -> Float[Array, "N E"]:
    """Group-limited routing: −inf outside the `topk_group` best groups. Not 0, which is above a negative bias."""
    _, groups = jax.lax.top_k(group_scores_NG, cfg.topk_group)
    kept_NG = jax.nn.one_hot(groups, cfg.n_group, dtype=jnp.bool_).any(axis=1)
    return jnp.where(kept_NG[:, :, None], _by_group(cfg, selection_NE), -jnp.inf).reshape(selection_NE.shape)
