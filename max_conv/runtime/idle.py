"""Keeps MAX's polling thread from using a tenth of a core that the kernels need."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SET_TIMERSLACK, GET_TIMERSLACK = 29, 30
SLACK = 5_000_000
"""Nanoseconds by which the thread's timers may be late."""

_lock = threading.Lock()
_started = False


def first_run(execute: Callable[..., Any], *args: Any) -> Any:
    """Calls `execute`, which runs a MAX model. On the first call, the thread that MAX starts gets late timers.

    The first execution in a process starts a thread that waits on a condition for 200 microseconds at a time, for ever.
    On two cores its 5,000 wake-ups per second used 12 % of one core and made a pointwise convolution 8 % slower. How
    late Linux may wake a thread is inherited from the thread that starts it; with 5 ms it wakes 200 times per second.
    Nothing changes if there is no `prctl`, or if other code has already run a model.
    """
    global _started
    if _started:
        return execute(*args)
    with _lock, _late_timers():
        result = execute(*args)
        _started = True
        return result


@contextmanager
def _late_timers() -> Iterator[None]:
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None or (before := prctl(GET_TIMERSLACK, 0, 0, 0, 0)) < 0:
        yield
        return
    prctl(SET_TIMERSLACK, ctypes.c_ulong(SLACK), 0, 0, 0)
    try:
        yield
    finally:
        prctl(SET_TIMERSLACK, ctypes.c_ulong(before), 0, 0, 0)
