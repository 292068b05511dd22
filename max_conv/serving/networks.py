"""The files of the gallery, by name."""

import importlib
import pkgutil
from typing import Any


def gallery() -> list[str]:
    """Returns the names of all networks."""
    graphs = importlib.import_module("max_conv.graphs")
    names = [module.name for module in pkgutil.iter_modules(graphs.__path__)]
    return [name for name in names if name not in ("conv1d", "parts")]


def graph_file(name: str) -> Any:
    """Imports the file of a network, "silero-vad" or "silero_vad": Config, LAYERS, TASK, load_weights, build.

    Raises:
        ValueError: If there is no network of that name.
    """
    module = name.replace("-", "_")
    if module not in gallery():
        raise ValueError(f"there is no model {name!r}; the gallery has {', '.join(gallery())}.")
    return importlib.import_module(f"max_conv.graphs.{module}")
