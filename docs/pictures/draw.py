"""Draw the SVG pictures of docs/how-it-works.md, next to this script, from the functions that they show.

    python docs/pictures/draw.py

380 units wide, so that text is readable on a phone. The background follows the reader's light or dark color scheme.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mla_moe import preset
from mla_moe.config import KernelConfig
from mla_moe.nn.router import gate
from mla_moe.parallel.dispatch_plan import dispatch_plan
from mla_moe.rl.objectives import advantages

WIDTH, LEFT, SPAN = 380, 20, 340
STYLE = """
:root { --ink: #1c2733; --soft: #5b6876; --line: #c3ccd6; --ground: #f5f7f9;
  --blue: #3b82c4; --pale: #bcd6ee; --warm: #c9621f; --good: #2a8d61; --bad: #b8482f }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe6ed; --soft: #9aa7b4; --line: #44505d; --ground: #1c232b;
  --blue: #5b9fdc; --pale: #2c4a66; --warm: #ec8f4d; --good: #4fbf8c; --bad: #e57a5f } }
text { font: 13px system-ui, sans-serif; fill: var(--ink) }
.soft { fill: var(--soft) } .warm { fill: var(--warm) } .strong { font-weight: 600 } .end { text-anchor: end }
.mid { text-anchor: middle } .mono { font: 12px ui-monospace, monospace } .small { font-size: 12px }
""".strip()


def text(x: float, y: float, content: str, classes: str = "") -> str:
    content = content.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" class="{classes}">{content}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, attributes: str = "") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="var(--{fill})" {attributes}/>'
    )


def frame(x: float, y: float, width: float, height: float, attributes: str = "") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5" fill="none" '
        f'stroke="var(--line)" {attributes}/>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float, color: str = "soft", attributes: str = "") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="var(--{color})" '
        f'stroke-width="1.4" marker-end="url(#arrow-{color})" {attributes}/>'
    )


def arrow_head(color: str) -> str:
    return (
        f'<marker id="arrow-{color}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="var(--{color})"/></marker>'
    )


def picture(height: int, title: str, *elements: str) -> str:
    arrow_heads = "".join(map(arrow_head, ("soft", "blue", "warm")))
    body = "\n".join(elements)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">\n'
        f"<style>{STYLE}</style><defs>{arrow_heads}</defs>\n"
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="var(--ground)"/>\n{body}\n</svg>\n'
    )


def latent_cache() -> str:
    """Hidden state, latent, and keys and values of one token in one layer of V3, to one scale."""
    cfg = preset("deepseek-v3")
    hidden, latent, key = cfg.hidden_size, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    heads = 2 * cfg.num_attention_heads * cfg.v_head_dim
    unit = SPAN / hidden
    rows = [box(LEFT, 190 + 15 * i, min(SPAN, heads * unit - SPAN * i), 12, "pale") for i in range(-(-heads // hidden))]
    return picture(
        322,
        "A token's hidden state of 7,168 values is projected to 576 cached values, from which 32,768 are computed",
        text(LEFT, 28, f"hidden state of a token: {hidden:,} values"),
        box(LEFT, 36, SPAN, 12, "line"),
        arrow(LEFT + 12, 54, LEFT + 12, 88),
        text(LEFT + 26, 76, "down-projection", "soft"),
        box(LEFT, 94, latent * unit, 24, "blue"),
        box(LEFT + latent * unit + 1, 94, key * unit, 24, "warm"),
        text(LEFT + 38, 104, f"latent {latent} + rotated key {key}", "strong"),
        text(LEFT + 38, 121, "all that the KV cache holds", "soft"),
        arrow(LEFT + 12, 124, LEFT + 12, 158),
        text(LEFT + 26, 146, "up-projection, or absorbed in q and o", "soft"),
        text(LEFT, 182, f"keys and values of {cfg.num_attention_heads} heads: {heads:,} values"),
        *rows,
        text(LEFT, 290, f"never cached: {heads / (latent + key):.0f} times as many", "strong"),
        text(LEFT, 308, "DeepSeek-V3, one layer; lengths to one scale", "soft small"),
    )


def routing() -> str:
    """16 experts in 4 groups: how the router selects the experts of one token."""
    E, G, K = 16, 4, 4
    changes = {"n_routed_experts": E, "num_experts_per_tok": K, "n_group": G, "topk_group": 2}
    cfg = dataclasses.replace(preset("deepseek-v3"), **changes)
    score_E = np.array([.62, .30, .55, .20, .12, .90, .15, .22, .62, .71, .35, .58, .40, .25, .44, .18])  # fmt: skip
    bias_E = np.array([.05, .10, .12, .0, .05, -.30, .0, .10, -.08, -.05, .10, .0, .0, .05, .05, .0])  # fmt: skip
    logits_1E = jnp.log(score_E / (1 - score_E))[None]
    routes = gate(cfg.moe, logits_1E, jnp.float32(bias_E))
    weight = dict(
        zip(np.asarray(routes.experts_NK)[0].tolist(), np.asarray(routes.weights_NK)[0].tolist(), strict=True)
    )
    best_two_G = np.sort((score_E + bias_E).reshape(G, -1))[:, -2:].sum(axis=1)
    kept = set(np.argsort(best_two_G)[-2:].tolist())
    assert {expert // G for expert in weight} == kept
    elements, base, scale = [], 198, 130
    for g in range(G):
        x = LEFT + 88 * g
        fade = "" if g in kept else 'opacity="0.45"'
        elements += [frame(x - 4, 48, 84, 158, "" if g in kept else 'stroke-dasharray="3 3"')]
        elements += [text(x + 38, 42, f"{best_two_G[g]:.2f}", "mid strong" if g in kept else "mid soft")]
        for i in range(4):
            expert, left = 4 * g + i, x + 2 + 19 * i
            top, biased = base - scale * score_E[expert], base - scale * (score_E + bias_E)[expert]
            elements += [box(left, top, 14, base - top, "blue" if expert in weight else "pale", fade)]
            elements += [box(left - 1, biased - 1, 16, 2.5, "warm", fade)]
            if expert in weight:
                elements += [text(left + 7, 225, f"{weight[expert]:.2f}", "mid strong small")]
    return picture(
        316,
        "Of four groups of experts, the two with the best pairs are kept; the four best experts in them are selected",
        text(LEFT, 24, "sum of a group's two best s + b: two groups are kept", "small soft"),
        *elements,
        text(LEFT, 243, "weights: s of the selected, over their sum, times 2.5", "small soft"),
        box(LEFT, 258, 12, 12, "blue"),
        text(LEFT + 20, 269, "score s: weight"),
        box(LEFT + 150, 263, 14, 2.5, "warm"),
        text(LEFT + 172, 269, "s + b: selection"),
        text(LEFT, 290, "An overloaded expert has b < 0, and is not selected;", "small soft"),
        text(LEFT, 306, "groups that are not kept are masked with −∞.", "small soft"),
    )


def dispatch() -> str:
    """Dispatch of one token over 4 devices, and of all tokens in chunks."""
    P, E, K, n = 4, 16, 4, 16
    cfg = dataclasses.replace(preset("moonlight-16b-a3b"), n_routed_experts=E, num_experts_per_tok=K)
    plan = dispatch_plan(cfg.moe, n, P, KernelConfig(dispatch="all_to_all"))
    random = np.random.default_rng(3)
    popular_E = np.where(np.arange(E) // 4 == 2, 2.5, 1.0)
    experts_PnK = np.stack(
        [[random.choice(E, K, replace=False, p=popular_E / popular_E.sum()) for _ in range(n)] for _ in range(P)]
    )
    rows_PQ = (experts_PnK[..., None] // (E // P) == np.arange(P)).any(axis=2).sum(axis=1)
    needed = -(-rows_PQ.max() // plan.chunk_capacity)
    selected = (1, 4, 6, 13)
    elements = []
    for p in range(P):
        x = LEFT + 88 * p
        elements += [frame(x - 4, 86, 84, 40), text(x + 38, 144, f"device {p}", "mid small soft")]
        for e in range(4):
            used = p * 4 + e in selected
            elements += [box(x + 1 + 19 * e, 96, 16, 20, "blue" if used else "pale", 'rx="2"')]
        if p in {expert // 4 for expert in selected}:
            elements += [arrow(158, 48, x + 34, 82, "warm"), arrow(x + 44, 82, 170, 48, "blue")]
    colors = ("blue", "warm", "good", "bad")
    for p in range(P):
        elements += [text(LEFT + 44, 226 + 38 * p, f"from {p}", "end small soft")]
        for q in range(P):
            x, y = LEFT + 54 + 73 * q, 206 + 38 * p
            if p == 0:
                elements += [text(x + 33, 200, f"to {q}", "mid small soft")]
            elements += [frame(x, y, 68, 33)]
            for row in range(rows_PQ[p, q]):
                color = colors[row // plan.chunk_capacity]
                elements += [box(x + 3 + 8 * (row % 8), y + 5 + 13 * (row // 8), 6, 10, color)]
    legend = []
    for chunk in range(needed):
        legend += [box(LEFT + 84 * chunk, 372, 6, 10, colors[chunk])]
        legend += [text(LEFT + 11 + 84 * chunk, 381, f"chunk {chunk + 1}", "small")]
    return picture(
        414,
        "A token is sent once to each device that has one of its experts; all tokens are sent in chunks of one size",
        text(LEFT, 20, "one token, 4 experts, 2 of them on device 1:", "small soft"),
        box(156, 30, 16, 16, "warm", 'rx="2"'),
        text(LEFT + 108, 43, "device 0", "small soft end"),
        text(182, 43, "3 rows sent, 3 sums back", "small strong"),
        *elements,
        text(LEFT, 178, f"{n} tokens a device; capacity of a chunk: {plan.chunk_capacity} rows a pair", "small soft"),
        *legend,
        text(LEFT, 402, f"Balanced routing needs {plan.num_chunks} chunks, this one {needed}.", "small soft"),
    )


def groups() -> str:
    """Rewards and advantages of a group. A group of equal rewards has advantages of 0."""
    completions = [
        ("<think>7*2=4-2=2*1=2-7=5</th…", 2.0),
        ("<think>7*2=4-2=2*1=2-7=5</th…", 2.0),
        ("<think>7*2=4</think><answer>3…", 1.0),
        ("<think>7*2=4</think><answer>8…", 1.0),
        ("We get 7*2=4-2=2*1=2-7=5, s…", 0.0),
        ("3", 0.0),
    ]
    rewards = np.array([[reward for _, reward in completions]])
    advantage = advantages(rewards, "grpo")[0]
    assert not advantages(np.full((1, 6), 2.0), "grpo").any()
    elements = []
    for i, ((completion, reward), value) in enumerate(zip(completions, advantage, strict=True)):
        y = 76 + 26 * i
        bar = 20 * abs(value)
        elements += [text(LEFT, y, completion, "mono"), text(LEFT + 236, y, f"{reward:g}", "end strong")]
        elements += [box(296 if value > 0 else 296 - bar, y - 11, bar, 14, "good" if value > 0 else "bad")]
        elements += [text(LEFT + SPAN, y, f"{value:+.1f}".replace("-", "−") if value else "0", "end small")]
    return picture(
        300,
        "Six completions of one prompt, their rewards, and their advantages relative to the mean of the group",
        text(LEFT, 26, "7*2-2*1-7 = ?", "mono"),
        text(LEFT, 52, "sampled completions", "small soft"),
        text(LEFT + 236, 52, "reward", "end small soft"),
        text(LEFT + SPAN, 52, "advantage", "end small soft"),
        *elements,
        '<line x1="296" y1="60" x2="296" y2="214" stroke="var(--line)"/>',
        text(LEFT, 240, "reward: 1 for the format, 1 for the correct answer", "small soft"),
        text(LEFT, 258, "advantage: (reward − mean) / std, within the group", "small soft"),
        text(LEFT, 282, "All correct or all incorrect: the advantages are 0.", "small soft"),
    )


PICTURES = {"latent-cache": latent_cache, "routing": routing, "dispatch": dispatch, "groups": groups}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw(), "utf-8")
