"""The waiting queue and the one order of requests."""

import pytest

from medusa_core.params import SamplingParams
from medusa_core.request import Request
from medusa_core.scheduler.queue import WaitingQueue


def make_request(uid, priority=0):
    return Request(
        uid=uid,
        request_id=f"r{uid}",
        choice_idx=0,
        prompt_token_ids=[1],
        params=SamplingParams(),
        noise_key=0,
        max_total_tokens=8,
        priority=priority,
    )


def drain(queue):
    order = []
    while queue.peek() is not None:
        order.append(queue.pop().uid)
    return order


def test_priority_then_arrival():
    queue = WaitingQueue()
    for request in [make_request(0, 5), make_request(1), make_request(2, -1), make_request(3)]:
        queue.push(request)
    assert drain(queue) == [2, 1, 3, 0]


def test_a_preempted_request_comes_back_in_front_of_its_priority():
    queue = WaitingQueue()
    old, *rest = [make_request(0), make_request(1), make_request(2, -1)]
    for request in rest:
        queue.push(request)
    queue.push(old)
    assert drain(queue) == [2, 0, 1]


def test_held_choices_count_but_wait_for_their_release():
    queue = WaitingQueue()
    held, ready = make_request(0), make_request(1)
    queue.hold(held)
    queue.push(ready)
    assert len(queue) == 2
    assert queue.peek() is ready
    queue.release(held)
    queue.release(held)
    assert len(queue) == 2
    assert drain(queue) == [0, 1]


def test_removed_choices_are_gone_wherever_they_are():
    queue = WaitingQueue()
    requests = [make_request(uid) for uid in range(3)]
    for request in requests[:2]:
        queue.push(request)
    queue.hold(requests[2])
    for request in (requests[0], requests[2]):
        queue.remove(request)
    assert len(queue) == 1
    queue.release(requests[2])
    assert drain(queue) == [1]


def test_an_empty_queue_has_nothing():
    queue = WaitingQueue()
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()
