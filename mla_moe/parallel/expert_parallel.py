"""Experts spread over devices: send a token once to each device that has one of its experts, and get one row back.

Every device of the group (the mesh axis `expert`) holds its own tokens and its own E / P experts. Where a token's
experts sit is known to all after gathering the choices, which are small. The rows then go in rounds of bounded size,
for as many rounds as the busiest pair of devices needs: an even routing takes as many as `schedule` foresees, an uneven
one takes more. So nothing is dropped, the buffers are bounded whatever the routing, and the bytes moved are those of
the rows.

A round sends, runs the experts, and returns; nothing of it outlives it. The derivative goes through the rounds again,
sending the gradients beside the tokens. All of this runs inside `jax.shard_map`.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mla_moe.config import ModelConfig
from mla_moe.ops import grouped_matmul
from mla_moe.ops.experts import experts
from mla_moe.ops.permutation import running_sum

Dispatch = Literal["all_to_all", "ragged"]
"""`ragged` moves the rows alone, `all_to_all` whole buffers; XLA:CPU has no ragged exchange (jax issue 34755)."""


def default_dispatch(platform: str | None = None) -> Dispatch:
    """`ragged` where there is one."""
    return "ragged" if (platform or jax.default_backend()) in ("tpu", "gpu", "cuda") else "all_to_all"


TOKENS_PER_CHUNK = 21_000
"""About as many choices of a device's tokens go in one round of a ragged exchange: V3's experts then get whole tiles
of rows, and the buffers take a few GB."""


class DispatchPlan(NamedTuple):
    """What is fixed before the routing is known."""

    num_experts: int
    devices: int
    local: int
    """Most choices that a token can have on one device."""
    capacity: int
    """Rows that a device sends to another in a round."""
    unit: int
    """Choices that a row counts as, if it has fewer: a round is full at `unit · capacity` of them."""
    rounds: int
    """How many an even routing takes."""
    limit: int | None
    """Rows that a device sends to another at all, if tokens may be dropped."""
    exchange: Dispatch
    multiply: grouped_matmul.Implementation | None

    @property
    def most(self) -> int:
        """Choices that a round can bring to a device."""
        return self.devices * (self.unit * self.capacity + self.local - self.unit)


def dispatch_plan(
    cfg: ModelConfig,
    tokens: int,
    devices: int,
    *,
    buffer: float | None,
    exchange: Dispatch | None,
    multiply: grouped_matmul.Implementation | None,
) -> DispatchPlan:
    """Rounds for `tokens` tokens a device whose expert rows, in the worst case, are about those of an even routing.

    Where rows alone are moved, a round is full when it has enough work for the experts; where whole buffers are, when
    they are full, whose rows may bring `local` times the work. `buffer` is how many times its even share a device may
    send to another before tokens are dropped; None drops none.
    """
    exchange = exchange or default_dispatch()
    share = tokens * expected_device_fraction(cfg, devices)  # rows for one device, if the routing is even
    local = min(cfg.num_experts_per_tok, cfg.n_routed_experts // devices)
    if exchange == "ragged":
        unit, slack, even = 1, 1.25, tokens * cfg.num_experts_per_tok / devices
        rounds = max(round(tokens * cfg.num_experts_per_tok / TOKENS_PER_CHUNK), 1)
    else:
        # Three standard deviations of a random routing, so that it seldom takes another round.
        unit, slack, even = local, min(1 + 3 / math.sqrt(max(share, 1)), 1.25), share
        rounds = max(math.ceil(devices * expected_device_fraction(cfg, devices) * local / cfg.num_experts_per_tok), 1)
    capacity = min(math.ceil(slack * even / rounds), tokens)
    limit = None if buffer is None else math.ceil(buffer * share)
    return DispatchPlan(cfg.n_routed_experts, devices, local, capacity, unit, rounds, limit, exchange, multiply)


def expected_device_fraction(cfg: ModelConfig, devices: int) -> float:
    """The share of tokens that need a given device, if all experts are equally likely within the chosen groups.

    Times `devices` it is how many devices a token is sent to: 5.3 of 8 for V3 without groups, 3.6 with 4 of its 8.
    """
    E, K, G = cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.n_group
    chosen, here = cfg.topk_group, E // devices
    reachable, size = E // G * chosen, E // G

    def some(experts_here: int) -> float:
        """The chance that one of `experts_here` is among K of the reachable."""
        return 1 - math.comb(reachable - experts_here, K) / math.comb(reachable, K)

    if here <= size:  # a part of one group
        return chosen / G * some(here)
    groups = here // size
    ways = (math.comb(groups, j) * math.comb(G - groups, chosen - j) * some(j * size) for j in range(chosen + 1))
    return sum(ways) / math.comb(G, chosen)


class DispatchRoutes(NamedTuple):
    """Who sends what to whom. P counts devices, n the tokens of each."""

    token_Pn: Int[Array, "P n"]
    """Our tokens in the order in which they go to each device."""
    round_Pn: Int[Array, "P n"]
    """The round in which they go: beyond all rounds for those that do not."""
    from_Pn: Int[Array, "P n"]
    """Tokens of each device in the order in which they come to us."""
    from_round_Pn: Int[Array, "P n"]
    expert_PnK: Int[Array, "P n K"]
    """Choices of each device's tokens as numbers of our experts; `E / P` where the expert is elsewhere."""
    rounds: Int[Array, ""]
    dropped: Int[Array, ""]
    """Choices of our tokens beyond the limit."""


