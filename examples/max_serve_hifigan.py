"""HiFi-GAN of this package for `max serve`: a mel spectrogram in, a WAV file back, weights from a safetensors file.

Run it, from this folder, with `pip install "max[serve]==26.7.0"` in the same environment as this package:

    max serve --model-path MODEL --custom-architectures .:max_serve_hifigan --devices cpu

MODEL is a folder with three files; the weights have PyTorch's names and layout, as published:

    model_index.json             {"_class_name": "MaxConvHifiGan", "vocoder": ["max_conv", "HifiGan"]}
    vocoder/config.json          the generator's own config.json (without `model_type`)
    vocoder/model.safetensors    the generator's weights

It listens on all addresses of the machine, without a password, unless MAX_SERVE_HOST says otherwise. Ask for sound,
with `mel` a float32 array (frames, mels):

    requests.post("http://127.0.0.1:8000/v1/audio/speech", json={
        "model": "MODEL", "instructions": "-", "input": base64.b64encode(mel.tobytes()).decode()}).content

Limits, all of MAX 26.7.0:

- `input` is text, so the spectrogram comes as base64 of float32 values, frame after frame.
- `instructions` is required and means nothing here.
- Requests run one at a time: an audio architecture has a batch of 1.
- The answer is 16-bit mono WAV, whole: no other format, no `speed`, no streaming.
- The interface is undocumented, and private in one place: another version of MAX may need other code.

The filters are packed once, in MAX's own session. `max-conv` serves batches, live signals and binary arrays.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from max.driver import load_devices
from max.engine import InferenceSession
from max.experimental.tensor import Tensor
from max.graph import DeviceRef
from max.graph.weights import WeightsFormat
from max.pipelines.audio import AudioExecutorOutputs
from max.pipelines.context import AudioContext, TokenBuffer
from max.pipelines.context.exceptions import InputError
from max.pipelines.lib import SupportedArchitecture
from max.pipelines.lib.config.model_config import _resolve_component_encoding_and_weights  # MAX's audio models use it
from max.pipelines.lib.interfaces import ArchConfig
from max.pipelines.lib.pipeline_executor import PipelineExecutor
from max.pipelines.modeling.base import TensorStruct
from max.pipelines.modeling.types import PipelineTask
from max.pipelines.request import OpenResponsesRequest
from max_conv.graphs import hifigan

from max_conv import registry  # importing it also keeps the workers, which are new processes, in this environment

LONGEST = 1 << 24
"""The most values of one spectrogram, which `max serve` counts as tokens."""


def config_of(models: Mapping[str, Any]) -> hifigan.Config:
    """Returns the sizes that vocoder/config.json has."""
    if "vocoder" not in models:
        raise ValueError(f"hifigan: model_index.json must name a 'vocoder', but names {', '.join(models)}; add it.")
    return hifigan.Config.from_dict(models["vocoder"].huggingface_config.to_dict())


class MelTokenizer:
    """Passes the bits of float32 values as token ids: an executor gets nothing else."""

    eos_token_ids: ClassVar[set[int]] = set()
    expects_content_wrapping = False

    def __init__(self, model_path: str, pipeline_config: Any, **_: Any) -> None:
        self.mels = config_of(pipeline_config.models).mels

    async def encode(self, prompt: str, add_special_tokens: bool = True) -> np.ndarray:
        """Returns a number for each value of a spectrogram, or raises an error that the client gets with status 400."""
        try:
            mel = np.frombuffer(base64.b64decode(prompt, validate=True), np.float32)
        except ValueError:
            raise InputError("hifigan: input must be base64 of float32 values.") from None
        if not mel.size or mel.size % self.mels:
            raise InputError(f"hifigan: input must hold frames of {self.mels} values, but has {mel.size} values.")
        return mel.view(np.int32).astype(np.int64)

    async def decode(self, encoded: Any, **_: Any) -> str:
        raise NotImplementedError("hifigan: answers with sound, not with text.")

    async def new_context(self, request: OpenResponsesRequest) -> AudioContext:
        """Returns the part of a request that the executor gets: `input` arrives as lyrics."""
        options = request.body.provider_options.audio
        bits = await self.encode((options and options.lyrics) or "")
        return AudioContext(
            request_id=request.request_id,
            model_name=request.body.model,
            tokens=TokenBuffer(array=bits),
            audio_duration=0.0,
            num_inference_steps=1,
        )


@dataclass(frozen=True)
class Mel(TensorStruct):
    """The input of the graph: (1, frames, mels)."""

    mel: Tensor


class HifiGan(PipelineExecutor[AudioContext, Mel, AudioExecutorOutputs]):
    """Compiles the network in MAX's session, with packed filters, and runs one request at a time."""

    def __init__(self, manifest: Any, session: InferenceSession, runtime_config: Any) -> None:
        vocoder = manifest["vocoder"]
        self.config = config_of(manifest)
        (path,) = vocoder.resolved_weight_paths(_resolve_component_encoding_and_weights(vocoder)[1])
        weights = hifigan.load_weights(path, self.config)
        self.device = load_devices(vocoder.device_specs)[0]
        graph = hifigan.build(self.config, weights, DeviceRef.from_device(self.device))
        self.weights = registry(graph, weights)  # MAX borrows their memory
        self.model = session.load(graph, weights_registry=self.weights)

    @property
    def sample_rate(self) -> int:
        return self.config.rate

    def prepare_inputs(self, contexts: list[AudioContext]) -> Mel:
        """Returns the spectrogram of the one request."""
        (context,) = contexts
        bits = np.asarray(context.tokens.all, np.int64).astype(np.int32)
        return Mel(Tensor.from_dlpack(bits.view(np.float32).reshape(1, -1, self.config.mels)).to(self.device))

    def execute(self, inputs: Mel) -> AudioExecutorOutputs:
        """Returns the sound, (1, 1, samples), -1 to 1."""
        (sound,) = self.model.execute(inputs.mel.driver_tensor)
        return AudioExecutorOutputs(waveform=Tensor.from_dlpack(sound.to_numpy()[:, None]))


@dataclass(kw_only=True)
class HifiGanConfig(ArchConfig):
    """The configuration that MAX requires of an architecture. A vocoder has no sequence length to limit."""

    DEFAULT_ENCODING: ClassVar[Any] = "float32"
    SUPPORTED_ENCODINGS: ClassVar[set[Any]] = {"float32"}

    pipeline_config: Any
    quantization_encoding: Any = None

    def get_max_seq_len(self) -> int:
        return LONGEST

    @classmethod
    def calculate_max_seq_len(cls, huggingface_config: Any, model_config: Any) -> int:
        return LONGEST

    @classmethod
    def initialize(cls, pipeline_config: Any, model_config: Any = None, *, max_seq_len: int) -> "HifiGanConfig":
        return cls(pipeline_config=pipeline_config)


ARCHITECTURES = [
    SupportedArchitecture(
        name="MaxConvHifiGan",
        task=PipelineTask.AUDIO_GENERATION,
        default_encoding=HifiGanConfig.DEFAULT_ENCODING,
        supported_encodings=HifiGanConfig.SUPPORTED_ENCODINGS,
        example_repo_ids=[],
        pipeline_model=HifiGan,
        context_type=AudioContext,
        default_weights_format=WeightsFormat.safetensors,
        tokenizer=MelTokenizer,
        config=HifiGanConfig,
    )
]
