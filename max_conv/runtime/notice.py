"""Messages about slow steps."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 2.0
LOG = logging.getLogger("max_conv")


@contextmanager
def slow_compile(name: str) -> Iterator[None]:
    """Reports once, to `logging` and to a terminal, that `name` is being compiled, if that takes over two seconds."""
    timer = threading.Timer(SECONDS, _say, [name])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(name: str) -> None:
    sentence = f"compiling {name} takes over {SECONDS:g} s; the next time it comes from the cache."
    LOG.info(sentence)
    if sys.stderr is not None and sys.stderr.isatty() and not _shown():
        print(f"max_conv: {sentence}", file=sys.stderr, flush=True)


def _shown() -> bool:
    """Returns whether logging already writes to stderr."""
    logger: logging.Logger | None = LOG
    while logger is not None and LOG.isEnabledFor(logging.INFO):
        for handler in logger.handlers:
            if getattr(handler, "stream", None) is sys.stderr and handler.level <= logging.INFO:
                return True
        logger = logger.parent if logger.propagate else None
    return False
