"""How networks are served: to the command line, on every file of a folder, and to many callers over HTTP.

`Task` says what a network of the gallery accepts and returns, and `Network` runs any of them. `Batch` runs one on files. `app`
serves saved models.

The server answers by the Open Inference Protocol 2. `protocol.py` turns bytes into arrays and back; it is a pure function, which the
tests fuzz. Each model has a `Queue`: the jobs that came while the last call ran are the next call, so no job waits for others; the
job that has waited longest goes first; if a call fails, its jobs run again one by one, so a bad job fails alone. A call runs in the
event loop if the last one took less than a millisecond, otherwise in a thread.

`Whole` (`served.py`) batches rows of equal shape, and signals of different length for a model built with `ragged=True`, whose
outputs' lengths follow from the expressions in their shapes; only models whose first dimension is named "batch" are batched.
`LiveServed` (`live.py`) holds one `Stream` with a slot for every signal; all pieces that have come are one `push(rows=...)`. A client
that disconnects while its piece runs loses the sequence: the signal has gone on, and nobody has the answer. A state that comes with a
request is treated as hostile input. `limits.py` sets limits that uvicorn and httptools lack: endless headers, large headers, too many
connections.
"""

from typing import TYPE_CHECKING

from .. import lazily

if TYPE_CHECKING:
    from .asgi import app
    from .batch import Batch
    from .networks import gallery, graph_file
    from .server import listen, run
    from .task import Network, Task, config_of, open_network, warm_network

__all__ = [
    "Batch",
    "Network",
    "Task",
    "app",
    "config_of",
    "gallery",
    "graph_file",
    "listen",
    "open_network",
    "run",
    "warm_network",
]
_HOMES = {
    "asgi": ["app"],
    "batch": ["Batch"],
    "networks": ["gallery", "graph_file"],
    "server": ["listen", "run"],
    "task": ["Network", "Task", "config_of", "open_network", "warm_network"],
}
__getattr__ = lazily(__name__, {name: home for home, names in _HOMES.items() for name in names})
