"""How a network is served: the inputs and outputs of each network of the gallery, and one class that runs any of them.

The command line, servers and batch jobs keep a `Network` object.
"""

from typing import TYPE_CHECKING

from .. import lazily

if TYPE_CHECKING:
    from .asgi import app
    from .batch import Batch
    from .networks import gallery, graph_file
    from .task import Network, Task, config_of, open_network

__all__ = ["Batch", "Network", "Task", "app", "config_of", "gallery", "graph_file", "open_network"]
_TASK = dict.fromkeys(["Network", "Task", "config_of", "open_network"], "task")
__getattr__ = lazily(
    __name__, {"Batch": "batch", "app": "asgi", "gallery": "networks", "graph_file": "networks", **_TASK}
)
