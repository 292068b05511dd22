"""The tasks of the gallery's networks, and one class that runs any of them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .networks import graph_file

if TYPE_CHECKING:
    from ..runtime import Model

Kind = Literal["speech", "pitch", "vocoder", "codec", "features"]
SOUND = "sound"


def call(model: Callable[..., Any], signal: np.ndarray, config: Any) -> Any:
    """Runs a network whose graph does all the work: the input array goes in, the output array comes out."""
    return model(signal)


def alone(piece: np.ndarray, config: Any, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Returns the inputs of a live network that has one input."""
    return (piece,)


@dataclass(frozen=True)
class Task:
    """The task of a network: how it uses a signal. Each file of the gallery has one, `TASK`.

    Attributes:
        kind: "speech" finds speech, "pitch" follows a pitch, "vocoder" makes sound from a spectrogram, "codec" codes
            and decodes sound, "features" makes vectors.
        input: "sound": float32 samples of shape (batch, samples), or (samples,) for speech and pitch, at `config.rate`.
            Otherwise the name of the config's field with the number of values per position: float32 of shape
            (batch, length, values).
        output: A description of the result of `run`, with its shape.
        run: Computes the output: `run(model, signal, config, **options)`.
        options: The names of the options of `run`.
        state: For networks that are called chunk by chunk: the state before the first chunk, `state(batch, config)`.
        inputs: For a live network with several inputs: `inputs(piece, config, random)` returns a piece of each input for a
            piece of the input that `input` describes.
    """

    kind: Kind
    input: str
    output: str
    run: Callable[..., Any] = call
    options: tuple[str, ...] = ()
    state: Callable[..., np.ndarray] | None = None
    inputs: Callable[..., tuple[np.ndarray, ...]] = alone

    def check(self, name: str, values: np.ndarray, config: Any) -> np.ndarray:
        """Returns the input as float32 with a batch axis, or raises ValueError if it has another shape or dtype.

        Args:
            name: A name for the values or their source, for the error message.
            values: (length, values) or (batch, length, values); for sound (samples,) or (batch, samples).
            config: The network's config.
        """
        own = (getattr(config, self.input),) if self.input != SOUND else ()
        floating = np.issubdtype(values.dtype, np.floating)
        if (
            values.ndim not in (1 + len(own), 2 + len(own))
            or values.shape[values.ndim - len(own) :] != own
            or not floating
        ):
            what = f"(length, {own[0]})" if own else "(samples,)"
            raise ValueError(
                f"{name} must hold floating point of shape {what}, or (batch, ...) of that, but holds {values.dtype} of "
                f"shape {values.shape}."
            )
        return np.ascontiguousarray(values if values.ndim == 2 + len(own) else values[None], np.float32)


@dataclass(frozen=True)
class Network:
    """A network of the gallery, compiled. Made by `open_network`; safe to call from several threads.

    Attributes:
        name: Its file in the gallery.
        task: Its task.
        config: Its sizes; `config.rate` is the samples per second of the sound that it reads or makes.
        model: The compiled graph.
    """

    name: str
    task: Task
    config: Any
    model: "Model"

    def run(self, signal: np.ndarray, **options: Any) -> Any:
        """Does the task. `task.input` describes the signal, `task.output` the result.

        Raises:
            TypeError: For an option that the network does not have.
        """
        for name in options:
            if name not in self.task.options:
                known = ", ".join(self.task.options) or "none"
                raise TypeError(f"{self.name}: there is no option {name!r}; the options are {known}.")
        return self.task.run(self.model, signal, self.config, **options)


def config_of(name: str, published: Mapping[str, Any] | None = None, **sizes: Any) -> Any:
    """Returns the config of a network: from the published config.json, or its defaults with `sizes` changed.

    Raises:
        TypeError: If the config has no such size.
        ValueError: If the published config belongs to another model, or there is no network of that name.
    """
    module = graph_file(name)
    known = [field.name for field in fields(module.Config)]
    if unknown := [size for size in sizes if size not in known]:
        raise TypeError(f"{module.TASK.kind}: {name} has no option {unknown[0]!r}.")
    if published is None:
        return module.Config(**sizes)
    if not hasattr(module.Config, "from_dict"):
        raise ValueError(f"{name} has no config.json; leave it out.")
    try:
        return module.Config.from_dict(published)
    except KeyError as error:
        raise ValueError(f"{name}: the config lacks {error}; pass the model's own config.json.") from None


