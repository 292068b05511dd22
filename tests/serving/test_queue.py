"""The queue of a model, on functions of NumPy. Nothing here depends on how fast the machine is."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from max_conv.serving.protocol import Refused
from max_conv.serving.queue import FAST, Job, Queue


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a test in an event loop, for half a minute at most."""
    asyncio.run(asyncio.wait_for(test(), 30))


class Calls:
    """A model: twice the input. It notes the batches that it gets, and waits while it is held."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        self.go.wait(20)
        values = np.concatenate([job.arrays[0] for job in jobs])
        self.batches.append(values.tolist())
        if 13.0 in values:
            raise ValueError("13 is not taken.")
        if 666.0 in values:
            raise OSError("the disk is gone")
        answers, at = [], 0
        for job in jobs:
            answers.append(2 * values[at : at + job.rows])
            at += job.rows
        return answers


def job(*values: float, kind: Any = "a", size: int = 0) -> Job:
    return Job([np.array(values)], kind, len(values), size)


async def held(calls: Calls, queue: Queue) -> asyncio.Task[Any]:
    """Returns a call that runs until `calls.go` is set."""
    calls.go.clear()
    first = asyncio.ensure_future(queue.answer(job(0.0), 20))
    await until(lambda: queue.waiting == 0)
    return first


async def until(true: Callable[[], bool]) -> None:
    await asyncio.sleep(0)
    while not true():
        await asyncio.sleep(0.001)


def test_what_came_while_a_call_ran_is_the_next_call() -> None:
    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 8, 99)
        first = await held(calls, queue)
        tasks = [asyncio.ensure_future(queue.answer(job(value, value), 20)) for value in (1.0, 2.0, 3.0)]
        await asyncio.sleep(0.01)
        calls.go.set()
        assert [answer.tolist() for answer in await asyncio.gather(first, *tasks)] == [[0], [2, 2], [4, 4], [6, 6]]
        assert calls.batches == [[0], [1, 1, 2, 2, 3, 3]]

    run(test)


def test_a_call_has_no_more_rows_than_it_may_and_one_kind() -> None:
    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 4, 99)
        first = await held(calls, queue)
        given = [job(1.0, 1.0), job(2.0, kind="b"), job(3.0), job(4.0, 4.0, 4.0), job(*[5.0] * 6, kind="b")]
        tasks = [asyncio.ensure_future(queue.answer(one, 20)) for one in given]
        await asyncio.sleep(0.01)
        calls.go.set()
        await asyncio.gather(first, *tasks)
        # The one that waited longest goes first, also in its kind; one that is larger than a batch goes alone.
        assert calls.batches == [[0], [1, 1, 3], [2], [4, 4, 4], [5] * 6]

    run(test)


def test_rare_kinds_do_not_starve() -> None:
    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 2, 99)
        first = await held(calls, queue)
        tasks = []
        for n in range(6):
            tasks.append(asyncio.ensure_future(queue.answer(job(float(n)), 20)))
            if n == 1:
                await asyncio.sleep(0.01)
                tasks.append(asyncio.ensure_future(queue.answer(job(100.0, kind="rare"), 20)))
            await asyncio.sleep(0.01)
        calls.go.set()
        await asyncio.gather(first, *tasks)
        assert calls.batches == [[0], [0, 1], [100], [2, 3], [4, 5]]

    run(test)


def test_long_and_short_signals_do_not_share_a_call_that_is_mostly_zeros() -> None:
    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 99, 99)
        first = await held(calls, queue)
        sizes = [100, 60, 50, 1000]
        tasks = [asyncio.ensure_future(queue.answer(job(float(n), size=n), 20)) for n in sizes]
        await asyncio.sleep(0.01)
        calls.go.set()
        await asyncio.gather(first, *tasks)
        assert calls.batches == [[0], [100, 60, 50], [1000]]

    run(test)


def test_a_bad_job_fails_alone() -> None:
    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 8, 99)
        first = await held(calls, queue)
        tasks = [asyncio.ensure_future(queue.answer(job(value), 20)) for value in (1.0, 13.0, 2.0, 666.0)]
        await asyncio.sleep(0.01)
        calls.go.set()
        answers: list[Any] = await asyncio.gather(first, *tasks, return_exceptions=True)
        _, one, bad, two, broken = answers
        assert (one.tolist(), two.tolist()) == ([2], [4])
        assert isinstance(bad, Refused) and (bad.status, str(bad)) == (400, "13 is not taken.")
        assert isinstance(broken, OSError)
        assert (await queue.answer(job(5.0), 20)).tolist() == [10]
        assert queue.waiting == 0

    run(test)


def test_a_full_queue() -> None:
    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 1, 2)
        first = await held(calls, queue)
        tasks = [asyncio.ensure_future(queue.answer(job(value), 20)) for value in (1.0, 2.0, 3.0)]
        await until(lambda: tasks[2].done())
        assert isinstance(tasks[2].exception(), Refused)
        assert (tasks[2].exception().status, queue.waiting) == (503, 2)  # type: ignore[union-attr]
        calls.go.set()
        assert [answer.tolist() for answer in await asyncio.gather(first, *tasks[:2])] == [[0], [2], [4]]
        assert queue.waiting == 0

    run(test)


def test_a_deadline() -> None:
    """A job that waits longer than it may is not run."""

    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 1, 9)
        first = await held(calls, queue)
        with pytest.raises(Refused, match="before the deadline") as error:
            await queue.answer(job(1.0), 0.02)
        assert (error.value.status, queue.waiting) == (504, 0)
        calls.go.set()
        await first
        assert (await queue.answer(job(2.0), 20)).tolist() == [4]
        assert calls.batches == [[0], [2]]

    run(test)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_deadline_while_it_runs(keeps: bool) -> None:
    """A job that changes a signal that goes on gets an answer, even late; no other job is waited for."""

    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 1, 9)
        calls.go.clear()
        one = job(1.0)
        one.keeps = keeps
        task = asyncio.ensure_future(queue.answer(one, 0.02))
        await asyncio.sleep(0.2)
        assert task.done() != keeps
        calls.go.set()
        if keeps:
            assert (await task).tolist() == [2]
        else:
            assert isinstance(task.exception(), Refused)
        await until(lambda: not queue._busy)

    run(test)


def test_a_client_that_goes() -> None:
    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 1, 9)
        first, left = await held(calls, queue), asyncio.Event()

        async def gone() -> None:
            await left.wait()

        task = asyncio.ensure_future(queue.answer(job(1.0), 20, gone))
        await asyncio.sleep(0.1)
        left.set()
        with pytest.raises(Refused, match="gone") as error:
            await task
        assert (error.value.status, queue.waiting) == (499, 0)
        calls.go.set()
        await first
        await until(lambda: not queue._busy)
        assert calls.batches == [[0]]

    run(test)


def test_fast_calls_run_in_the_event_loop_and_slow_ones_beside_it() -> None:
    """The loop goes on while a slow call runs."""

    async def test() -> None:
        threads, slow = [], [True]

        def model(jobs: Sequence[Job]) -> list[None]:
            threads.append(threading.current_thread() is threading.main_thread())
            time.sleep(FAST * 4 if slow[0] else 0)
            return [None] * len(jobs)

        queue = Queue(model, 1, 9)
        for _ in range(3):
            await queue.answer(job(1.0), 20)
        slow[0] = False
        for _ in range(50):
            await queue.answer(job(1.0), 20)
        assert threads[:3] == [False] * 3 and True in threads[3:]

    run(test)


def test_a_call_that_is_much_larger_than_the_last_does_not_stop_the_event_loop() -> None:
    async def test() -> None:
        threads: dict[int, bool] = {}

        def model(jobs: Sequence[Job]) -> list[None]:
            threads[jobs[0].arrays[0].size] = threading.current_thread() is threading.main_thread()
            return [None] * len(jobs)

        queue = Queue(model, 1, 9)
        while not threads.get(1):
            await queue.answer(job(1.0), 20)
        await queue.answer(Job([np.zeros(10**8, np.bool_)], "long"), 20)
        assert threads == {1: True, 10**8: False}

    run(test)


def test_a_pause_between_calls_gathers_jobs() -> None:
    async def test() -> None:
        calls = Calls()
        queue = Queue(calls, 99, 99, pause=0.2)
        tasks = []
        for n in range(8):
            tasks.append(asyncio.ensure_future(queue.answer(job(float(n)), 20)))
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
        assert len(calls.batches) == 2 and sum(map(len, calls.batches)) == 8

    run(test)


def test_what_is_counted() -> None:
    async def test() -> None:
        seen: list[tuple[int, float]] = []
        queue = Queue(Calls(), 9, 9, seen=lambda jobs, began, took: seen.append((len(jobs), took)))
        await queue.answer(job(1.0), 20)
        assert [count for count, took in seen if took >= 0] == [1]

    run(test)