NEVER = 1 << 30


def dispatch_routes(experts_nK: Int[Array, "n K"], s: DispatchPlan, axis: str) -> DispatchRoutes:
    here = s.num_experts // s.devices
    me = jax.lax.axis_index(axis)
    all_PnK = jax.lax.all_gather(experts_nK, axis)
    device_PnK = all_PnK // here
    work_PQ = _work((device_PnK[..., None] == jnp.arange(s.devices)).sum(axis=2, dtype=jnp.int32), s).sum(axis=1)
    ours_nQ = (device_PnK[me][..., None] == jnp.arange(s.devices)).sum(axis=1, dtype=jnp.int32)
    theirs_nP = (device_PnK == me).sum(axis=2, dtype=jnp.int32).T
    dropped = jnp.int32(0)
    if s.limit is not None:
        late_nQ = running_sum(ours_nQ > 0) >= s.limit
        dropped = jnp.take_along_axis(late_nQ, device_PnK[me], axis=1).sum(dtype=jnp.int32)
        ours_nQ = jnp.where(late_nQ, 0, ours_nQ)
        theirs_nP = jnp.where(running_sum(theirs_nP > 0) >= s.limit, 0, theirs_nP)
        work_PQ = jnp.minimum(work_PQ, s.limit * s.local)
    token_Pn, round_Pn = _in_order(ours_nQ, s)
    from_Pn, from_round_Pn = _in_order(theirs_nP, s)
    rounds = -(-work_PQ.max() // (s.unit * s.capacity))
    expert_PnK = jnp.where(device_PnK == me, all_PnK - me * here, here)
    return DispatchRoutes(token_Pn, round_Pn, from_Pn, from_round_Pn, expert_PnK, rounds, dropped)


def _work(choices, s: DispatchPlan):
    """What a row counts as in a round, from how many of its choices go with it."""
    return jnp.where(choices > 0, jnp.maximum(choices, s.unit), 0)


def _in_order(choices_nP: Int[Array, "n P"], s: DispatchPlan) -> tuple[Int[Array, "P n"], Int[Array, "P n"]]:
    """The numbers of the tokens that go, in order, and their rounds. (A sort takes TPUs' compiler 40 seconds.)"""
    n, P = choices_nP.shape
    goes_nP = choices_nP > 0
    round_nP = running_sum(_work(choices_nP, s)) // (s.unit * s.capacity)
    place_nP = jnp.where(goes_nP, running_sum(goes_nP), n)
    number_nP = jnp.broadcast_to(jnp.arange(n)[:, None], (n, P))

    def put(x_nP, rest):
        return jnp.full((P, n), rest, jnp.int32).at[jnp.arange(P), place_nP].set(x_nP, mode="drop")

    return put(number_nP, 0), put(round_nP, NEVER)


def expert_parallel_experts(
    x_nD: Float[Array, "n D"],
    experts_nK: Int[Array, "n K"],
    weights_nK: Float[Array, "n K"],
    gate_up_eD2F: Float[Array, "e D 2 F"],
    down_eFD: Float[Array, "e F D"],
    s: DispatchPlan,
    axis: str,
) -> tuple[Float[Array, "n D"], Int[Array, ""]]:
    """`ops.experts.experts` of this device's tokens over the experts of all devices of `axis`, and the choices that
    were dropped for want of buffer. Experts are numbered over all devices; `e` are this one's."""
    r = dispatch_routes(experts_nK, s, axis)
    return _dispatch_compute_combine(x_nD, weights_nK, gate_up_eD2F, down_eFD, r, s, axis), r.dropped


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _dispatch_compute_combine(x_nD, weights_nK, gate_up_eD2F, down_eFD, r: DispatchRoutes, s: DispatchPlan, axis: str):
    weights_PnK = jax.lax.all_gather(weights_nK, axis)

    def turn(step, rows, y_nD):
        y_MD = step.run(*rows, step.arrived(weights_PnK), gate_up_eD2F, down_eFD)
        return step.add_back(y_nD, y_MD)

    y_nD = _over_chunks(turn, (x_nD,), jnp.zeros(x_nD.shape, jnp.float32), r, s, axis)
    return y_nD.astype(x_nD.dtype)


def _over_chunks(turn, sent, total, r: DispatchRoutes, s: DispatchPlan, axis: str):
    """`total = turn(round, rows, total)` for each round, where `rows` are what came of each array of `sent`.

    A ragged exchange of what is not there costs nothing: there the rows of the next round are under way while the
    experts run on this one's, and the first ones while whatever else is to be computed (the shared expert).
    """

    def rows(step):
        return tuple(map(step.send, sent))

    if s.exchange != "ragged":

        def plain(number, total):
            step = _Chunk(number, r, s, axis)
            return turn(step, rows(step), total)

        return jax.lax.fori_loop(0, r.rounds, plain, total)

    def overlapped(number, carry):
        came, total = carry
        following = rows(_Chunk(number + 1, r, s, axis))
        return following, turn(_Chunk(number, r, s, axis), came, total)

    return jax.lax.fori_loop(0, r.rounds, overlapped, (rows(_Chunk(0, r, s, axis)), total))[1]


def _forward(x_nD, weights_nK, gate_up_eD2F, down_eFD, r, s, axis):
    args = x_nD, weights_nK, gate_up_eD2F, down_eFD, r
    return _dispatch_compute_combine(*args, s, axis), args


def _backward(s: DispatchPlan, axis: str, residuals, g_nD):
    x_nD, weights_nK, gate_up_eD2F, down_eFD, r = residuals
    weights_PnK = jax.lax.all_gather(weights_nK, axis)

    def turn(step, rows, totals):
        g_x_nD, g_weights_PnK, *g_experts = totals
        x_MD, g_MD = rows
        _, derivative = jax.vjp(step.run, x_MD, step.arrived(weights_PnK), gate_up_eD2F, down_eFD)
        g_x_MD, g_weights_MK, *g_more = derivative(g_MD)
        g_experts = [total + g for total, g in zip(g_experts, g_more, strict=True)]
        return step.add_back(g_x_nD, g_x_MD), step.put_arrived(g_weights_PnK, g_weights_MK), *g_experts

    # The experts' gradient is as large as the experts: it stays in their type, as the sum over devices that follows.
    wide, own = (x_nD, weights_PnK), (gate_up_eD2F, down_eFD)
    zeros = *(jnp.zeros(x.shape, jnp.float32) for x in wide), *map(jnp.zeros_like, own)
    g_x_nD, g_weights_PnK, *g_experts = _over_chunks(turn, (x_nD, g_nD), zeros, r, s, axis)
    g_weights_nK = jax.lax.psum_scatter(g_weights_PnK, axis)
    grads = g_x_nD, g_weights_nK, *g_experts
    like = x_nD, weights_nK, gate_up_eD2F, down_eFD
    return *(g.astype(x.dtype) for g, x in zip(grads, like, strict=True)), None


_dispatch_compute_combine.defvjp(_forward, _backward)


class _Chunk:
    """One round: `capacity` rows from and to every device, M = P · capacity rows in all."""

    def __init__(self, number: Int[Array, ""] | int, r: DispatchRoutes, s: DispatchPlan, axis: str):
        self.r, self.s, self.axis = r, s, axis
        self.sent_Pc, self.token_Pc = self._part(r.round_Pn, r.token_Pn, number)
        self.here_Pc, self.from_Pc = self._part(r.from_round_Pn, r.from_Pn, number)

    def _part(self, round_Pn, token_Pn, number):
        """The tokens of this round, and which of the `capacity` places have one."""
        start_P, end_P = ((round_Pn < bound).sum(axis=1, dtype=jnp.int32) for bound in (number, number + 1))
        place_Pc = start_P[:, None] + jnp.arange(self.s.capacity)
        clipped_Pc = jnp.minimum(place_Pc, token_Pn.shape[1] - 1)
        return place_Pc < end_P[:, None], jnp.take_along_axis(token_Pn, clipped_Pc, axis=1)

    def send(self, x_nD: Float[Array, "n D"]) -> Float[Array, "M D"]:
        """Rows of all devices for our experts; zeros where a device has none left."""
        x_PcD = jnp.where(self.sent_Pc[..., None], x_nD[self.token_Pc], 0)
        return self._exchange(x_PcD, self.sent_Pc, self.here_Pc).reshape(-1, x_nD.shape[1])

    def add_back(self, y_nD: Float[Array, "n D"], y_MD: Float[Array, "M D"]) -> Float[Array, "n D"]:
        """Return what our experts made of the rows, and add what comes back to our tokens."""
        y_PcD = y_MD.reshape(*self.here_Pc.shape, -1)
        back_PcD = self._exchange(y_PcD, self.here_Pc, self.sent_Pc)
        token_Pc = jnp.where(self.sent_Pc, self.token_Pc, len(y_nD))

        def add(p, y_nD):  # one device's at a time: all of them in float32 would be large
            return y_nD.at[token_Pc[p]].add(back_PcD[p].astype(y_nD.dtype), mode="drop")

        return jax.lax.fori_loop(0, len(back_PcD), add, y_nD)

    def arrived(self, x_PnK: Array) -> Array:
        """What is known of the rows that came, out of what is known of every token."""
        return x_PnK[jnp.arange(self.s.devices)[:, None], self.from_Pc].reshape(-1, x_PnK.shape[2])

    def put_arrived(self, total_PnK: Array, x_MK: Array) -> Array:
        """The way back of `arrived`."""
        P, n, K = total_PnK.shape
        place_Pc = jnp.where(self.here_Pc, self.from_Pc, n)
        return total_PnK.at[jnp.arange(P)[:, None], place_Pc].add(x_MK.reshape(P, -1, K), mode="drop")

    def run(self, x_MD, weights_MK, gate_up_eD2F, down_eFD) -> Float[Array, "M D"]:
        """Our experts on the rows that came."""
        experts_MK = jnp.where(self.here_Pc.reshape(-1, 1), self.arrived(self.r.expert_PnK), len(down_eFD))
        how: Any = {"most": self.s.most, "implementation": self.s.multiply}
        return experts(x_MD, experts_MK, weights_MK, gate_up_eD2F, down_eFD, **how)

    def _exchange(self, x_PcD, sent_Pc: Bool[Array, "P c"], came_Pc: Bool[Array, "P c"]):
        """The part for each device there, and the part of each device here."""
        if self.s.exchange == "all_to_all":
            return jax.lax.all_to_all(x_PcD, self.axis, split_axis=0, concat_axis=0)
        P, c, D = x_PcD.shape
        me = jax.lax.axis_index(self.axis)
        start_P = jnp.arange(P, dtype=jnp.int32) * c
        rows = jax.lax.ragged_all_to_all(
            x_PcD.reshape(P * c, D),
            jnp.zeros((P * c, D), x_PcD.dtype),
            input_offsets=start_P,
            send_sizes=sent_Pc.sum(axis=1, dtype=jnp.int32),
            output_offsets=jnp.full(P, me * c, jnp.int32),
            recv_sizes=came_Pc.sum(axis=1, dtype=jnp.int32),
            axis_name=self.axis,
        )
        return rows.reshape(P, c, D)
