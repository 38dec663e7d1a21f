"""Fair queue: waiting requests, taken from the client that has the fewest running ones.

A request of OpenAI's API with `n` choices is `n` requests here, its *group*. Among the groups of a client, too, the one
with the fewest running requests is next. Within a group, and without client names, it is first come, first served.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from mla_moe.inference.request import Completion


class RunningCounts:
    """How many requests each client, and each of its groups, has running."""

    def __init__(self, running: Iterable[Completion | None]):
        owners = [completion.owner for completion in running if completion is not None]
        self._clients, self._groups = Counter(owner.client for owner in owners), Counter(owners)

    def of(self, completion: Completion) -> tuple[int, int]:
        """Running requests of the completion's client, and of its group."""
        return self._clients[completion.owner.client], self._groups[completion.owner]

    def exceeds(self, one: Completion, other: Completion) -> bool:
        """Whether `one` should give its slot to `other`: afterwards its client, or else its group, has no fewer."""
        same_client = one.owner.client == other.owner.client
        return self.of(one)[same_client] >= self.of(other)[same_client] + 2


class FairQueue:
    """Waiting requests by client and group. Clients and groups with equally many running requests take turns."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[str, deque[Completion]]] = {}

    def __iter__(self) -> Iterator[Completion]:
        return (completion for groups in self._queues.values() for queue in groups.values() for completion in queue)

    def __len__(self) -> int:
        return sum(len(queue) for groups in self._queues.values() for queue in groups.values())

    def append(self, completion: Completion) -> None:
        self._queue(completion).append(completion)

    def appendleft(self, completion: Completion) -> None:
        """Add a request in front of its group."""
        self._queue(completion).appendleft(completion)

    def heads(self, counts: RunningCounts) -> list[Completion]:
        """The next request of every group, in the order in which they should run."""
        heads = (queue[0] for groups in self._queues.values() for queue in groups.values())
        return sorted(heads, key=counts.of)  # of equals the first is the one whose turn was longest ago

    def remove(self, completion: Completion) -> None:
        """Remove a request; its group and its client go behind the others. Raises `ValueError` if it does not wait."""
        client, group = completion.owner
        groups = self._queues.pop(client, {})
        queue = groups.pop(group, deque())
        try:
            queue.remove(completion)
        finally:
            if queue:
                groups[group] = queue
            if groups:
                self._queues[client] = groups

    def _queue(self, completion: Completion) -> deque[Completion]:
        client, group = completion.owner
        return self._queues.setdefault(client, {}).setdefault(group, deque())
