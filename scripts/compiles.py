"""The costs of compiling: `bench.py --compile` runs this file once for each row, every time in a new process.

MAX's cache and ours start empty, and all rows share them: a row finds what the rows before it have compiled. Ratios are
of CPU seconds, which other load on the machine changes less than wall time.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

LAYERS = {"layer": (3, 64, 64), "another size": (3, 80, 384)}
NETWORKS = {
    "UnivNet": ("univnet",),
    "DAC encoder": ("dac", "build_encoder"),
    "DAC decoder": ("dac", "build_decoder"),
    "EnCodec encoder": ("encodec", "build_encoder"),
    "EnCodec decoder": ("encodec", "build_decoder"),
    "Vocos": ("vocos",),
    "CREPE tiny": ("crepe",),
    "PESTO": ("pesto",),
    "wav2vec2 base": ("wav2vec2",),
    "Whisper tiny's encoder": ("whisper",),
    "Mamba's block": ("mamba",),
    "TCN": ("tcn",),
    "Silero VAD": ("silero_vad",),
}
"""The gallery's other networks: module of `max_conv.graphs` and, unless it is `build`, function."""


def relu() -> Callable[[], Any]:
    from max.dtype import DType
    from max.engine import InferenceSession
    from max.graph import DeviceRef, Graph, TensorType, ops

    x = TensorType(DType.float32, [4, 7], DeviceRef.CPU())
    graph = Graph("relu", ops.relu, input_types=[x])
    session = InferenceSession()
    return lambda: session.load(graph)


def layer(name: str) -> Callable[[], Any]:
    import numpy as np
    from max.dtype import DType

    import max_conv

    taps, channels, filters = LAYERS[name]
    made = max_conv.Conv1D(taps, channels, filters, DType.float32, padding=1)
    made.load_state_dict({"weight": np.zeros((taps, channels, filters), np.float32)})
    max_conv.PackedGraph("kernels", made, input_types=made.input_types())  # compiles the kernels, once per machine
    return functools.partial(max_conv.compile, made)


def network(module: str, build: str = "build") -> Callable[[], Any]:
    import numpy as np

    import max_conv

    ours = importlib.import_module(f"max_conv.graphs.{module}")
    config = ours.Config()
    weights = {name: np.zeros(shape, np.float32) for name, shape in config.shapes().items()}
    graph = getattr(ours, build)(config, weights)
    return functools.partial(max_conv.compile, graph, weights=weights)


ROWS: tuple[tuple[str, Callable[[], Callable[[], Any]]], ...] = (
    ("MAX's graph of one ReLU", relu),
    ("the first layer of a kind", lambda: layer("layer")),
    ("the same layer in a new process", lambda: layer("layer")),
    ("a layer of another size in a new process", lambda: layer("another size")),
    ("HiFi-GAN V1", lambda: network("hifigan")),
    ("HiFi-GAN V1 in a new process", lambda: network("hifigan")),
    *((name, functools.partial(network, *where)) for name, where in NETWORKS.items()),
)


def measure() -> list[dict[str, Any]]:
    """Returns the seconds of each row, beyond imports: wall time and CPU time; and CPU time as a multiple of the ReLU's."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="max_conv.compiles.") as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "MAX_CONV_CACHE": f"{folder}/max_conv"}
        for number, (name, _) in enumerate(ROWS):
            command = [sys.executable, str(Path(__file__).resolve()), str(number)]
            said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"row": name} | json.loads(said))
            rows[-1]["relus"] = rows[-1]["cpu"] / rows[0]["cpu"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of `measure` as a table of Markdown."""
    lines = ["| compile | seconds | CPU seconds | in ReLUs |", "|---|---:|---:|---:|"]
    lines += [f"| {row['row']} | {row['wall']:.3f} | {row['cpu']:.2f} | {row['relus']:.2f} |" for row in rows]
    return "\n".join(lines)


def _show(context: Any, _: Any, wanted: bool) -> None:
    if wanted:
        print(table(measure()), flush=True)
        context.exit()


option = click.option(
    "--compile",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show,
    help="Instead, time what compiling costs on a machine whose caches are empty.",
)


def main(number: int) -> None:
    compile = ROWS[number][1]()
    wall, cpu = time.perf_counter(), sum(os.times()[:4])  # with the CPU time of the processes that have ended
    compile()
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": sum(os.times()[:4]) - cpu}), flush=True)
    os._exit(0)  # MAX's threads need not be waited for


if __name__ == "__main__":
    main(int(sys.argv[1]))
