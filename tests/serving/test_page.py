"""Tests the server's page: the text of its file, and the page in a headless Chromium. NumPy functions replace the models."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
import wave
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from websockets.sync.client import connect

import max_conv.serving
from max_conv.conv.geometry import Geometry
from max_conv.conv.lines import Line
from max_conv.runtime.ports import Port, live_array
from max_conv.serving.asgi import app
from max_conv.serving.limits import Limited
from max_conv.serving.metrics import Metrics
from max_conv.serving.server import MESSAGE, listen
from max_conv.streaming import Stream, Timing
from max_conv.streaming.timing import Signal

PAGE = (Path(max_conv.serving.__file__).parent / "page.html").read_text()
SCRIPT = PAGE[PAGE.index("<script>") : PAGE.index("</script>")]
RATE, TICK, HOP = 16000, 512, 320
WAIT = 60.0
"""Seconds for an action that needs a moment: the machine may be busy."""
CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


class Stand:
    """Replaces `Model`."""

    def __init__(self, run: Callable[..., Any], inputs: list[Port], outputs: list[Port], timing: Timing | None = None):
        self.run, self.inputs, self.outputs, self.timing = run, tuple(inputs), tuple(outputs), timing
        self.facts: dict[str, Any] = {}

    def __call__(self, *arrays: np.ndarray) -> Any:
        return self.run(*arrays)

    def stream(self, batch: int) -> Stream:
        timing = self.timing
        assert timing is not None
        chunks = [live_array(port, axis, timing.tick) for port, axis in zip(self.inputs, timing.axes)]
        results = [live_array(port, signal.axis) for port, signal in zip(self.outputs, timing.outputs)]
        return Stream(self.run, timing, chunks, results, batch)


def port(name: str, *shape: int | str) -> Port:
    return Port(name, "float32", ("batch", *shape))


def loudness(x: np.ndarray) -> np.ndarray:
    """Returns 1 where sound is loud, 0 where it is not, along the last axis."""
    return np.minimum(1, 4 * np.sqrt(np.square(x).mean(axis=-1))).astype(np.float32)


def hears(x: np.ndarray, ticks: np.ndarray, ends: np.ndarray, state: np.ndarray) -> list[np.ndarray]:
    return [loudness(x), state]


def repeats(x: np.ndarray, ticks: np.ndarray, ends: np.ndarray, state: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(x.reshape(len(x), -1) / 2), state]


def refuses(x: np.ndarray) -> np.ndarray:
    raise ValueError("conv1d: the signal is not <b>nice</b>.")


def vectors(x: np.ndarray) -> np.ndarray:
    frames = x[:, : x.shape[1] // HOP * HOP].reshape(len(x), -1, HOP)
    return np.ascontiguousarray(np.abs(np.fft.rfft(frames))[..., :24].astype(np.float32))


def timing(tick: int, line: Line) -> Timing:
    return Timing(tick, 1, (1,), (Signal(1, line),), 8, None, tick, rate=RATE)


def models() -> dict[str, Any]:
    heard = timing(TICK, Line(TICK).through(Geometry.of(TICK, stride=TICK)))
    state = port("state", 2)
    return {
        "speech": Stand(hears, [port("sound", "ticks", TICK)], [port("probability", "positions")], heard),
        "codec": Stand(repeats, [port("sound", "ticks", HOP)], [port("coded", "positions")], timing(HOP, Line(HOP))),
        "chunks": Stand(
            lambda x, state: (loudness(x), state),
            [port("chunks", "time", TICK), state],
            [port("probability", "time"), state],
        ),
        "vectors": Stand(vectors, [port("samples", "length")], [port("vectors", f"length // {HOP}", 24)]),
        "vocoder": Stand(
            lambda x: np.repeat(x[:, :, 0], 256, axis=1), [port("mels", "time", 80)], [port("sound", "time * 256")]
        ),
        "refuses": Stand(refuses, [port("samples", "length")], [port("y", "length")]),
    }


@contextlib.contextmanager
def served(**limits: Any) -> Iterator[str]:
    """Serves the replaced models; returns the address."""
    config = uvicorn.Config(
        app(models(), **limits), http=Limited, ws="websockets-sansio", ws_max_size=MESSAGE, log_config=None
    )
    server, listener = uvicorn.Server(config), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(WAIT)
        listener.close()


def until(done: Callable[[], Any], what: Callable[[], Any] = lambda: "the server") -> Any:
    end = time.monotonic() + WAIT
    while not (found := done()):
        assert time.monotonic() < end, what()
        time.sleep(0.05)
    return found


class Browser:
    """A headless Chromium, driven by the DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM
        self._open = contextlib.ExitStack()
        flags = "--headless=new --no-sandbox --disable-gpu --mute-audio --no-first-run --remote-debugging-port=0"
        flags += " --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
        flags += " --autoplay-policy=no-user-gesture-required --window-size=1280,900"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(
            [CHROMIUM, *flags.split(), f"--user-data-dir={folder}", "about:blank"], **quiet
        )  # type: ignore[call-overload]
        try:
            told = folder / "DevToolsActivePort"
            until(lambda: told.exists() and "/" in told.read_text(), lambda: "Chromium does not start")
            with urllib.request.urlopen(f"http://127.0.0.1:{told.read_text().split()[0]}/json", timeout=WAIT) as answer:
                page = next(page for page in json.load(answer) if page["type"] == "page")
            self._socket = self._open.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))
            self._numbers, self.events = itertools.count(1), list[dict[str, Any]]()
            for domain in ("Page", "Runtime", "Network", "DOM", "Accessibility"):
                self.command(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._open.close()
        self._process.terminate()
        try:
            self._process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def command(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self._socket.recv(timeout=WAIT))).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def js(self, expression: str) -> Any:
        result = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str) -> Any:
        return until(lambda: self.js(expression), lambda: (expression, self.js("document.body.innerText")))

    def open(self, address: str) -> None:
        self.command("Page.navigate", url=address)
        self.until(f"location.href === '{address}' && document.readyState === 'complete'")

    def choose(self, model: str) -> None:
        self.until(f"!!document.querySelector('[data-model={model}]')")
        self.js(f"document.querySelector('[data-model={model}] button').click()")

    def give(self, path: Path) -> None:
        root = self.command("DOM.getDocument")["root"]["nodeId"]
        node = self.command("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.command("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def text(self, name: str) -> str:
        """Waits for text in an element that had none, and returns it."""
        return str(self.until(f"$('{name}').checkVisibility() && $('{name}').textContent"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser; in the end nothing has failed in it, and it has asked nobody else for anything."""
    chromium = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield chromium
        chromium.js("0")
        failed = [event for event in chromium.events if event["method"] == "Runtime.exceptionThrown"]
        asked = [e["params"]["request"]["url"] for e in chromium.events if e["method"] == "Network.requestWillBeSent"]
    finally:
        chromium.close()
    assert not failed
    assert asked
    assert not [url for url in asked if not re.match(r"(http://127\.0\.0\.1:\d+/|blob:|data:|about:)", url)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as url:
        yield url


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A second of silence and a second of a tone, at 48 kHz in stereo; its channels differ."""
    tone = np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    both = np.concatenate([np.zeros((48000, 2)), np.stack([tone, 0.5 * tone], axis=1)])
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 48000, len(both), "NONE", ""))
        file.writeframes((both * 32767).astype("<i2").tobytes())
    return path


class Tags(HTMLParser):
    """Reads a page; notes the open elements, and every tag."""

    VOID = ("meta", "link", "input", "path", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag, f"</{tag}> closes another tag at {self.getpos()}"


@pytest.fixture(scope="module")
def tags() -> list[tuple[str, dict[str, str | None]]]:
    reader = Tags()
    reader.feed(PAGE)
    reader.close()
    assert reader.open == []
    return reader.tags


def test_the_page_loads_nothing_from_elsewhere(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    assert not re.findall(r"(https?|wss?)://|@import|url\(|\bimport\b", PAGE)
    assert not [
        value for _, own in tags for name, value in own.items() if name in ("src", "href") and value != "data:,"
    ]
    assert next(own["content"] for tag, own in tags if tag == "meta" and "http-equiv" in own).startswith(  # type: ignore[union-attr]
        "default-src 'none'"
    )


def test_ids_and_labels(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    ids = [own["id"] for _, own in tags if "id" in own]
    assert len(ids) == len(set(ids))
    assert {own["for"] for tag, own in tags if tag == "label"} == {
        own["id"] for tag, own in tags if tag in ("input", "select")
    }
    assert set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT)) - {"play"} <= set(ids)
    assert ("html", {"lang": "en"}) in tags


def test_routes_and_metrics_exist() -> None:
    application: Any = app(models())
    assert isinstance(application, Starlette)
    routes = {getattr(route, "path", "") for route in application.routes}
    model = "/v2/models/{model}"
    asked = {f"/{name}" for name in re.findall(r'call\("([\w/]+)"', SCRIPT)}
    asked |= {model + route for route in re.findall(r'path\(m?\.?name(?:, "(/\w+)")?\)', SCRIPT)}
    assert asked == {"/metrics", "/v2/repository/index", model, f"{model}/infer", f"{model}/stream"}
    assert asked <= routes
    metrics = Metrics()
    own = metrics.of("m")
    own.answered(200, 0.1)
    own.watch(lambda: 0, lambda: 0)
    known = set(re.findall(r"^\w+", metrics.text()[0].decode(), re.MULTILINE))
    read = set(re.findall(r'"(max_conv_\w+)"', SCRIPT))
    assert len(read) >= 6
    assert {name for name in read if name not in known} <= {"max_conv_queue_seconds", "max_conv_batch_rows"}
    assert {f"{name}_sum" for name in ("max_conv_queue_seconds", "max_conv_batch_rows")} <= known


@pytest.mark.parametrize("number", [0, 1], ids=["light", "dark"])
def test_contrast(number: int) -> None:
    """WCAG's contrast of 4.5 for text, of all text colours on all background colours."""
    block = re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)[number]
    colours = dict(re.findall(r"--(\w+): #(\w+)", block))

    def light(name: str) -> float:
        value = colours[name] if len(colours[name]) == 6 else "".join(digit * 2 for digit in colours[name])
        parts = np.array([int(value[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    pairs = [
        *itertools.product(("ink", "soft", "green", "amber", "red"), ("back", "card")),
        ("blue", "card"),
        ("on", "blue"),
    ]
    for text, ground in pairs:
        low, high = sorted([light(text), light(ground)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@in_browser
def test_models_are_listed(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.until("$('models').children.length === 6 && $('state').className === 'good'")
    text = browser.js("document.querySelector('[data-model=speech]').innerText")
    for fact in (
        "speech live",
        "any, any",
        "FP32",
        "probability",
        "16,000 Hz",
        "512 positions, 32 ms",
        "UINT8",
        "waiting",
    ):
        assert fact in text.replace("\n", " ")
    assert "any, any, 512" in browser.js("document.querySelector('[data-model=chunks]').innerText")


@in_browser
@pytest.mark.parametrize("model", ["speech", "chunks"])
def test_the_probability_of_a_sound_is_drawn(browser: Browser, address: str, sound: Path, model: str) -> None:
    browser.open(address)
    browser.choose(model)
    browser.give(sound)
    told = browser.text("told")
    found = re.match(r"Over 0\.5 for ([\d.]+) of 2 s, in 1 stretch\. Answered in ", told)
    assert found, told
    assert float(found.group(1)) == pytest.approx(1, abs=0.05)
    assert browser.js("[...document.querySelectorAll('#rows span')].map(s => s.textContent).slice(0, 3)") == [
        "sound",
        "probability",
        "over 0.5",
    ]
    assert browser.js("document.querySelector('.curve').getAttribute('d').length") > 200
    assert browser.until("document.querySelector('#players audio').duration") == pytest.approx(2, abs=0.01)
    assert browser.js("$('rows').ariaLabel").startswith("Picture of the answer. Over 0.5")
    browser.until(f"/200: [1-9]/.test(document.querySelector('[data-model={model}]').innerText)")
    browser.until(f"document.querySelectorAll('[data-model={model}] .bars i:not([style*=\": 0%\"])').length")


@in_browser
def test_sound_that_comes_back_is_played(browser: Browser, address: str, sound: Path) -> None:
    browser.open(address)
    browser.choose("codec")
    browser.give(sound)
    assert browser.text("told").startswith("2 s of sound at 16,000 Hz.")
    players = "document.querySelectorAll('#players audio')"
    assert browser.until(f"{players}.length === 2 && {players}[1].duration") == pytest.approx(2, abs=0.01)
    browser.js(f"{players}[1].play()")
    browser.until(f"{players}[1].currentTime > 0.2 && !$('cursor').hidden")
    # Half of the mean of both channels, after a second of silence.
    peaks = browser.js("[0, 1].map(n => most(picture.values.slice((n + .1) * 16000, (n + .9) * 16000), 0))")
    assert peaks == pytest.approx([0, 0.375], abs=0.01)


@in_browser
def test_vectors_are_a_heat_map(browser: Browser, address: str, sound: Path) -> None:
    browser.open(address)
    browser.choose("vectors")
    browser.give(sound)
    assert browser.text("told").startswith("100 positions of 24 values")
    assert browser.until("document.querySelector('#rows image').getAttribute('href').length") > 100
    browser.js("$('view').value = 'curve'; $('view').onchange()")
    assert browser.text("told").startswith("100 values from 0 to")


@in_browser
def test_an_array_for_a_model_that_takes_no_sound(browser: Browser, address: str, tmp_path: Path) -> None:
    browser.open(address)
    browser.choose("vocoder")
    assert "(any, any, 80)" in browser.text("hint")
    assert not browser.js("$('mic').checkVisibility()")
    np.save(tmp_path / "mels.npy", np.full((125, 80), 0.25, np.float32))
    browser.give(tmp_path / "mels.npy")
    assert browser.text("told").startswith("2 s of sound at 16,000 Hz.")
    np.save(tmp_path / "other.npy", np.zeros((125, 80)))
    browser.give(tmp_path / "other.npy")
    assert browser.text("wrong") == "other.npy must hold float32 in C order."


@in_browser
def test_errors_are_shown_as_they_are(browser: Browser, address: str, sound: Path) -> None:
    browser.open(address)
    browser.choose("refuses")
    browser.give(sound)
    assert browser.text("wrong") == "conv1d: the signal is not <b>nice</b>."
    browser.js(
        "wrong(''); const data = new DataTransfer(); data.items.add(new File(['no sound'], 'no.wav'));"
        "$('zone').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true }))"
    )
    assert browser.text("wrong") == "This browser cannot read no.wav as sound."


@in_browser
@pytest.mark.parametrize("model", ["speech", "codec"])
def test_the_microphone_streams(browser: Browser, address: str, model: str) -> None:
    browser.open(address)
    browser.choose(model)
    browser.js("$('mic').click()")
    browser.until("/^Listening: [2-9]/.test($('told').textContent) && picture.values.length")
    assert (
        browser.until(
            f"(t => t === '1' && t)(document.querySelectorAll('[data-model={model}] .figures b')[1].textContent)"
        )
        == "1"
    )
    assert bool(browser.js("$('play')?.checked")) == (model == "codec")
    browser.js("$('mic').click()")
    browser.until("$('more').checkVisibility() && !listening")
    assert browser.js("$('wrong').textContent") == ""
    assert browser.text("told").startswith("Over 0.5 for" if model == "speech" else "")
    seconds, have = browser.js("[sent.heard.length / 16000, answers[0].values.length]")
    assert seconds > 1.5
    assert have == pytest.approx(seconds * 16000 / (TICK if model == "speech" else 1), abs=2 * TICK)
    browser.until(f"document.querySelectorAll('[data-model={model}] .figures b')[1].textContent === '0'")


@in_browser
def test_a_recording_for_a_model_that_is_not_live(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.choose("chunks")
    browser.js("$('mic').click()")
    browser.until("/^Recording: [1-9]/.test($('told').textContent)")
    browser.js("$('mic').click()")
    browser.until("$('told').textContent.startsWith('Over 0.5 for')")


@in_browser
def test_the_token(browser: Browser) -> None:
    def enter(token: str) -> None:
        browser.js(f"$('token').value = '{token}'; $('guard').requestSubmit()")

    with served(token="right") as address:
        browser.open(address)
        told = "the token is missing or wrong; send the header Authorization: Bearer TOKEN."
        assert browser.text("trouble") == told
        assert not browser.js("$('main').checkVisibility()")
        enter("wrong")
        assert browser.text("trouble") == told
        enter("right")
        browser.until("$('models').children.length === 6 && $('trouble').textContent === ''")
        browser.open(address)  # the token is kept
        browser.choose("speech")
        browser.js("$('mic').click()")
        browser.until("/^Listening: [1-9]/.test($('told').textContent)")
        browser.js("sessionStorage.setItem('token', 'wrong'); choose(); $('mic').click()")
        assert browser.text("wrong") == "The connection was refused. Is the token right?"
        browser.js("sessionStorage.clear()")


@in_browser
def test_every_control_has_a_name_and_fits_a_phone(browser: Browser, address: str, sound: Path) -> None:
    browser.command("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    try:
        browser.open(address)
        browser.choose("codec")
        browser.give(sound)
        browser.text("told")
        assert browser.js("document.documentElement.scrollWidth") <= 360
        controls = ("button", "textbox", "combobox", "spinbutton", "checkbox", "image", "img")
        nodes = browser.command("Accessibility.getFullAXTree")["nodes"]
        found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in controls]
        assert len(found) > 12
        assert not [node["role"] for node in found if not node["name"]["value"]]
    finally:
        browser.command("Emulation.clearDeviceMetricsOverride")
