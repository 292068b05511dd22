"""Every network of the gallery has a task, and runs according to its description."""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from max_conv.graphs import univnet, wav2vec2

from max_conv.cli.main import main
from max_conv.cli.run import NETWORKS
from max_conv.serving import Network, Task, config_of, gallery, graph_file, open_network, warm_network
from max_conv.streaming import streaming


@pytest.mark.parametrize("name", gallery())
def test_every_network_has_a_task(name: str) -> None:
    module = graph_file(name)
    task, config = module.TASK, module.Config()
    assert name.replace("_", "-") in NETWORKS[task.kind]
    assert task.input == "sound" or getattr(config, task.input) > 0
    assert task.kind not in ("speech", "pitch", "vocoder", "codec") or config.rate >= 8000
    assert list(inspect.signature(task.run).parameters)[:3][2] == "config"
    assert {*task.options} == {*inspect.signature(task.run).parameters} - {
        "model",
        "audio",
        "signal",
        "mels",
        "x",
        "config",
    }


def test_the_commands_know_every_network() -> None:
    known = sorted(name for names in NETWORKS.values() for name in names)
    assert known == sorted(name.replace("_", "-") for name in gallery())
    help = CliRunner().invoke(main, ["compile", "--help"]).stdout
    assert all(name in help for name in [*known, "conv1d"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["run", "pitch", "a.wav", "--network", "pesto", "--capacity", "full"],
            "pitch: pesto has no option 'capacity'.",
        ),
        (["run", "pitch", "a.wav", "--capacity", "huge"], "crepe: "),
        (["run", "vocoder", "a.npy", "b.wav", "--network", "hifigan"], "hifigan comes without weights; pass"),
        (["run", "vocoder", "a.npy", "b.wav", "--network", "hifigan", "--config", "a.npy"], "a.npy is not JSON"),
        (["run", "features", "a.wav", "b.wav", "--network", "whisper"], "run: b.wav must end in .npy."),
        (["compile", "crepe", "x", "--config", "c.json"], "crepe has no config.json; leave it out."),
        (["compile", "crepe", "x", "--config", "c.json", "--capacity", "full"], "crepe: pass --config or --capacity,"),
        (
            ["compile", "hifigan", "x", "--config", "c.json"],
            "hifigan: the config lacks 'upsample_initial_channel'; pass",
        ),
        (["compile", "hifigan", "x"], "hifigan comes without weights; pass"),
    ],
)
def test_refuses_in_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import soundfile

    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", np.zeros(8000), 16000)
    np.save("a.npy", np.zeros((4, 80)))
    Path("c.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(main, arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("max-conv: ")]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith(f"max-conv: {sentence}"), result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_networks_of_another_kind_are_no_choice() -> None:
    for name in ("dac", "ddsp"):
        result = CliRunner().invoke(main, ["run", "pitch", "a.wav", "--network", name])
        assert result.exit_code == 2 and f"{name!r} is not one of 'crepe', 'pesto'." in result.stderr


def test_inputs_are_checked() -> None:
    task, config = graph_file("hifigan").TASK, graph_file("hifigan").Config()
    assert task.check("mels", np.zeros((5, 80)), config).shape == (1, 5, 80)
    assert task.check("mels", np.zeros((2, 5, 80), np.float16), config).dtype == np.float32
    for wrong in (np.zeros((80, 5)), np.zeros(80), np.zeros((5, 80), int), np.zeros((1, 1, 5, 80))):
        with pytest.raises(ValueError, match=r"^mels must hold floating point of shape \(length, 80\), or"):
            task.check("mels", wrong, config)
    assert graph_file("dac").TASK.check("sound", np.zeros(9), None).shape == (1, 9)


def test_options_are_checked() -> None:
    network = Network("net", Task("features", "sound", "nothing"), None, lambda x: x)  # type: ignore[arg-type]
    assert network.run(np.ones(3)).tolist() == [1, 1, 1]
    with pytest.raises(TypeError, match=r"net: there is no option 'decoder'; the options are none\."):
        network.run(np.ones(3), decoder="argmax")


def test_univnet_makes_its_noise() -> None:
    given: list[Any] = []
    config = config_of("univnet")
    mels = np.zeros((2, 5, config.mels), np.float32)
    for seed in (0, 0, 1):
        univnet.speak(lambda *inputs: given.append(inputs), mels, config, seed=seed)
    noises = [noise for _, noise in given]
    assert noises[0].shape == (2, 5, 64) and noises[0].dtype == np.float32 and abs(noises[0].std() - 1) < 0.2
    assert np.array_equal(noises[0], noises[1]) and not np.array_equal(noises[0], noises[2])


def test_wav2vec2_normalises_as_transformers() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    sound = np.random.default_rng(0).standard_normal((2, 900)).astype(np.float32) * 0.01 + 0.5
    seen = wav2vec2.hear(lambda x: x, sound)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    want = extractor(list(sound), sampling_rate=16000, return_tensors="np")["input_values"]
    np.testing.assert_allclose(seen, want, atol=1e-4)


def test_from_a_saved_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded or compiled, and `step` is called with each step."""
    steps = []

    class Step:
        def __init__(self, what: str) -> None:
            steps.append(what)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    with pytest.raises(FileNotFoundError):
        open_network("pesto", saved=tmp_path / "gone.maxconv", step=Step)
    assert steps == [f"loading {tmp_path / 'gone.maxconv'}"]


def test_features_of_an_array(tmp_path: Path) -> None:
    from max_conv.graphs import tcn
    from safetensors.numpy import save_file

    published = {"num_inputs": 6, "num_channels": [4], "kernel_size": 3, "output_projection": 5}
    published |= {"use_gate": True, "use_skip_connections": True}
    config = tcn.Config.from_dict(published)
    state = {name: np.ones(shape, np.float32) / 8 for name, shape in config.shapes().items()}
    save_file({name: np.ascontiguousarray(value.T) for name, value in state.items()}, tmp_path / "w.safetensors")
    (tmp_path / "c.json").write_text(json.dumps(published))
    np.save(tmp_path / "x.npy", np.ones((9, 6)))
    source = ["--weights", str(tmp_path / "w.safetensors"), "--config", str(tmp_path / "c.json")]
    arguments = ["run", "features", str(tmp_path / "x.npy"), str(tmp_path / "y.npy"), "--network", "tcn", *source]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    made = np.load(tmp_path / "y.npy")
    assert facts["shape"] == list(made.shape) == [1, 9, 5] and np.isfinite(made).all() and np.ptp(made) > 0
    assert (tmp_path / "y.npy").stat().st_mode == (tmp_path / "x.npy").stat().st_mode
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2 and "exists already" in again.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "w.safetensors", "x.npy", "y.npy"]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", ["silero_vad", "crepe", "pesto", "tcn"])
def test_a_warm_network_is_the_one_that_is_opened(name: str, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled graphs are found by a digest, which must not depend on the weights. Nothing is compiled."""
    from max_conv.runtime.compiled import key_of

    keys = []
    monkeypatch.setattr("max_conv.runtime.compile", lambda graph, **_: keys.append(key_of(graph)))
    warm_network(name, live=live)
    module = graph_file(name)
    if name == "tcn":
        random = np.random.default_rng(0)
        weights = {key: random.random(shape, np.float32) for key, shape in module.Config().shapes().items()}
    else:
        weights = module.load_weights()
    build = functools.partial(streaming, module.build) if live else module.build
    assert keys == [key_of(build(module.Config(), weights))]


def test_warm_networks_that_are_refused() -> None:
    with pytest.raises(ValueError, match="silero_vad: has no ragged form"):
        warm_network("silero_vad", ragged=True)
    with pytest.raises(ValueError, match="there is no model 'x'"):
        warm_network("x")
