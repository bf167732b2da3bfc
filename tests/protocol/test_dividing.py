"""Requests for a bundle that are divided: what is asked instead, and what becomes of it."""

from __future__ import annotations

from itertools import count

import pytest

from kvstore.errors import PeerError, WorkerLostError
from kvstore.protocol.dividing import Division
from kvstore.protocol.messages import Committed, Divided, Failed, Fetch, Missing, Place, Push, Value
from kvstore.protocol.requesting import Answered, Divide, Refused, Request, Requesting

BUNDLE = b"a bundle of keys"
CHANNEL = (BUNDLE, 1)
MEMBERS = [("a", (0, 2)), ("b", (2, 3))]


def push(request_id, round, *, pull=False, payload="xyz", place=None, nbytes=3, priority=7):
    message = Push(request_id, BUNDLE, 0, round, pull, True, priority, True, (1, 2), place)
    return Request(4, message, payload, nbytes, priority, CHANNEL, is_push=True, is_pull=pull)


def fetch(request_id, round, key=BUNDLE):
    return Request(4, Fetch(request_id, key, 0, round, 7, True, (1, 2)), None, 0, 7, CHANNEL, is_pull=True)


def divided(request, members=MEMBERS):
    return Division(request, members, count(100).__next__)


def sent(core):
    return list(core.outgoing(4, 0.0))


# --- the parts --------------------------------------------------------------------------------------


def test_a_push_is_one_of_each_key():
    division = divided(push(5, 3, pull=True))
    assert [(part.message, part.payload) for part in division.parts] == [
        (Push(100, "a", 0, 3, True, False, 7), "xy"),
        (Push(101, "b", 0, 3, True, False, 7), "z"),
    ]
    for part, key in zip(division.parts, "ab", strict=True):
        assert (part.server, part.channel, part.priority) == (4, (key, 0), 7)
        assert part.is_push
        assert part.is_pull
        assert not part.accepted
    assert [part.nbytes for part in division.parts] == [2, 1]


def test_what_the_server_has_is_not_sent_again():
    request = push(5, 3)
    request.accepted = True
    core = Requesting()
    for part in divided(request).parts:
        core.submit(part)
    assert [payload for _, payload in sent(core)] == [None, None]
    core.reply(Missing(101), None)
    assert sent(core) == [(Push(101, "b", 0, 3, False, False, 7), "z")]


def test_bytes_in_shared_memory_stay_where_they_are():
    division = divided(push(5, 3, payload=None, place=Place("segment", 1000)))
    assert [(part.message.place, part.payload) for part in division.parts] == [
        (Place("segment", 1000), None),
        (Place("segment", 1002), None),
    ]


def test_a_pull_is_one_of_each_key():
    division = divided(fetch(5, 3))
    assert [part.message for part in division.parts] == [Fetch(100, "a", 0, 3, 7), Fetch(101, "b", 0, 3, 7)]
    (part,) = divided(fetch(5, 3, "a"), [("a", (0, 0))]).parts
    assert part.message == Fetch(100, "a", 0, 3, 7)
    assert part.channel == ("a", 0)


# --- what becomes of them ---------------------------------------------------------------------------


def test_a_push_is_committed_when_all_are():
    division = divided(push(5, 3))
    first, second = division.parts
    assert division.conclude(Answered(second, Committed(101), None)) is None
    assert division.conclude(Answered(first, Committed(100), None)) == Answered(division.request, Committed(5), None)


def test_a_value_is_there_when_all_are_in_the_order_of_the_keys():
    division = divided(push(5, 3, pull=True))
    first, second = division.parts
    assert division.conclude(Answered(second, Value(101, 4, 0), ["B"])) is None
    outcome = division.conclude(Answered(first, Value(100, 6, 2), ["A"]))
    assert outcome == Answered(division.request, Value(5, 4, 2), ["A", "B"])


@pytest.mark.parametrize("failing", [0, 1])
def test_it_fails_when_one_has_failed_and_all_are_over(failing):
    division = divided(fetch(5, 3))
    error, later = WorkerLostError("gone"), PeerError("later")
    bad, good = division.parts[failing], division.parts[1 - failing]
    assert division.conclude(Refused(bad, error)) is None
    assert division.conclude(Answered(good, Value(100, 6, 2), ["A"])) == Refused(division.request, error)
    division = divided(fetch(5, 3))
    assert division.conclude(Refused(bad, error)) is None
    assert division.conclude(Refused(good, later)) == Refused(division.request, error)


# --- withdrawing ------------------------------------------------------------------------------------


def test_all_requests_of_the_channel_are_withdrawn_in_their_order():
    core = Requesting(credit_bytes=100)
    requests = [push(5, 1, nbytes=70_000, priority=0), fetch(6, 1), push(7, 2, priority=9), push(8, 3), fetch(9, 3)]
    other = Request(4, Push(10, "c", 0, 1, False, False), "w", 1, 0, ("c", 0), is_push=True)
    for request in (*requests, other):
        assert core.submit(request) is None
    assert {message.request_id for message, _ in sent(core)} == {5, 6, 10}  # 7 waits for 5, and the others for 7
    assert core.in_flight == {4: 70_000}
    assert core.reply(Divided(5, True), None) == Divide(tuple(requests))
    assert requests[0].accepted
    assert not requests[2].accepted
    assert core.in_flight == {4: 0}
    assert list(core.open) == [10]
    core.tick(1000.0)
    assert [message.request_id for message, _ in sent(core)] == [10]
    for request_id in (5, 6, 7):
        assert core.reply(Committed(request_id), None) is None  # closed
    late = push(11, 4)
    assert core.submit(late) == Divide((late,))
    assert core.divide(CHANNEL) == Divide(())
    core.forget(CHANNEL)
    assert core.submit(push(12, 4)) is None


def test_each_key_goes_on_at_its_own_pace():
    core = Requesting()
    core.submit(push(5, 1))
    core.submit(push(6, 2))
    assert len(sent(core)) == 1
    divide = core.reply(Divided(5, True), None)
    ids = count(100).__next__
    for request in divide.requests:
        for part in Division(request, MEMBERS, ids).parts:
            core.submit(part)
    assert sent(core) == [
        (Push(100, "a", 0, 1, False, False, 7), None),
        (Push(101, "b", 0, 1, False, False, 7), None),
    ]
    core.reply(Committed(100), None)
    assert sent(core) == [(Push(102, "a", 0, 2, False, False, 7), "xy")]


def test_the_server_s_refusal_ends_one_request_only():
    core = Requesting()
    core.submit(push(5, 1))
    core.submit(push(6, 2))
    sent(core)
    outcome = core.reply(Failed(5, "WorkerLostError", "gone"), None)
    assert isinstance(outcome, Refused)
    assert [message.request_id for message, _ in sent(core)] == [6]
