"""The contenders of bench.py --networks. Each one runs in a separate process per network.

    python scripts/network_racers.py CONTENDER THREADS FOLDER      answers questions on stdin, one line of JSON each

The first question names a network and a batch size: the reply has the seconds of the preparation, and the difference
between the output and PyTorch's. Every reply has the seconds per call, and the memory that the process used for the
network.
"""

import functools
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from networks import NETWORKS, load_inputs, turned

TOLERANCE = 1e-3
"""The largest error allowed in float32, relative to the largest value."""


class Ready(NamedTuple):
    """A contender's network: a call, and its outputs in the original's axis order."""

    run: Callable[[], Any]
    read: Callable[[Any], Sequence[np.ndarray]]


def ours(name: str, folder: Path, _: int, __: int, dtype: str = "float32") -> Ready:
    from max.driver import Buffer

    import max_conv

    network = NETWORKS[name]
    model = max_conv.load(folder / f"{dtype}.maxconv")
    buffers = [Buffer.from_numpy(turned(array, network.turn_input)) for array in load_inputs(folder)]

    def read(answer: Any) -> list[np.ndarray]:
        outputs = answer if isinstance(answer, tuple) else (answer,)
        return [turned(output.to_numpy(), network.turn_output and output.rank == 3) for output in outputs]

    return Ready(lambda: model(*buffers), read)


def pytorch(name: str, folder: Path, batch: int, threads: int, compiled: bool = False) -> Ready:
    import torch

    torch.set_num_threads(threads)
    module, inputs = NETWORKS[name].prepare(batch)
    tensors = [torch.from_numpy(array) for array in inputs]
    call = torch.compile(module) if compiled else module

    @torch.inference_mode()
    def run() -> Any:
        return call(*tensors)

    return Ready(run, lambda y: [v.numpy() for v in (y if isinstance(y, tuple) else (y,))])


def onnxruntime(name: str, folder: Path, _: int, threads: int) -> Ready:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
    feeds = dict(zip([given.name for given in session.get_inputs()], load_inputs(folder), strict=True))
    return Ready(lambda: session.run(None, feeds), lambda outputs: outputs)


def openvino(name: str, folder: Path, _: int, threads: int, precision: str = "f32") -> Ready:
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", options)
    request = compiled.create_infer_request()
    for i, array in enumerate(load_inputs(folder)):
        request.set_input_tensor(i, openvino.Tensor(array))
    count = len(compiled.outputs)
    return Ready(
        lambda: request.infer(share_outputs=True), lambda _: [request.get_output_tensor(i).data for i in range(count)]
    )


class Contender(NamedTuple):
    """A contender: the packages that it needs, the function that prepares it, the module that loads its library."""

    packages: Sequence[str]
    build: Callable[[str, Path, int, int], Ready]
    library: str


OURS, TORCH = ("max-conv", "max"), ("torch", "transformers")
CONTENDERS = {
    "max_conv": Contender(OURS, ours, "max_conv.runtime.session"),
    "PyTorch": Contender(TORCH, pytorch, "transformers.modeling_utils"),
    "torch.compile": Contender(TORCH, functools.partial(pytorch, compiled=True), "transformers.modeling_utils"),
    "ONNX Runtime": Contender(("onnxruntime", "onnx"), onnxruntime, "onnxruntime"),
    "OpenVINO": Contender(("openvino", "onnx"), openvino, "openvino"),
    "max_conv bf16": Contender(OURS, functools.partial(ours, dtype="bfloat16"), "max_conv.runtime.session"),
    "OpenVINO bf16": Contender(("openvino", "onnx"), functools.partial(openvino, precision="bf16"), "openvino"),
}


def judge(name: str, answers: Sequence[np.ndarray], folder: Path) -> tuple[str | None, float]:
    """Returns what is wrong with an output, and its signal-to-noise ratio in decibels against PyTorch's in float32."""
    wrong, ratio = None, np.inf
    for i, answer in enumerate(answers):
        want = np.load(folder / f"output{i}.npy")
        if answer.shape != want.shape:
            return f"output {i} has shape {answer.shape}, not {want.shape}", -np.inf
        if want.dtype.kind == "i":
            # Codes of nearly equal entries may differ; all later codes of a frame depend on its first ones.
            if (same := (answer == want).mean()) < 0.99 and "bf16" not in name:
                wrong = f"only {same:.1%} of the codes are equal"
            continue
        noise = np.square(answer.astype(np.float64) - want).sum()
        ratio = min(ratio, 10 * np.log10(np.square(want.astype(np.float64)).sum() / max(noise, 1e-300)))
        off = np.abs(answer - want).max() / np.abs(want).max()
        if not off <= (np.inf if "bf16" in name else TOLERANCE):
            wrong = f"off by {off:.1e} of the largest value"
    return wrong, float(ratio)


def memory(what: str) -> int:
    """Returns a line of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) << 10
    return 0


def timed(call: Callable[[], Any], seconds: float = 0.2) -> float:
    """Returns the median seconds per call, of calls that together fill `seconds`; a long call runs once."""
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def work(contender: str, threads: int, folder: Path) -> None:
    """Answers questions on stdin until it is closed: the first one prepares the network, all others are timed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # text that libraries print would be read as a reply
    ready, before = None, 0
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if ready is None:
                importlib.import_module(CONTENDERS[contender].library)
                before = memory("VmRSS")
                start = time.perf_counter()
                ready = CONTENDERS[contender].build(question["network"], folder, question["batch"], threads)
                answer["ready"] = time.perf_counter() - start
                first = ready.run()
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which compiling has raised
                wrong, ratio = judge(contender, ready.read(first), folder)
                answer["decibels"] = ratio
                del first
                if wrong:
                    answer |= {"failed": "wrong", "why": wrong}
            answer["seconds"] = timed(ready.run)
            answer |= {"bytes": memory("VmHWM") - before, "process": memory("VmHWM")}
        except Exception as error:
            words = str(error).strip() or type(error).__name__
            answer = {"failed": "refused", "why": words.splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
