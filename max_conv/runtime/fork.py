"""Refuses to call MAX in a forked child: MAX's threads are not there, and it would wait for them for ever.

They start as MAX is imported, so no child of a process that has imported it can compile, load or run. Graphs can be built.
"""

import os

_forked = False


def _note() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def check_fork(op: str) -> None:
    """Raises RuntimeError in a child that was forked after this module, and MAX with it, was imported."""
    if _forked:
        raise RuntimeError(
            f"{op}: this process was forked from one that had imported MAX, whose threads do not survive a fork; "
            "use the start method spawn or forkserver."
        )
