"""Who waits for a handle gets the GIL soon: the switch interval is shorter meanwhile, and the program's own is kept."""

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from kvstore.errors import DeadlineError
from kvstore.handle import Handle
from kvstore.promptness import DEFAULT_US, PROMPT_US, Promptness


def interval_us() -> int:
    return round(sys.getswitchinterval() * 1e6)


@pytest.fixture(autouse=True)
def promptly() -> Iterator[Promptness]:
    """One of its own, with the interval that nobody has set."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(DEFAULT_US / 1e6)
    yield Promptness()
    sys.setswitchinterval(before)


def test_the_interval_is_short_until_the_last_waiter_goes(promptly: Promptness) -> None:
    with promptly:
        assert interval_us() == PROMPT_US
        with promptly:
            assert interval_us() == PROMPT_US
        assert interval_us() == PROMPT_US
    assert interval_us() == DEFAULT_US


@pytest.mark.parametrize("own_us", [100, PROMPT_US, 20_000])
def test_what_the_program_has_set_stays(promptly: Promptness, own_us: int) -> None:
    sys.setswitchinterval(own_us / 1e6)
    with promptly:
        assert interval_us() == own_us
    assert interval_us() == own_us


def test_what_the_program_sets_meanwhile_stays(promptly: Promptness) -> None:
    with promptly:
        sys.setswitchinterval(0.02)
    assert interval_us() == 20_000


def test_an_error_ends_the_wait(promptly: Promptness) -> None:
    with pytest.raises(KeyError), promptly:
        raise KeyError
    assert interval_us() == DEFAULT_US


def test_in_the_child_of_a_fork_nobody_waits(promptly: Promptness) -> None:
    promptly.__enter__()  # by a thread that is not in the child
    promptly.forked()
    assert interval_us() == DEFAULT_US
    with promptly:
        assert interval_us() == PROMPT_US
    assert interval_us() == DEFAULT_US


def test_the_thread_that_has_forked_leaves_too(promptly: Promptness) -> None:
    with promptly:
        promptly.forked()
    with promptly:
        assert interval_us() == PROMPT_US
    assert interval_us() == DEFAULT_US


def test_a_handle_is_waited_for_promptly() -> None:
    seen: list[int] = []

    def drive(handle: Future[Any], timeout_s: float) -> bool:
        seen.append(interval_us())
        return True

    with pytest.raises(DeadlineError):
        Handle("push of 'w'", 10.0, drive=drive).wait()
    assert seen == [PROMPT_US]
    assert interval_us() == DEFAULT_US
