"""Expert parallelism: token dispatch and combine by all-to-all over the mesh axis `expert`, in chunks.

Each of the P devices of the axis has its own n tokens and its own E / P experts. A token is sent once to every device
that has at least one of its K experts, and that device returns one summed output. The router's choices are small and
are all-gathered first, so every device knows what it will send and receive.

A chunk has a fixed capacity. An even routing takes as many chunks as `dispatch_plan` computes; an uneven routing takes
more, until the most loaded pair of devices is done. So dispatch is dropless with buffers of bounded size. Only with a
capacity factor are tokens dropped at capacity, and then they are counted.

A chunk dispatches tokens, runs the experts and combines the outputs, and saves nothing for the backward pass, which
dispatches the tokens again, together with the gradients of their outputs. All of it runs inside `jax.shard_map`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mla_moe.ops.dropout import FeatureDropout
from mla_moe.ops.experts import ExpertAdapters, expert_products
from mla_moe.ops.lora import LoRAFactors
from mla_moe.ops.permutation import exclusive_cumsum
from mla_moe.ops.quantized_matrix import Matrix, QuantizedMatrix
from mla_moe.parallel.dispatch_plan import DispatchPlan


class DispatchRoutes(NamedTuple):
    """What this device sends and receives. P counts the devices, n the tokens of each."""

    send_token_Pn: Int[Array, "P n"]
    """This device's tokens in the order in which they are sent to each device."""
    send_chunk_Pn: Int[Array, "P n"]
    """The chunk of each; `NO_CHUNK` behind the last one that is sent."""
    recv_token_Pn: Int[Array, "P n"]
    """The tokens of each device in the order in which they are received."""
    recv_chunk_Pn: Int[Array, "P n"]
    local_expert_PnK: Int[Array, "P n K"]
    """Experts of all tokens, numbered on this device; `E / P` (unassigned) for an expert of another device."""
    num_chunks: Int[Array, ""]
    dropped: Int[Array, ""]
    """Pairs of this device's tokens that are dropped at capacity."""


NO_CHUNK = 1 << 30


