"""Which experts a token goes to, and with what weight: the gates of DeepSeek-V2 and V3, all in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_moe.config import ModelConfig
from mla_moe.nn.param import RouterBias, matrix


class Routing(NamedTuple):
    """A token's experts, what their outputs are multiplied by, and the scores of all experts."""

    experts_NK: Int[Array, "N K"]
    weights_NK: Float[Array, "N K"]
    scores_NE: Float[Array, "N E"]


class Router(nnx.Module):
    """The gate. With `noaux_tc` it has a bias per expert, which selects but never weighs."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        axes = {"embed": cfg.hidden_size, "router": cfg.n_routed_experts}
        self.weight = matrix(rngs, axes, contracts=("embed",), std=cfg.initializer_range, dtype=jnp.float32)
        if cfg.topk_method == "noaux_tc":
            self.bias = RouterBias(jnp.zeros(cfg.n_routed_experts, jnp.float32), axes=("router",), contracts=())

    def __call__(self, x_ND: Float[Array, "N D"], replay_NK: Int[Array, "N K"] | None = None) -> Routing:
        """With `replay_NK` tokens go to those experts and −1 stands for a free choice; weights are live either way."""
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
    """V3 (`noaux_tc`; equations 12-16): choose by score + bias within the best groups, weigh by score alone."""
    scores_NE = jax.nn.sigmoid(logits_NE)
    choice_NE = jax.lax.stop_gradient(scores_NE) + bias_E
    if cfg.n_group > 1:
        two_best = jax.lax.top_k(_groups(cfg, choice_NE), 2)[0].sum(axis=-1)
        choice_NE = _keep_groups(cfg, choice_NE, two_best)
    experts_NK = _chosen(cfg, choice_NE, replay_NK)
    weights_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=-1)
    if cfg.norm_topk_prob:
        weights_NK /= weights_NK.sum(axis=-1, keepdims=True) + 1e-20
    return Routing(experts_NK, weights_NK * cfg.routed_scaling_factor, scores_NE)


def softmax_gate(
    cfg: ModelConfig, logits_NE: Float[Array, "N E"], replay_NK: Int[Array, "N K"] | None = None
) -> Routing:
    """V2: the best softmax scores, over all experts or (`group_limited_greedy`) within the groups of the best ones."""
    scores_NE = jax.nn.softmax(logits_NE, axis=-1)
    choice_NE = jax.lax.stop_gradient(scores_NE)
    if cfg.topk_method == "group_limited_greedy":
        choice_NE = _keep_groups(cfg, choice_NE, _groups(cfg, choice_NE).max(axis=-1))
    experts_NK = _chosen(cfg, choice_NE, replay_NK)
    weights_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=-1)
    return Routing(experts_NK, weights_NK * cfg.routed_scaling_factor, scores_NE)


def _chosen(cfg, choice_NE, replay_NK):
    _, best_NK = jax.lax.top_k(choice_NE, cfg.num_experts_per_tok)
    return best_NK if replay_NK is None else jnp.where(replay_NK >= 0, replay_NK, best_NK)


def _groups(cfg, x_NE):
    return x_NE.reshape(x_NE.shape[0], cfg.n_group, -1)


def _keep_groups(cfg, choice_NE, group_score_NG):
    """−inf outside the `topk_group` best groups. Zero would not do: with negative biases it would win."""
    _, best = jax.lax.top_k(group_score_NG, cfg.topk_group)
    kept_NG = jax.nn.one_hot(best, cfg.n_group, dtype=jnp.bool_).any(axis=1)
    return jnp.where(kept_NG[:, :, None], _groups(cfg, choice_NE), -jnp.inf).reshape(choice_NE.shape)
