"""The order in which clients get sequence slots."""

import pytest

from mla_moe.inference.fair_queue import FairQueue, RunningCounts
from mla_moe.inference.prefix_cache import PrefixCache
from mla_moe.inference.request import Completion, Owner, Request
from mla_moe.inference.scheduler import Scheduler


def completion(client="", group=""):
    return Completion(Request([1], 1), owner=Owner(client, group))


def take(queue, running):
    first, *_ = queue.heads(RunningCounts(running))
    queue.remove(first)
    return first


def test_clients_take_turns_and_their_groups_too():
    queue = FairQueue()
    for client, group, count in (("a", "1", 3), ("a", "2", 1), ("b", "1", 2)):
        for _ in range(count):
            queue.append(completion(client, group))
    assert len(queue) == 6
    order = [tuple(take(queue, []).owner) for _ in range(6)]  # each finishes before the next is admitted
    assert order == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "1"), ("a", "1"), ("a", "1")]
    assert not len(queue)


def test_the_client_with_the_fewest_running_is_next():
    queue = FairQueue()
    for client in "aabb":
        queue.append(completion(client))
    running = [completion("a"), None]
    order = []
    for _ in range(4):
        running.append(take(queue, running))
        order.append(running[-1].owner.client)
    assert order == ["b", "a", "b", "a"]


def test_without_clients_it_is_first_come_first_served():
    queue, waiting = FairQueue(), [completion() for _ in range(4)]
    for c in waiting[1:]:
        queue.append(c)
    queue.appendleft(waiting[0])
    assert [take(queue, []) for _ in range(4)] == waiting
    with pytest.raises(ValueError, match="not in deque"):
        queue.remove(waiting[0])


@pytest.mark.parametrize(
    ("running", "waiting", "gives"),
    [
        ("a1 a1", "b1", True),
        ("a1 b1", "b2", False),
        ("a1 b1", "c1", False),  # would only move the shortage
        ("a1 a2", "b1", True),
        ("a1 a2", "a3", False),
        ("a1 a1", "a2", True),  # a short request of the same address need not wait for 64 choices
        ("a1 a1 b1", "b1", False),
        ("a1 a1 a1 b1", "b1", True),
        ("a1 a1", "a1", False),
    ],
)
def test_who_gives_a_slot(running, waiting, gives):
    running = [completion(*owner) for owner in running.split()]
    waiting = completion(*waiting)
    counts = RunningCounts(running)
    assert any(counts.exceeds(one, waiting) for one in running) == gives


@pytest.mark.parametrize(
    ("running", "waiting", "admitted"),
    [
        ("a1 a1 a1 a1 b2 b2 b2 b2", "a9", "a9"),  # b has as many slots as a, but cannot give one
        ("a1 a1 a1 b2 b2 b2 b2 b3", "a9", "a9"),
        ("a1 a1 a1 a1 b2 b2 b2", "b2 a9", "a9"),  # the first in line cannot get a slot, the second can
        ("a1 a1 a1 a1 b2 b2 b2", "b2", ""),
    ],
)
def test_a_group_gets_a_slot_from_whoever_has_a_surplus(running, waiting, admitted):
    running, waiting = ([completion(*owner) for owner in owners.split()] for owners in (running, waiting))
    scheduler = Scheduler(len(running), 64, PrefixCache(len(running), 64))
    for slot, other in enumerate(running):
        scheduler.running[slot], scheduler.batch.active_B[slot] = other, True
    for other in waiting:
        scheduler.waiting.append(other)
    scheduler.schedule()
    assert "".join("".join(c.owner) for c in waiting if c in scheduler.running) == admitted
    assert scheduler.num_preemptions == bool(admitted)