def dispatch_routes(experts_nK: Int[Array, "n K"], plan: DispatchPlan) -> DispatchRoutes:
    """All-gather the experts that the router selected, and order the tokens by destination."""
    local_experts = plan.num_experts // plan.devices
    this = jax.lax.axis_index(plan.axis)
    experts_PnK = jax.lax.all_gather(experts_nK, plan.axis)
    device_PnK = experts_PnK // local_experts
    # Loads from every device P to every device Q, pairs of this device's tokens by destination, and those received.
    pairs_PnQ = (device_PnK[..., None] == jnp.arange(plan.devices)).sum(axis=2, dtype=jnp.int32)
    load_PQ = _load(pairs_PnQ, plan).sum(axis=1)
    send_nP = (device_PnK[this][..., None] == jnp.arange(plan.devices)).sum(axis=1, dtype=jnp.int32)
    recv_nP = (device_PnK == this).sum(axis=2, dtype=jnp.int32).T
    dropped = jnp.int32(0)
    if plan.device_capacity is not None:
        over_nP = exclusive_cumsum(send_nP > 0) >= plan.device_capacity
        over_nK = jnp.take_along_axis(over_nP, device_PnK[this], axis=1, mode="clip")
        dropped = (over_nK & (device_PnK[this] < plan.devices)).sum(dtype=jnp.int32)
        send_nP = jnp.where(over_nP, 0, send_nP)
        recv_nP = jnp.where(exclusive_cumsum(recv_nP > 0) >= plan.device_capacity, 0, recv_nP)
        load_PQ = jnp.minimum(load_PQ, plan.device_capacity * plan.max_local_experts)
    num_chunks = -(-load_PQ.max() // (plan.min_pairs * plan.chunk_capacity))
    local_expert_PnK = jnp.where(device_PnK == this, experts_PnK - this * local_experts, local_experts)
    return DispatchRoutes(*_ordered(send_nP, plan), *_ordered(recv_nP, plan), local_expert_PnK, num_chunks, dropped)


def _load(pairs: Int[Array, "*axes"], plan: DispatchPlan) -> Int[Array, "*axes"]:
    """The pairs that a token counts as in a chunk, 0 if it has none."""
    return jnp.where(pairs > 0, jnp.maximum(pairs, plan.min_pairs), 0)


def _ordered(pairs_nP: Int[Array, "n P"], plan: DispatchPlan) -> tuple[Int[Array, "P n"], Int[Array, "P n"]]:
    """The tokens that have pairs, in order, and the chunk of each. (XLA:TPU takes 40 seconds to compile a sort.)"""
    n, P = pairs_nP.shape
    sent_nP = pairs_nP > 0
    chunk_nP = exclusive_cumsum(_load(pairs_nP, plan)) // (plan.min_pairs * plan.chunk_capacity)
    position_nP = jnp.where(sent_nP, exclusive_cumsum(sent_nP), n)
    token_nP = jnp.broadcast_to(jnp.arange(n)[:, None], (n, P))

    def scatter(x_nP: Int[Array, "n P"], fill: int) -> Int[Array, "P n"]:
        return jnp.full((P, n), fill, jnp.int32).at[jnp.arange(P), position_nP].set(x_nP, mode="drop")

    return scatter(token_nP, 0), scatter(chunk_nP, NO_CHUNK)


def expert_parallel_experts(
    x_nD: Float[Array, "n D"],
    experts_nK: Int[Array, "n K"],
    weights_nK: Float[Array, "n K"],
    gate_up_eD2F: Float[Array, "e D 2 F"] | QuantizedMatrix,
    down_eFD: Float[Array, "e F D"] | QuantizedMatrix,
    plan: DispatchPlan,
    adapters: ExpertAdapters = ExpertAdapters(),
) -> tuple[Float[Array, "n D"], Int[Array, ""]]:
    """`ops.experts.experts` of this device's tokens over the experts of all devices, and the number of pairs that were
    dropped at capacity. `experts_nK` number all experts, and E is unassigned; the weights and adapters are those of
    this device."""
    matrices = _joined(gate_up_eD2F), down_eFD  # here, and not for each chunk
    if plan.weights_before_routes:
        # Large all-gathers on a SparseCore end in the order in which they start. Without this barrier XLA starts those
        # of the weights behind that of the router's choices, so that none runs beside attention.
        matrices, experts_nK = jax.lax.optimization_barrier((matrices, experts_nK))
    routes = dispatch_routes(experts_nK, plan)
    dropout = (None if lora is None else lora.dropout for lora in adapters)
    gather = partial(jax.lax.all_gather, axis_name=plan.axis)
    dropout = tuple(d and dataclasses.replace(d, rows=gather(d.rows)) for d in dropout)
    adapters = ExpertAdapters(*(lora and lora._replace(dropout=None) for lora in adapters))
    fixed = [a is not None or isinstance(w, QuantizedMatrix) for w, a in zip(matrices, adapters, strict=True)]
    trained = *(None if f else w for w, f in zip(matrices, fixed, strict=True)), adapters
    frozen = tuple(w if f else None for w, f in zip(matrices, fixed, strict=True))
    y_nD = _dispatch_compute_combine((x_nD, weights_nK, trained), (*frozen, dropout), routes, plan)
    return y_nD, routes.dropped


def _joined(gate_up: Matrix) -> Matrix:
    """Gate and up projection as one axis, unless they are quantized."""
    return gate_up if isinstance(gate_up, QuantizedMatrix) else gate_up.reshape(*gate_up.shape[:2], -1)


Trained = tuple[Array | None, Array | None, ExpertAdapters]
"""`gate_up_eDF` and `down_eFD`, each unless it has an adapter or is quantized, and the adapters."""
Frozen = tuple[Matrix | None, Matrix | None, tuple[FeatureDropout | None, ...]]
"""`gate_up_eDF` and `down_eFD`, each if it has an adapter or is quantized, and dropout of the adapters' inputs, with
numbers of the tokens of all devices, `[P, n]`."""
Inputs = tuple[Array, Array, Trained]
"""The differentiable arguments: `x_nD`, `weights_nK`, and the weights of the experts."""
Residuals = tuple[Inputs, Frozen, DispatchRoutes]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch_compute_combine(inputs: Inputs, frozen: Frozen, routes: DispatchRoutes, plan: DispatchPlan) -> Array:
    x_nD, weights_nK, trained = inputs
    *_, adapters = trained
    frozen = _dequantized(frozen, x_nD.dtype)
    weights_PnK = jax.lax.all_gather(weights_nK, plan.axis)

    def body(chunk: "_Chunk", received: tuple[Array, ...], sums: tuple[Array, ...]) -> tuple[Array, "Finish"]:
        (x_MD,) = received
        gate_up, down = chunk.expert_products(x_MD.dtype, trained, frozen)

        def finish(gate_up_R2F: Array) -> tuple[Array, tuple[Array, ...]]:
            return down(gate_up_R2F, chunk.gather_received(weights_PnK), trained[1], adapters.down), sums

        return gate_up(x_MD, trained[0], adapters.gate_up), finish

    y_nD, _ = _over_chunks(body, (x_nD,), (), routes, plan)
    return y_nD.astype(x_nD.dtype)


def _dequantized(frozen: Frozen, dtype: DTypeLike) -> Frozen:
    """For all chunks, in the forward and again in the backward pass."""
    *matrices, dropout = frozen
    gate_up, down = (w.dequantize(dtype) if isinstance(w, QuantizedMatrix) else w for w in matrices)
    return None if gate_up is None else _joined(gate_up), down, dropout


Finish = Callable[[Array], tuple[Array, Any]]
Body = Callable[["_Chunk", tuple[Array, ...], Any], tuple[Array, Finish]]
"""The work on a chunk: the first products, and a function that does the rest from them (`_over_chunks`)."""


def _over_chunks(
    body: Body, inputs: tuple[Array, ...], sums: Any, routes: DispatchRoutes, plan: DispatchPlan
) -> tuple[Float[Array, "n D"], Any]:
    """For each chunk `products, finish = body(chunk, received, sums)` and `outputs, sums = finish(products)`, where
    `received` are the dispatched `inputs`. Returns the combined outputs in float32, and the last sums.

    A pipeline (`plan.pipelined`) returns the outputs of the chunk before beside the first products, and dispatches the
    next chunk beside the rest, so that asynchronous collectives overlap them (`docs/decisions/overlap.md`). So there is
    one more exchange in either direction than chunks, which is empty.
    """
    n, D = inputs[0].shape
    rows = tuple(x_nD.reshape(n, *_row_shape(D)) for x_nD in inputs)
    total_nrd = jnp.zeros(rows[0].shape, jnp.float32)

    def buffer(width: int) -> Array:
        """A buffer for `width` rows of each token."""
        r, d = _row_shape(D)
        return jnp.zeros((plan.devices, plan.chunk_capacity, width * r, d), inputs[0].dtype)

    def sequential(index: Array, state: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        received_Pcrd, returned_Pcrd, total_nrd, sums = state
        chunk = _Chunk(index, routes, plan)
        received_Pcrd = chunk.dispatch(rows, received_Pcrd)
        gate_up_R2F, finish = body(chunk, _parts(received_Pcrd, len(rows)), sums)
        outputs_MD, sums = finish(gate_up_R2F)
        returned_Pcrd = chunk.send_back(outputs_MD, returned_Pcrd)
        return received_Pcrd, returned_Pcrd, chunk.combine(total_nrd, returned_Pcrd), sums

    def pipelined(index: Array, state: tuple[Array, Array, Array, Array, Any]) -> Any:
        received_Pcrd, outputs_MD, returned_Pcrd, total_nrd, sums = state
        before = _Chunk(index - 1, routes, plan)
        returned_Pcrd = before.send_back(outputs_MD, returned_Pcrd)
        # Once the received tokens are in the experts' layout, their buffer is free for the next ones.
        parts = _parts(received_Pcrd, len(rows))
        parts, received_Pcrd = jax.lax.optimization_barrier((parts, received_Pcrd))
        gate_up_R2F, finish = body(_Chunk(index, routes, plan), parts, sums)
        # XLA runs one exchange at a time. Without this barrier it schedules all products beside one of them, and none
        # beside the other.
        gate_up_R2F, returned_Pcrd, index = jax.lax.optimization_barrier((gate_up_R2F, returned_Pcrd, index))
        following_Pcrd = _Chunk(index + 1, routes, plan).dispatch(rows, received_Pcrd)
        outputs_MD, sums = finish(gate_up_R2F)
        return following_Pcrd, outputs_MD, returned_Pcrd, before.combine(total_nrd, returned_Pcrd), sums

    if not plan.pipelined:
        first = buffer(len(rows)), buffer(1), total_nrd, sums
        *_, total_nrd, sums = jax.lax.fori_loop(0, routes.num_chunks, sequential, first)
        return total_nrd.reshape(n, D), sums
    none_MD = jnp.zeros((plan.devices * plan.chunk_capacity, D), inputs[0].dtype)
    first = _Chunk(0, routes, plan).dispatch(rows, buffer(len(rows))), none_MD, buffer(1), total_nrd, sums
    _, outputs_MD, returned_Pcrd, total_nrd, sums = jax.lax.fori_loop(0, routes.num_chunks, pipelined, first)
    last = _Chunk(routes.num_chunks - 1, routes, plan)
    return last.combine(total_nrd, last.send_back(outputs_MD, returned_Pcrd)).reshape(n, D), sums


def _row_shape(width: int) -> tuple[int, int]:
    """The shape `r d` of a token's row while it is sent: XLA:TPU exchanges rows of two or more subrows as they are in
    memory, and copies arrays of two axes into such a layout, and back."""
    return (2, width // 2) if width % 2 == 0 else (1, width)


def _forward(inputs: Inputs, frozen: Frozen, routes: DispatchRoutes, plan: DispatchPlan) -> tuple[Array, Residuals]:
    return _dispatch_compute_combine(inputs, frozen, routes, plan), (inputs, frozen, routes)


def _backward(plan: DispatchPlan, residuals: Residuals, g_nD: Array) -> tuple[Inputs, None, None]:
    inputs, frozen, routes = residuals
    x_nD, weights_nK, trained = inputs
    frozen = _dequantized(frozen, x_nD.dtype)
    weights_PnK = jax.lax.all_gather(weights_nK, plan.axis)

    def body(chunk: _Chunk, received: tuple[Array, ...], sums: tuple[Array, Trained]) -> tuple[Array, Finish]:
        g_weights_PnK, g_experts = sums
        x_MD, g_MD = received
        gate_up, down = chunk.expert_products(x_MD.dtype, trained, frozen)
        gate_up_R2F, gate_up_vjp = jax.vjp(gate_up, x_MD, trained[0], trained[2].gate_up)

        def finish(gate_up_R2F: Array) -> tuple[Array, Any]:
            weights_MK = chunk.gather_received(weights_PnK)
            _, down_vjp = jax.vjp(down, gate_up_R2F, weights_MK, trained[1], trained[2].down)
            g_R2F, g_weights_MK, g_down, g_down_adapter = down_vjp(g_MD)
            g_x_MD, g_gate_up, g_gate_up_adapter = gate_up_vjp(g_R2F)
            g_chunk = g_gate_up, g_down, ExpertAdapters(g_gate_up_adapter, g_down_adapter)
            sums = chunk.scatter_received(g_weights_PnK, g_weights_MK), jax.tree.map(jnp.add, g_experts, g_chunk)
            return g_x_MD, sums

        return gate_up_R2F, finish

    # The experts' gradients are as large as the experts, so they stay in the compute dtype, in which they are
    # reduce-scattered afterwards. The other sums are in float32.
    zeros = jnp.zeros(weights_PnK.shape, jnp.float32), jax.tree.map(jnp.zeros_like, trained)
    g_x_nD, (g_weights_PnK, g_experts) = _over_chunks(body, (x_nD, g_nD), zeros, routes, plan)
    grads = g_x_nD, jax.lax.psum_scatter(g_weights_PnK, plan.axis), g_experts
    return jax.tree.map(lambda g, x: g.astype(x.dtype), grads, inputs), None, None


_dispatch_compute_combine.defvjp(_forward, _backward)


class _Chunk:
    """One chunk: c = `chunk_capacity` token positions to and from every device, M = P · c positions in all."""

    def __init__(self, index: Int[Array, ""] | int, routes: DispatchRoutes, plan: DispatchPlan):
        self.routes, self.plan = routes, plan
        self.sent_Pc, self.send_token_Pc = self._select(routes.send_chunk_Pn, routes.send_token_Pn, index)
        self.received_Pc, self.recv_token_Pc = self._select(routes.recv_chunk_Pn, routes.recv_token_Pn, index)

    def _select(
        self, chunk_Pn: Int[Array, "P n"], token_Pn: Int[Array, "P n"], index: Int[Array, ""] | int
    ) -> tuple[Bool[Array, "P c"], Int[Array, "P c"]]:
        """Which positions of this chunk are filled, and the token at each."""
        start_P, end_P = ((chunk_Pn < bound).sum(axis=1, dtype=jnp.int32) for bound in (index, index + 1))
        position_Pc = start_P[:, None] + jnp.arange(self.plan.chunk_capacity)
        clipped_Pc = jnp.minimum(position_Pc, token_Pn.shape[1] - 1)
        return position_Pc < end_P[:, None], jnp.take_along_axis(token_Pn, clipped_Pc, axis=1)

    def dispatch(
        self, inputs: tuple[Float[Array, "n r d"], ...], into_Pcid: Float[Array, "P c i d"]
    ) -> Float[Array, "P c i d"]:
        """Send tokens to their experts' devices, all inputs in one exchange. Returns the received tokens, and at
        unfilled positions what `into_Pcid` has."""
        x_Pcid = jnp.concatenate([x_nrd[self.send_token_Pc] for x_nrd in inputs], axis=2)
        return self._all_to_all(x_Pcid, into_Pcid, self.sent_Pc, self.received_Pc)

    def send_back(self, y_MD: Float[Array, "M D"], into_Pcrd: Float[Array, "P c r d"]) -> Float[Array, "P c r d"]:
        """Return the experts' outputs to the devices that the tokens came from."""
        return self._all_to_all(y_MD.reshape(into_Pcrd.shape), into_Pcrd, self.received_Pc, self.sent_Pc)

    def combine(self, y_nrd: Float[Array, "n r d"], returned_Pcrd: Float[Array, "P c r d"]) -> Float[Array, "n r d"]:
        """Add the returned outputs of this device's tokens to `y_nrd`."""
        token_Pc = jnp.where(self.sent_Pc, self.send_token_Pc, len(y_nrd))

        def add(p: Array, y_nrd: Array) -> Array:  # one device at a time: all outputs in float32 would be large
            return y_nrd.at[token_Pc[p]].add(returned_Pcrd[p].astype(y_nrd.dtype), mode="drop")

        return jax.lax.fori_loop(0, len(returned_Pcrd), add, y_nrd)

    def gather_received(self, x_PnK: Array) -> Array:
        """The rows of an array over all devices' tokens that belong to the received tokens, `[M, K]`."""
        return x_PnK[jnp.arange(self.plan.devices)[:, None], self.recv_token_Pc].reshape(-1, x_PnK.shape[2])

    def scatter_received(self, total_PnK: Array, x_MK: Array) -> Array:
        """The transpose of `gather_received`: add to the rows of the received tokens."""
        P, n, K = total_PnK.shape
        token_Pc = jnp.where(self.received_Pc, self.recv_token_Pc, n)
        return total_PnK.at[jnp.arange(P)[:, None], token_Pc].add(x_MK.reshape(P, -1, K), mode="drop")

    def expert_products(
        self, dtype: DTypeLike, trained: Trained, frozen: Frozen
    ) -> tuple[Callable[..., Array], Callable[..., Array]]:
        """`ops.experts.expert_products` of this device's experts on the received tokens. Instead of a matrix that is
        None, one of `frozen` is used."""
        frozen_gate_up, frozen_down, (of_gate_up, of_down) = frozen
        own_down = trained[1] if frozen_down is None else frozen_down
        assert own_down is not None
        local_expert_MK = self.gather_received(self.routes.local_expert_PnK)
        experts_MK = jnp.where(self.received_Pc.reshape(-1, 1), local_expert_MK, own_down.shape[0])
        gate_up, down = expert_products(
            experts_MK, own_down.shape, dtype, max_pairs=self.plan.max_pairs, activation=self.plan.activation,
            implementation=self.plan.grouped_matmul,
        )  # fmt: skip

        def with_dropout(lora: LoRAFactors | None, dropout: FeatureDropout | None) -> LoRAFactors | None:
            if lora is None or dropout is None:
                return lora
            rows_M = self.gather_received(dropout.rows[..., None])[:, 0]
            return lora._replace(dropout=dataclasses.replace(dropout, rows=rows_M))

        def of_received(x_MD: Array, w: Matrix | None, lora: LoRAFactors | None) -> Array:
            return gate_up(x_MD, frozen_gate_up if w is None else w, with_dropout(lora, of_gate_up))

        def weighted(h_R2F: Array, weights_MK: Array, w: Matrix | None, lora: LoRAFactors | None) -> Array:
            return down(h_R2F, weights_MK, frozen_down if w is None else w, with_dropout(lora, of_down))

        return of_received, weighted

    def _all_to_all(
        self, x_Pcrd: Array, into_Pcrd: Array, sent_Pc: Bool[Array, "P c"], received_Pc: Bool[Array, "P c"]
    ) -> Float[Array, "P c r d"]:
        """Send the filled positions of `x_Pcrd[p]` to device p; the result's p-th entry is what device p sent to this
        one. Unfilled positions keep those of `into_Pcrd` with `ragged`, and are zeros otherwise."""
        if self.plan.dispatch == "all_to_all":
            x_Pcrd = jnp.where(sent_Pc[..., None, None], x_Pcrd, 0)
            return jax.lax.all_to_all(x_Pcrd, self.plan.axis, split_axis=0, concat_axis=0)
        P, c, *row = x_Pcrd.shape
        received_Mrd = jax.lax.ragged_all_to_all(
            x_Pcrd.reshape(P * c, *row),
            into_Pcrd.reshape(P * c, *row),
            input_offsets=jnp.arange(P, dtype=jnp.int32) * c,
            send_sizes=sent_Pc.sum(axis=1, dtype=jnp.int32),
            output_offsets=jnp.full(P, jax.lax.axis_index(self.plan.axis) * c, jnp.int32),
            recv_sizes=received_Pc.sum(axis=1, dtype=jnp.int32),
            axis_name=self.plan.axis,
        )
        return received_Mrd.reshape(P, c, *row)


def _parts(received_Pcid: Float[Array, "P c i d"], count: int) -> tuple[Float[Array, "M D"], ...]:
    """The inputs of a dispatch that were received."""
    M = received_Pcid.shape[0] * received_Pcid.shape[1]
    return tuple(part_Pcrd.reshape(M, -1) for part_Pcrd in jnp.split(received_Pcid, count, axis=2))
