"""Compiles graphs with MAX: large ones in a separate process, with one thread.

Where MAX has several threads, it gives LLVM each operation of the graphs apart, with a copy of all functions that the
operation calls, and optimises the copies again and again. With one thread all operations are one module, and each function
is optimised once: HiFi-GAN V1 takes 41 CPU seconds instead of 81, and on two cores 41 s instead of 55. MAX fixes the
number of its threads when it starts, and the kernels need them all: hence the other process.
"""

import io
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from max._core.dialects.mo import GraphOp
from max.driver import get_virtual_cpu_target
from max.engine import read
from max.graph import Graph, Module

from .devices import session_of
from .notice import LOG

CPUS = 2
"""Up to as many CPUs one thread is faster for large graphs: more CPUs optimise more copies at a time."""
OPERATIONS = 500
"""Operations of graphs from which one thread is faster. For fewer, it needs less CPU time, but up to a fifth more wall time."""
_lock = threading.Lock()
"""One process at a time: each needs 1.2 to 2 GB of memory, and MAX compiles one graph at a time, too."""


def compile_graphs(graphs: Graph | Module, libraries: Sequence[Path] = (), devices: tuple[str, ...] = ()) -> Any:
    """Compiles a graph, or all graphs of a module, and returns MAX's result.

    Args:
        graphs: The graph, which has the paths of its kernel libraries, or the module.
        libraries: The paths of a module's kernel libraries.
        devices: The names of the graphs' accelerators, if there are any.

    Raises:
        RuntimeError: If the graphs cannot be compiled.
    """
    session = session_of(devices)
    module = graphs.module if isinstance(graphs, Graph) else graphs
    if not devices and _one_thread_is_faster(module):
        paths = graphs.kernel_libraries_paths if isinstance(graphs, Graph) else libraries
        if (result := with_one_thread(module, paths)) is not None:
            return result
    # Also where the other process failed: MAX's errors are raised here.
    return session.compile(graphs, custom_extensions=list(libraries) or None)


def _one_thread_is_faster(module: Module) -> bool:
    # Some programs that embed Python name themselves as its executable.
    if not Path(sys.executable or "").name.startswith("python") or not hasattr(os, "sched_getaffinity"):
        return False
    graphs = [operation for operation in module.mlir_module.body if isinstance(operation, GraphOp)]
    operations = sum(1 for graph in graphs for _ in graph.regions[0].front)
    return operations >= OPERATIONS and 1 < len(os.sched_getaffinity(0)) <= CPUS


def with_one_thread(module: Module, libraries: Sequence[Path]) -> Any:
    """Returns the result of another process, or None if the process failed."""
    environment = dict(os.environ)  # without what MAX exports for its own use
    try:
        with _lock, tempfile.TemporaryDirectory(prefix="max_conv.compile.") as folder:
            file, program = Path(folder) / "graphs.mef", Path(__file__).with_name("one_thread.py")
            words: list[str | Path] = [sys.executable, "-P", program, file, get_virtual_cpu_target() or "", *libraries]
            done = subprocess.run(words, input=module.mlir_module.bytecode, capture_output=True, env=environment)
            if not done.returncode:
                return read(io.BytesIO(file.read_bytes()))
            reason = done.stderr.decode(errors="replace").strip()[-300:]
    except OSError as error:  # no further process, or no room for the file
        reason = str(error)
    LOG.info("compiling with one thread failed, and is done again in this process: %s", reason)
    return None
