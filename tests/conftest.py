"""Options of the test suite."""

import pytest

DEFAULT = 10_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--configurations",
        type=int,
        default=DEFAULT,
        help="How many random layers the property tests compare with the reference (a long run: 1000000).",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the longest files first, so that no worker has one of them left at the end."""
    items.sort(key=lambda item: "property" not in item.path.name)
