"""Raises an error in a forked child. MAX's threads do not exist there, so a call of MAX would wait for ever.

The threads start when MAX is imported. So a child of a process that has imported MAX cannot compile, load or run a
model. It can build graphs.
"""

import os

_forked = False


def _note() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def check_fork(op: str) -> None:
    """Raises RuntimeError in a child that was forked after this module was imported, and MAX with it."""
    if _forked:
        raise RuntimeError(
            f"{op}: this process was forked from one that had imported MAX, whose threads do not survive a fork; "
            "use the start method spawn or forkserver."
        )
