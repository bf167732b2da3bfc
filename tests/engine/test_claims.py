"""Arrays that are claimed, and what becomes of the claim when others come near."""

from __future__ import annotations

import numpy as np
import pytest

import engine

LIMIT_S = 10.0


@pytest.fixture(params=["threaded", "serial"])
def runtime(request):
    made = engine.create(request.param)
    yield made
    made.close()


def test_a_claim_that_nobody_comes_near_leaves_nothing_behind(runtime):
    out = np.zeros(3)
    claim = runtime.claim([out], "write")
    assert claim is not None
    assert claim.op is None
    assert runtime.uses_arrays()
    var = engine.Var("beside")
    assert runtime.push(lambda: 1, writes=[var]).result(LIMIT_S) == 1
    claim.end()
    assert claim.op is None
    assert not runtime.uses_arrays()
    assert runtime.push(lambda: 2, reads=[out]).result(LIMIT_S) == 2


def test_there_is_one_claim_and_only_where_no_array_is_in_use(runtime):
    one, other = np.zeros(3), np.zeros(3)
    claim = runtime.claim([one], "write")
    assert runtime.claim([other], "write") is None
    claim.end()
    started = []
    runtime.push_async(started.append, reads=[one], inline=True)
    assert runtime.claim([other], "write") is None
    started[0].set_result(None)
    second = runtime.claim([other], "write")
    assert second is not None
    claim.end()  # again: it is over
    assert runtime.uses_arrays()
    second.end()
    assert not runtime.uses_arrays()


@pytest.mark.parametrize("early", [True, False], ids=["after the claim", "after the end"])
def test_ops_come_after_what_was_claimed_before_them(early):
    runtime = engine.create("threaded")
    out, seen = np.zeros(8), []
    claim = runtime.claim([out[2:6]], "write")
    if early:
        reading = runtime.push(lambda: seen.append(out.sum()), reads=[out[4:]])
        beside = runtime.push(lambda: seen.append("beside"), writes=[out[:2]])
        beside.result(LIMIT_S)
        assert claim.op is not None
        assert not reading.done()
        assert runtime.pending(out)
    out[2:6] = 1
    claim.end()
    claim.end()  # the first counts
    if not early:
        reading = runtime.push(lambda: seen.append(out.sum()), reads=[out[4:]])
    reading.result(LIMIT_S)
    assert seen[-1] == 4.0
    runtime.validate()
    runtime.close()


def test_a_wait_waits_for_a_claim():
    runtime = engine.create("threaded")
    out = np.zeros(3)
    for wait in (lambda: runtime.wait(out, timeout=0.1), lambda: runtime.wait_all(timeout=0.1)):
        claim = runtime.claim([out], "claimed write")
        with pytest.raises(engine.DeadlineError, match="claimed write"):
            wait()
        claim.end()
        wait()
        runtime.wait_all(timeout=LIMIT_S)  # the first wait has left its op behind
    runtime.close()


@pytest.mark.parametrize("early", [True, False])
def test_arrays_of_a_claim_carry_its_error_until_they_are_written(runtime, early):
    out = np.zeros(3)
    claim = runtime.claim([out], "write")
    assert not early or runtime.pending(out)
    claim.end(ValueError("lost"))
    assert runtime.uses_arrays()
    assert runtime.claim([out], "write") is None
    with pytest.raises(ValueError, match="lost"):
        runtime.push(lambda: 1, reads=[out]).result(LIMIT_S)
    runtime.push(lambda: out.fill(1), writes=[out]).result(LIMIT_S)
    assert not runtime.uses_arrays()
    runtime.claim([out], "write").end()


def test_while_ops_are_recorded_there_are_no_claims(runtime, tmp_path):
    with runtime.profile(tmp_path / "trace.json"):
        assert runtime.profiling
        assert runtime.claim([np.zeros(3)], "write") is None
    assert not runtime.profiling
