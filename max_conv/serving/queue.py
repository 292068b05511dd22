"""Batches of requests that change no answer: the requests that came while the last call ran are the next call."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .protocol import Refused

FAST = 1e-3
"""Seconds: a call that should take less runs in the event loop, since switching threads costs about as much."""
WATCH = 0.05
"""Seconds after which a waiting request begins to check whether its client is still connected."""


class Job:
    """One request, as it waits.

    Attributes:
        arrays: The model's inputs.
        kind: Only jobs of one kind run together.
        rows: The number of its rows in a batch.
        size: How long its signals are, if jobs of different length run together.
        more: Other values that the function that runs it needs.
        keeps: Whether it changes the state for the next job. Once it runs, it is waited for, even after the deadline.
        runs: Whether it has left its line, and nothing has failed.
        since: When it came.
        answer: The future of its answer.
    """

    __slots__ = ("answer", "arrays", "keeps", "kind", "more", "rows", "runs", "since", "size")

    def __init__(
        self,
        arrays: list[np.ndarray],
        kind: Hashable,
        rows: int = 1,
        size: int = 0,
        more: Any = None,
        keeps: bool = False,
    ) -> None:
        self.arrays, self.kind, self.rows, self.size, self.more, self.keeps = arrays, kind, rows, size, more, keeps
        self.runs, self.since = False, time.monotonic()
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Queue:
    """The waiting requests of one model, which it answers in batches. It belongs to one event loop.

    Nobody waits for others: there is no delay. The job that has waited longest goes first, with the jobs of its kind that
    fit into a call. If a call fails, each of its jobs runs again alone, so that a bad one fails alone.

    Args:
        run: A function from jobs of one kind to an answer for each.
        most_rows: The most rows of a call.
        most_jobs: The most jobs that wait.
        pause: Seconds between the begins of two calls, at least: to gather jobs that come one by one.
        seen: Called after each call with its jobs, when it began and how long it took.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence[Any]],
        most_rows: int,
        most_jobs: int,
        pause: float = 0.0,
        seen: Callable[[Sequence[Job], float, float], None] = lambda jobs, began, took: None,
    ) -> None:
        self._run, self._most_rows, self._most_jobs, self._pause, self._seen = run, most_rows, most_jobs, pause, seen
        self._lines: dict[Hashable, deque[Job]] = {}
        self._busy = False
        self._began, self._took, self._size = -1e9, 1e9, 1  # of the last call: when, how long, how many values
        self._thread = ThreadPoolExecutor(1, "max_conv")
        self.waiting = 0

    async def answer(self, job: Job, seconds: float, gone: Callable[[], Awaitable[None]] | None = None) -> Any:
        """Returns the answer to a job.

        Args:
            job: The job.
            seconds: How long it may wait and run.
            gone: Returns when the client has disconnected.

        Raises:
            Refused: 503 if too many jobs wait, 504 if the answer was late, 499 if the client has disconnected, 400 if
                the model refuses the input.
        """
        if self.waiting >= self._most_jobs:
            raise Refused(f"{self.waiting} requests are waiting, as many as may; try again later.", 503)
        self._lines.setdefault(job.kind, deque()).append(job)
        self.waiting += 1
        if not self._busy:
            self._busy = True
            asyncio.get_running_loop().call_soon(self._next)
        try:
            if job.keeps and gone is None:  # a socket notices by itself that its client has disconnected
                return await job.answer
            await asyncio.wait((job.answer,), timeout=min(seconds, WATCH))
            if not job.answer.done():
                await self._patiently(job, seconds - WATCH, gone)
            return job.answer.result()
        finally:
            self._forget(job)

    async def _patiently(self, job: Job, seconds: float, gone: Callable[[], Awaitable[None]] | None) -> None:
        watch = asyncio.ensure_future(gone()) if gone else None
        try:
            waits: set[asyncio.Future[Any]] = {job.answer} | ({watch} if watch else set())
            await asyncio.wait(waits, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
            if job.answer.done():
                return
            if watch and watch.done():
                raise Refused("the client has gone.", 499)
            if job.keeps and job.runs:
                await asyncio.wait((job.answer,))
                return
            raise Refused("the answer was not there before the deadline.", 504)
        finally:
            if watch:
                watch.cancel()

    def _forget(self, job: Job) -> None:
        """Removes a job from its line if nobody waits for its answer any more."""
        job.answer.cancel()
        if not job.runs and job in self._lines.get(job.kind, ()):
            self._lines[job.kind].remove(job)
            self._left(job.kind, 1)

    def _left(self, kind: Hashable, count: int) -> None:
        self.waiting -= count
        if not self._lines[kind]:
            del self._lines[kind]

    def _take(self) -> list[Job]:
        """Returns the next batch: the job that has waited longest, and the next ones of its kind that fit."""
        kind = min(self._lines, key=lambda kind: self._lines[kind][0].since)
        line, rows, sizes, longest = self._lines[kind], 0, 0, 0
        jobs: list[Job] = []
        while line:
            job = line[0]
            more, all_sizes, size = rows + job.rows, sizes + job.rows * job.size, max(longest, job.size)
            # Signals of different length are padded to the longest, by at most as many values as they hold together.
            if jobs and (more > self._most_rows or more * size > 2 * all_sizes):
                break
            job.runs = True
            jobs.append(line.popleft())
            rows, sizes, longest = more, all_sizes, size
        self._left(kind, len(jobs))
        return jobs

    def _next(self) -> None:
        """Begins the next call."""
        loop = asyncio.get_running_loop()
        if not self._lines:
            self._busy = False
            return
        if (early := self._began + self._pause - time.monotonic()) > 0:
            loop.call_later(early, self._next)
            return
        jobs = self._take()
        size = sum(array.size for job in jobs for array in job.arrays)
        fast = self._took * max(1.0, size / self._size) < FAST
        self._began, self._size = time.monotonic(), max(1, size)
        if fast:
            done: Future[Sequence[Any]] = Future()
            try:
                done.set_result(self._run(jobs))
            except Exception as error:
                done.set_exception(error)
            self._finish(jobs, done)
        else:
            done = self._thread.submit(self._run, jobs)
            done.add_done_callback(lambda done: loop.call_soon_threadsafe(self._finish, jobs, done))

    def _finish(self, jobs: Sequence[Job], done: "Future[Sequence[Any]]") -> None:
        self._took = time.monotonic() - self._began
        error = done.exception()
        if error is None:
            self._seen(jobs, self._began, self._took)
            for job, answer in zip(jobs, done.result(), strict=True):
                if not job.answer.done():
                    job.answer.set_result(answer)
        else:
            self._failed(jobs, Refused(str(error)) if isinstance(error, ValueError | TypeError) else error)
        asyncio.get_running_loop().call_soon(self._next)

    def _failed(self, jobs: Sequence[Job], error: BaseException) -> None:
        """Fails the job of a call that failed; several jobs are run again, each alone."""
        for job in jobs:
            job.runs = False
            if job.answer.done():
                continue
            if len(jobs) == 1:
                job.answer.set_exception(error)
            else:
                job.kind = object()
                self._lines[job.kind] = deque([job])
                self.waiting += 1

    def close(self) -> None:
        """Ends the thread when no job is left."""
        self._thread.shutdown(wait=False)
