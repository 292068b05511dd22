"""The gated temporal network against pytorch-tcn's own package."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from max_conv.graphs import tcn

from max_conv.weights.convert import to_native
from originals import arrays, compare, enliven, from_wheel

WHEEL = "pypi://pytorch-tcn==1.2.3/{}#sha256=949dd478c7a7c04e2ba0d79e19afe4a34f083141ef908019d19e9edd729ea2ec"
ARGUMENTS = {
    "num_inputs": 80,
    "num_channels": [128, 128, 256, 256],
    "kernel_size": 4,
    "dilations": [1, 3, 9, 27],
    "use_gate": True,
    "use_skip_connections": True,
    "output_projection": 30,
}
CONFIG = tcn.Config.from_dict(ARGUMENTS)


@pytest.fixture(scope="module")
def network() -> Any:
    *_, module = from_wheel(WHEEL, "pytorch_tcn", ["buffer", "pad", "conv", "tcn"])
    torch.manual_seed(0)
    return enliven(module.TCN(**ARGUMENTS))


@pytest.fixture(scope="module")
def model(network: Any, started: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    path = tmp_path_factory.mktemp("tcn") / "tcn.pt"
    torch.save(network.state_dict(), path)
    weights = tcn.load_weights(path, CONFIG)
    return started(tcn.build(CONFIG, weights), weights)


def test_is_the_original(network: Any, model: Callable[..., Any]) -> None:
    for batch, length in ((1, 500), (3, 40), (2, 1)):
        x = torch.randn(batch, 80, length, generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            want = network(x)
        compare(model(x.transpose(1, 2).numpy()), want.transpose(1, 2))


def test_no_output_sees_what_comes_after_it(model: Callable[..., Any]) -> None:
    x = np.random.default_rng(0).standard_normal((1, 200, 80)).astype(np.float32)
    changed = x.copy()
    changed[:, 120] += 1
    before, after = model(x), model(changed)
    # Some kernels share products between neighbouring outputs, which rounds differently.
    np.testing.assert_allclose(before[:, :120], after[:, :120], rtol=0, atol=1e-5)
    assert np.abs(before[:, 120] - after[:, 120]).max() > 0.01


def test_both_spellings_of_weight_norm(network: Any) -> None:
    state = arrays(network)
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): array
        for name, array in state.items()
    }
    assert old.keys() != state.keys()
    first, second = (to_native(names, tcn.LAYERS, "tcn") for names in (state, old))
    assert {name: array.shape for name, array in first.items()} == CONFIG.shapes()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"causal": False}, "causal must be True, but is False."),
        ({"use_gate": False}, "use_gate must be True, but is False."),
        ({"use_norm": "batch_norm"}, "use_norm must be 'weight_norm', but is 'batch_norm'."),
        ({"dilations": [1, 2]}, "4 blocks need as many dilations, but got (1, 2)."),
    ],
)
def test_other_networks_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        tcn.Config.from_dict(ARGUMENTS | change)
    assert str(caught.value) == f"tcn: {sentence}"
