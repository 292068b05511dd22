"""How networks are served: to the command line, on every file of a folder, and to many callers over HTTP.

`Task` says what a network of the gallery accepts and returns, and `Network` runs any of them. `Batch` runs one on files. `app`
serves saved models.
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
