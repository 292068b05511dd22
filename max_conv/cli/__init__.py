"""The console command `max-conv`."""

from typing import TYPE_CHECKING

from .. import lazily

if TYPE_CHECKING:
    from . import main

__all__ = ["main"]
__getattr__ = lazily(__name__, {"main": "main"})
