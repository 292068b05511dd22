"""Options of the test suite, and a report of its compiles."""

import functools
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DAILY, DEFAULT = 5_000, 20_000
"""Random layers of a daily run, and of one with `--all`: up to there they are the same in every run."""
NOWHERE = Path(__file__) / "tuned"
"""The folder of measured choices, which does not exist: layers get their usual kernels, even if this machine's user has measured others."""
BUDGET = 38
"""Compiles of one run of all tests; more fail it. The fixture `models` says what one takes."""
CACHED = 4.0
"""Seconds up to which MAX has read a graph from its own cache."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--configurations",
        type=int,
        help=f"How many random layers the property tests compare with the reference: {DAILY}, or {DEFAULT} with --all.",
    )
    parser.addoption("--all", action="store_true", help="Runs the tests marked nightly, too.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Starts the longest files first, so that no worker has one of them left at the end.

    The property tests come before all others, which use the kernels that they compile.
    """

    def place(item: pytest.Item) -> tuple[bool, ...]:
        return "property" not in item.path.name, item.path.parent.name != "graphs", not has_graphs(item.path)

    items.sort(key=place)
    if not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="nightly: runs with --all"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each file to one worker, and all files of a folder that have `graphs` to the same one: they share a compile."""
    from xdist.scheduler import LoadFileScheduling

    scheduling = LoadFileScheduling(config, log)
    file_of = scheduling._split_scope

    def scope_of(test: str) -> str:
        file = file_of(test)
        path = config.rootpath / file
        return f"graphs of {path.parent}" if has_graphs(path) else file

    scheduling._split_scope = scope_of
    return scheduling


@functools.cache
def has_graphs(file: Path) -> bool:
    """Returns whether a test file has a function `graphs`; see the fixture `models`."""
    return "\ndef graphs() -> " in file.read_text()


@pytest.fixture(scope="session")
def compiled_graphs(request: pytest.FixtureRequest) -> Callable[[Path], dict[tuple[Path, str], Any]]:
    """A function that compiles the graphs of all selected test files of a folder; it returns them by file and name."""
    from harness import compile_together

    @functools.cache
    def compile(folder: Path) -> dict[tuple[Path, str], Any]:
        files = {
            test.path: test.module
            for test in request.session.items
            if isinstance(test, pytest.Function)
            and test.path.parent == folder
            and has_graphs(test.path)
            and "models" in test.fixturenames
            and not test.get_closest_marker("skip")
        }
        graphs = {(file, name): graph for file, module in files.items() for name, graph in module.graphs().items()}
        return dict(zip(graphs, compile_together(*graphs.values()), strict=True))

    return compile


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, compiled_graphs: Callable[..., Any]) -> dict[str, Any]:
    """The compiled graphs of a test file, by name.

    The file's function `graphs` returns each graph with its weights, by name. A compile takes 15 s and 0.3 s for each
    operation in it, so all files of a folder have theirs compiled together.
    """
    models = compiled_graphs(request.path.parent)
    return {name: model for (file, name), model in models.items() if file == request.path}


def pytest_configure(config: pytest.Config) -> None:
    importlib.import_module("max_conv.conv.max_nn")  # before a test imports max.nn in two workers at once
    pytest.MonkeyPatch().setattr("max_conv.conv.tuned.folder", lambda: NOWHERE)
    config.pluginmanager.register(Compiles())
    if config.option.configurations is None:
        config.option.configurations = DEFAULT if config.option.all else DAILY


class Compiles:
    """Notes every compile at the test that asks for it, and reports all of them where the results come together."""

    def __init__(self) -> None:
        self.compiled: list[tuple[float, str]] = []
        self.item: pytest.Item | None = None

    def pytest_collection_finish(self) -> None:
        from max.engine import InferenceSession

        from max_conv.runtime import compiler

        patch = pytest.MonkeyPatch()
        patch.setattr(compiler, "OPERATIONS", 0)  # two workers share two cores: what counts is CPU time
        for place, name in ((InferenceSession, "compile"), (compiler, "with_one_thread")):
            patch.setattr(place, name, self.timed(getattr(place, name)))

    def timed(self, compile: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compile)
        def compile_and_note(*given: Any, **options: Any) -> Any:
            start = time.monotonic()
            result = compile(*given, **options)
            if self.item is not None and (seconds := time.monotonic() - start) > CACHED:
                self.item.user_properties.append(("compile", seconds))
            return result

        return compile_and_note

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self.item = item

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            found = [value for name, value in report.user_properties if name == "compile"]
            self.compiled += [(value, report.nodeid) for value in found if isinstance(value, float)]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if len(self.compiled) > BUDGET and not hasattr(session.config, "workerinput"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        seconds = sum(second for second, _ in self.compiled)
        over = f", MORE THAN THE {BUDGET} ALLOWED" if len(self.compiled) > BUDGET else ""
        terminalreporter.section(f"{len(self.compiled)} compiles{over}: {seconds:.0f} s; the longest:")
        for second, test in sorted(self.compiled, reverse=True)[:15]:
            terminalreporter.write_line(f"{second:.1f} s {test}")
