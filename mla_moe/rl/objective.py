import jax, jax.numpy as jnp, numpy as np


def advantages(reward_GS, name):
    c = reward_GS - reward_GS.mean(axis=1, keepdims=True)
    return c / (reward_GS.std(axis=1, keepdims=True) + 1e-6)


def objective(rl, logprob_BT, entropy_BT, part):
    mask = part["answer"] >= 0
    old = part.get("old_logprob", jax.lax.stop_gradient(logprob_BT))
    old = jax.lax.stop_gradient(old)
    ratio = jnp.exp(jnp.where(mask, logprob_BT - old, 0))
    A = part["advantage"]
    surr = jnp.minimum(ratio * A, jnp.clip(ratio, 0.8, 1.2) * A)
    tis = jnp.minimum(jnp.exp(jnp.where(mask, old - part["sampler_logprob"], 0)), 2.0)
    loss = -(part["weight"] * tis * surr).sum()
    kl = 0.0
    sums = {
        "tokens": mask.sum(),
        "clipped": (mask & (jnp.abs(ratio - 1) > 0.2)).sum(),
        "entropy": jnp.where(mask, entropy_BT, 0).sum(),
        "mismatch": jnp.where(mask, jnp.abs(old - part["sampler_logprob"]), 0).sum(),
        "kl": jnp.float32(0),
    }
    if "reference_logprob" in part:
        d = jnp.where(mask, part["reference_logprob"] - logprob_BT, 0)
        k3 = jnp.exp(d) - d - 1
        loss += rl.kl * (part["weight"] * k3).sum()
        sums["kl"] = k3.sum()
    return loss, sums
