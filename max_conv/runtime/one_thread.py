"""Compiles a module of graphs with one thread of MAX. `compiler.py` runs this file in a separate process.

    python one_thread.py FILE TARGET LIBRARY ...

It reads the module's bytecode from standard input and writes MAX's compiled file. TARGET is the name of the processor, or
"" for this one. It imports nothing of this package, so that it starts in 0.3 s.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

DEATH_SIGNAL = 1
"""The option of `prctl` that sets the signal that a process gets when its parent ends."""


def main(file: str, target: str, *libraries: str) -> None:
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})  # MAX makes a thread for each CPU that it sees

    from max._core import Operation
    from max.driver import CPU, set_virtual_cpu_target
    from max.engine import InferenceSession
    from max.graph import Module
    from max.graph.graph import default_mlir_context

    if target:
        set_virtual_cpu_target(target)
    session = InferenceSession(devices=[CPU()])
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), usable)
    module = Module(Operation.from_bytecode(sys.stdin.buffer.read(), default_mlir_context()))
    session.compile(module, custom_extensions=[Path(library) for library in libraries]).export_mef(file)
    os._exit(0)  # MAX's thread may end the process with SIGABRT while Python ends


if __name__ == "__main__":
    main(*sys.argv[1:])
