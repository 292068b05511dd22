"""Options of the test suite."""

import pytest

DEFAULT = 20_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--configurations",
        type=int,
        default=DEFAULT,
        help="How many random layers the property tests compare with the reference (a long run: 1000000).",
    )