def open_network(
    name: str,
    config: Any = None,
    *,
    weights: str | Path | None = None,
    saved: str | Path | None = None,
    exact: bool = False,
    live: bool = False,
    ragged: bool = False,
    step: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Network:
    """Returns a network ready to run: read from a saved model, or compiled with the weights of a reference.

    Args:
        name: Its file in the gallery, such as "silero-vad".
        config: Its sizes; None means the published ones.
        weights: A reference for the network's `load_weights`; None means the weights that come with it, if any.
        saved: A file that `Model.save` wrote for this network and config. Then nothing is compiled.
        exact: As in `max_conv.conv1d`.
        live: Whether the network gets its signals chunk by chunk: then use `model.stream()`.
        ragged: Whether a batch has signals of different length, with their `lengths` as one more input: for `max-conv serve`.
        step: Called with a description of each step; returns a context manager, in which the step runs.

    Raises:
        ValueError: If there is no such network, or the weights do not fit.

    >>> network = open_network("silero_vad")
    >>> network.run(np.zeros(16000, np.float32)).shape
    (32,)
    """
    from ..runtime import compile, load

    module, file = graph_file(name), name.replace("-", "_")
    config = module.Config() if config is None else config
    if saved:
        with step(f"loading {saved}"):
            model = load(saved)
        if (other := model.facts.get("network", file)) != file:
            raise ValueError(f"{name}: {saved} is a model of {other}; pass one that `max-conv compile {name}` wrote.")
        if model.facts.get("ragged", False) != ragged:
            raise ValueError(
                f"{name}: {saved} is {'not ' if ragged else ''}a ragged model, which `max-conv serve` runs."
            )
        if live != (model.timing is not None):
            raise ValueError(
                f"{name}: {saved} is {'not ' if live else ''}a live model; compile it with{'' if live else 'out'} --live."
            )
        return Network(name, module.TASK, config, model)
    builder = _builder(name, live, ragged)
    if weights is None and signature(module.load_weights).parameters["reference"].default is Parameter.empty:
        raise ValueError(f"{name} comes without weights; pass a checkpoint's, such as hf://ORG/REPO/FILE.")
    with step("fetching the weights"):
        state = module.load_weights(*([weights] if weights else []), config=config)
    with step("compiling"):
        model = compile(builder(config, state, exact=exact), weights=state)
    model.facts |= ({"ragged": True} if ragged else {}) | {
        "network": file,
        "kind": module.TASK.kind,
        "rate": getattr(config, "rate", 0),
    }
    return Network(name, module.TASK, config, model)


def _builder(name: str, live: bool, ragged: bool) -> Callable[..., Any]:
    """Returns the function that builds a network's graph: whole, live or ragged."""
    from ..streaming import streaming

    build = graph_file(name).build
    if ragged and (live or "ragged" not in signature(build).parameters):
        raise ValueError(f"{name}: {'live models need no --ragged' if live else 'has no ragged form'}; leave it out.")
    return partial(streaming, build) if live else partial(build, ragged=True) if ragged else build


def warm_network(name: str, *, live: bool = False, ragged: bool = False) -> None:
    """Compiles a network of the published sizes into this machine's cache, so that `open_network` finds it there.

    No weights are needed: a compiled graph has none.

    Args:
        name, live, ragged: As for `open_network`.

    Raises:
        ValueError: If there is no such network, or it has no such form.
    """
    from ..runtime import compile

    config = graph_file(name).Config()
    weights = {key: np.zeros(shape, np.float32) for key, shape in config.shapes().items()}
    compile(_builder(name, live, ragged)(config, weights), weights=weights)
