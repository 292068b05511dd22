"""The contenders of bench.py --streaming: each contender pushes the pieces of signals through a network."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from live_networks import NETWORKS, Facts, config_of, cut, weights_of


class Live(Protocol):
    """A contender: it pushes the pieces of signals through a network."""

    def pieces(self, signal: np.ndarray, chunk: int, streams: int, batched: bool) -> list[Any]: ...
    def begin(self, streams: int, batched: bool) -> None: ...
    def push(self, piece: Any) -> Any: ...
    def flush(self) -> Any: ...
    def read(self, answer: Any) -> np.ndarray:
        """Returns an answer as (streams, positions, ...)."""
        ...


class Ours:
    """Streams of our live model: one for each signal, or one for a batch."""

    def __init__(self, name: str, folder: Path, _: int) -> None:
        import max_conv

        self.axis, self.model = NETWORKS[name].axis, max_conv.load(folder / "live.maxconv")
        self.streams: list[Any] = []

    def pieces(self, signal: np.ndarray, chunk: int, streams: int, batched: bool) -> list[Any]:
        if batched:
            signal = np.repeat(signal, streams, 0)
        return [cut(signal, self.axis, at, at + chunk) for at in range(0, signal.shape[self.axis], chunk)]

    def begin(self, streams: int, batched: bool) -> None:
        count = 1 if batched else streams
        self.streams = [self.model.stream(batch=streams // count) for _ in range(count)]

    def push(self, piece: Any) -> Any:
        return [stream.push(piece) for stream in self.streams]

    def flush(self) -> Any:
        return [stream.flush() for stream in self.streams]

    def read(self, answer: Any) -> np.ndarray:
        return np.concatenate(answer)


class Single:
    """The common part of contenders that have one stream."""

    def pieces(self, signal: np.ndarray, chunk: int, streams: int, batched: bool) -> list[Any]:
        return [cut(signal, self.axis, at, at + chunk) for at in range(0, signal.shape[self.axis], chunk)]

    def begin(self, streams: int, batched: bool) -> None:
        assert streams == 1

    def flush(self) -> Any:
        return None

    def read(self, answer: Any) -> np.ndarray:
        return np.asarray(answer)

    axis: int


class OursWhole(Single):
    """Our model of the whole signal, which is one piece."""

    def __init__(self, name: str, folder: Path, _: int) -> None:
        import max_conv

        self.axis, self.push = NETWORKS[name].axis, max_conv.load(folder / "whole.maxconv")

    def pieces(self, signal: np.ndarray, chunk: int, streams: int, batched: bool) -> list[Any]:
        return [signal]


class EmptyCall(Single):
    """A call of MAX's own model of a graph of one ReLU on 28 values."""

    axis = 1

    def __init__(self, *_: Any) -> None:
        from max.driver import Buffer

        from compiles import relu

        self.model = relu()()
        self.x = Buffer.from_numpy(np.zeros((4, 7), np.float32))

    def push(self, _: Any) -> Any:
        self.model.execute(self.x)


