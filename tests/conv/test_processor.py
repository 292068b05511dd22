"""The facts about this machine's processor, and the processor that MAX compiles for."""

import pytest

from max_conv.conv import processor


def test_a_processor_with_everything_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cpu_features", lambda: processor.SAPPHIRE_RAPIDS | {"sse2"})
    assert processor.cpu_target() == "sapphirerapids" and processor.has_pairs()


@pytest.mark.parametrize("missing", sorted(processor.SAPPHIRE_RAPIDS))
def test_compiled_code_needs_every_extension(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cpu_features", lambda: processor.SAPPHIRE_RAPIDS - {missing})
    assert processor.cpu_target() == ""


def test_tiles_need_the_processor_and_its_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for features in ({"avx512_bf16"}, {"amx_tile", "amx_bf16"}):
        monkeypatch.setattr(processor, "cpu_features", lambda features=features: frozenset(features))
        processor.has_tiles.cache_clear()
        assert not processor.has_tiles()
    monkeypatch.undo()
    processor.has_tiles.cache_clear()