class Peer(Single):
    """The common part of peers: NCL data, and chunks that wait until the first call can be made."""

    file = ""
    """The ONNX file that it needs."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.threads = sorted({1, threads})
        self.sessions = {count: session(folder / self.file, count) for count in self.threads if self.file}
        self.use(threads)
        self.axis, self.facts, self.turn = 2, Facts.read(folder), not NETWORKS[name].codes
        self.waiting: list[np.ndarray] | None = None

    def use(self, threads: int) -> None:
        """Computes with so many threads from now on."""
        import torch

        torch.set_num_threads(threads)
        self.session = self.sessions.get(threads)

    def pieces(self, signal: np.ndarray, chunk: int, streams: int, batched: bool) -> list[Any]:
        return super().pieces(signal.swapaxes(1, 2) if self.turn else signal, chunk, streams, batched)

    def begin(self, streams: int, batched: bool) -> None:
        super().begin(streams, batched)
        self.waiting = []

    def push(self, piece: Any) -> Any:
        if self.waiting is None:
            return self.step(piece)
        self.waiting.append(piece)
        if sum(one.shape[2] for one in self.waiting) < self.facts.first:
            return None
        piece, self.waiting = np.concatenate(self.waiting, 2), None
        return self.first(piece)

    def read(self, answer: Any) -> np.ndarray:
        values = np.asarray(answer)
        return values.swapaxes(1, 2) if values.ndim == 3 else values

    def first(self, piece: Any) -> Any:
        return self.step(piece)

    def step(self, piece: Any) -> Any:
        raise NotImplementedError


class Torch(Peer):
    """PyTorch, with layers that keep the values that the next chunk needs."""

    def __init__(self, name: str, folder: Path, threads: int, layers: str = "Cached") -> None:
        super().__init__(name, folder, threads)
        import torch

        import live_torch

        network, config = live_torch.NETWORKS[name], config_of(name)
        self.live = getattr(live_torch, layers)(weights_of(name))

        @torch.inference_mode()
        def step(piece: Any) -> Any:
            return network(self.live, torch.from_numpy(piece), config).numpy()

        self.torch_step = step

    def begin(self, streams: int, batched: bool) -> None:
        super().begin(streams, batched)
        self.live.begin()

    def step(self, piece: Any) -> Any:
        return self.torch_step(piece)


class OnnxState(Torch):
    """ONNX Runtime; the states of the layers are inputs and outputs. PyTorch makes the first ones."""

    file = "state.onnx"

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        super().__init__(name, folder, threads)
        assert self.session
        self.names = [given.name for given in self.session.get_inputs()]
        self.outputs = [given.name for given in self.session.get_outputs()]

    def first(self, piece: Any) -> Any:
        import onnxruntime

        y = self.torch_step(piece)
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.states = [self.value(np.ascontiguousarray(state.numpy())) for state in self.live.state.values()]
        return y

    def step(self, piece: Any) -> Any:
        assert self.session
        feeds = dict(zip(self.names, [self.value(piece), *self.states], strict=True))
        y, *self.states = self.session.run_with_ort_values(self.outputs, feeds)
        return y.numpy()


class Overlap(Peer):
    """The whole network runs again for every chunk, on all inputs that the chunk's outputs depend on."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        super().__init__(name, folder, threads)
        if self.facts.left is None or self.facts.right is None:
            raise NotImplementedError("the network sees all that came before")
        self.run = self.runner(name)

    def runner(self, name: str) -> Callable[[np.ndarray], Any]:
        """Returns the function that computes a window."""
        import torch

        import live_torch

        network, config, layers = live_torch.NETWORKS[name], config_of(name), live_torch.Whole(weights_of(name))

        @torch.inference_mode()
        def run(window: np.ndarray) -> Any:
            return network(layers, torch.from_numpy(window), config).numpy()

        return run

    def begin(self, streams: int, batched: bool) -> None:
        super().begin(streams, batched)
        self.seen: Any = None
        self.begins = self.done = 0

    def step(self, piece: Any) -> Any:
        self.seen = piece if self.seen is None else np.concatenate([self.seen, piece], 2)
        return self.until(self.begins + self.seen.shape[2] - (self.facts.right or 0))

    def flush(self) -> Any:
        return self.until(self.begins + self.seen.shape[2])

    def until(self, end: int) -> Any:
        """Returns the outputs of the positions up to `end` that have not been returned."""
        if end <= self.done:
            return None
        y = self.run(self.seen)
        y = y[..., (self.done - self.begins) * self.facts.hop : (end - self.begins) * self.facts.hop]
        self.done = end
        drop = max(0, end - (self.facts.left or 0) - self.begins)
        self.seen, self.begins = self.seen[:, :, drop:], self.begins + drop
        return y


class OnnxOverlap(Overlap):
    """The same by ONNX Runtime."""

    file = "whole.onnx"

    def runner(self, name: str) -> Callable[[np.ndarray], Any]:
        def run(window: np.ndarray) -> Any:
            assert self.session
            return self.session.run(None, {"x": window})[0]

        return run


def session(file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])


class Contender(NamedTuple):
    """A contender: the packages that it needs, and the class that prepares it."""

    packages: Sequence[str]
    build: Callable[[str, Path, int], Live]


MAX, TORCH, ONNX = ("max-conv", "max"), ("torch",), ("onnxruntime", "onnx", "torch")
CONTENDERS = {
    "max_conv": Contender(MAX, Ours),
    "max_conv whole": Contender(MAX, OursWhole),
    "PyTorch cat": Contender(TORCH, Torch),
    "Moshi": Contender(TORCH, functools.partial(Torch, layers="Moshi")),
    "ONNX Runtime state": Contender(ONNX, OnnxState),
    "PyTorch overlap": Contender(TORCH, Overlap),
    "ONNX Runtime overlap": Contender(ONNX, OnnxOverlap),
    "MAX empty call": Contender(("max",), EmptyCall),
}
