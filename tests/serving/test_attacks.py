"""Errors of clients, on purpose or not: each client gets a sentence, and the next client gets its answer."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client as websocket
from running import closed, in_thread, raw, request, response, wait_for
from test_served import Fixed, Live, Plain, x_of
from websockets.typing import Origin

from max_conv.serving import app

INFER = "/v2/models/m/infer"


def body(x: np.ndarray, **parameters: Any) -> bytes:
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


GOOD = body(x_of([1, 2]))


def head(*lines: str) -> bytes:
    return "\r\n".join([f"POST {INFER} HTTP/1.1", "Host: a", *lines]).encode() + b"\r\n\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    limits = {"max_body": 1 << 20, "body_timeout": 0.5}
    with in_thread(app({"m": Plain(), "fixed": Fixed(), "live": Live()}, **limits), 40) as number:  # type: ignore[dict-item]
        yield number


@pytest.fixture(autouse=True)
def still_answers(port: int) -> Iterator[None]:
    yield
    status, _, answer = request(port, "POST", INFER, GOOD)
    assert (status, json.loads(answer)["outputs"][0]["data"]) == (200, [2, 4])


def sentence(answer: tuple[int, dict[str, str], bytes]) -> str:
    told = json.loads(answer[2])
    assert list(told) == ["error"] and "\n" not in told["error"]
    return told["error"]


@pytest.mark.parametrize("claim", [str(1 << 31), str((1 << 20) + 1), "9" * 18])
def test_a_body_that_claims_too_much_is_not_read(port: int, claim: str) -> None:
    answer = raw(port, head(f"Content-Length: {claim}"))
    assert answer[0] == 413 and answer[1]["connection"] == "close"
    assert "bytes, but 1048576 are allowed" in sentence(answer)


def test_a_body_that_never_ends(port: int) -> None:
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    answer = raw(port, head("Transfer-Encoding: chunked"), *[chunk] * 40)
    assert answer[0] == 413 and "more than the 1048576 bytes" in sentence(answer)


def test_a_body_that_is_late(port: int) -> None:
    answer = raw(port, head("Content-Length: 100"), b"{")
    assert answer[0] == 408 and sentence(answer) == "the body did not come within 0.5 s."


def test_headers_that_are_too_large(port: int) -> None:
    answer = raw(port, head(*[f"A{n}: {'b' * 1000}" for n in range(40)])[:-4])
    assert answer[0] == 431 and "32768" in sentence(answer)
    answer = raw(port, f"GET /{'a' * 100_000}".encode())
    assert answer[0] == 431


def test_a_large_body_in_one_piece_is_no_header(port: int) -> None:
    one = body(np.ones((1, 5000, 2), np.float32))
    assert len(one) > 40_000
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for _ in range(3):
            connection.sendall(head(f"Content-Length: {len(one)}") + one)
            assert response(connection)[0] == 200


def test_headers_that_never_end(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("max_conv.serving.limits.SECONDS", 0.3)
    answer = raw(port, b"POST / HTTP/1.1\r\nA: b\r\n")
    assert answer[0] == 408 and "headers did not come" in sentence(answer)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:  # nothing at all
        assert response(connection)[0] == 408 and closed(connection)


def test_a_connection_may_rest_between_requests(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("max_conv.serving.limits.SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for _ in range(2):
            connection.sendall(head(f"Content-Length: {len(GOOD)}") + GOOD)
            assert response(connection)[0] == 200
            time.sleep(0.4)


def test_half_a_body_and_gone(port: int) -> None:
    for size in (1, len(GOOD) - 1):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head(f"Content-Length: {len(GOOD)}") + GOOD[:size])


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: -5"],
        ["Content-Length: 5x"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: gzip"],
        [" folded: header"],
        ["a b: c"],
    ],
)
def test_smuggling(port: int, lines: list[str]) -> None:
    """Requests that two servers could read in two ways are refused, and the rest is not read as a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head(*lines) + b"0\r\n\r\nGET /v2 HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = response(connection)
        assert answer[0] in (400, 408) and sentence(answer)
        assert closed(connection)


def test_several_requests_at_once_on_a_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for n in range(5):
            one = body(x_of([n, n]))
            connection.sendall(head(f"Content-Length: {len(one)}") + one)
        data = b""
        while data.count(b"HTTP/1.1 200") < 5 or not data.endswith(b"}"):
            data += connection.recv(1 << 16)
        found = [json.loads(part[part.index(b"{") :])["outputs"][0]["data"] for part in data.split(b"HTTP/1.1")[1:]]
        assert found == [[2 * n, 2 * n] for n in range(5)]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", INFER, 405),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/m/versions/2", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v2/models/%2e%2e%2fm", 404),
        ("DELETE", "/v2", 405),
    ],
)
def test_what_is_not_there(port: int, method: str, path: str, status: int) -> None:
    answer = request(port, method, path)
    assert answer[0] == status and sentence(answer)


def test_a_compressed_body(port: int) -> None:
    answer = request(port, "POST", INFER, GOOD, Content_Encoding="gzip")
    assert answer[0] == 400 and "compressed" in sentence(answer)


def test_wrong_requests_are_400_and_the_connection_goes_on(port: int) -> None:
    wrong = [b"", b"{", b"[" * 100_000, body(np.ones((1, 1, 3), np.float32)), body(x_of([1, 2]), sequence_id=1.5)]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for one in wrong:
            connection.sendall(head(f"Content-Length: {len(one)}") + one)
            answer = response(connection)
            assert answer[0] == 400 and sentence(answer)
        connection.sendall(head(f"Content-Length: {len(GOOD)}") + GOOD)
        assert response(connection)[0] == 200


def test_too_many_connections(port: int) -> None:
    connections = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(41)]
    try:
        answer = response(connections[-1])
        assert answer[0] == 503 and answer[1]["retry-after"] == "1" and "connections are open" in sentence(answer)
        connections[0].sendall(head(f"Content-Length: {len(GOOD)}") + GOOD)
        assert response(connections[0])[0] == 200
    finally:
        for connection in connections:
            connection.close()
        time.sleep(0.1)


def test_many_wrong_bytes(port: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        raw(port, random.bytes(int(random.integers(1, 300))), b"\r\n\r\n")


def test_a_full_queue_and_a_deadline() -> None:
    model = Plain()
    with in_thread(app({"m": model}, max_queue=3, max_batch=1)) as port:  # type: ignore[dict-item]
        model.go.clear()
        answers: list[Any] = []

        def ask(**parameters: Any) -> None:
            answers.append(request(port, "POST", INFER, body(x_of([1, 2]), **parameters)))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        late = threading.Thread(target=ask, kwargs={"timeout": 20_000})
        for thread in threads[:1]:
            thread.start()
        time.sleep(0.2)
        late.start()
        late.join(20)
        assert answers[0][0] == 504 and "deadline" in sentence(answers[0])
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: len(answers) == 5, 20)
        for answer in answers[1:]:
            assert answer[0] == 503 and answer[1]["retry-after"] == "1" and "3 requests are waiting" in sentence(answer)
            assert answer[1].get("connection") != "close"
        model.go.set()
        for thread in threads:
            thread.join(20)
        assert sorted(answer[0] for answer in answers) == [200] * 4 + [503] * 4 + [504]


def test_the_memory_of_bodies() -> None:
    with in_thread(app({"m": Plain()}, max_body=1 << 20, max_memory=1 << 20, body_timeout=5)) as port:  # type: ignore[dict-item]
        with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
            slow.sendall(head(f"Content-Length: {1 << 20}"))
            time.sleep(0.2)
            answer = request(port, "POST", INFER, GOOD)
            assert answer[0] == 503 and "fill the memory" in sentence(answer) and answer[1]["connection"] == "close"
        wait_for(lambda: request(port, "POST", INFER, GOOD)[0] == 200, 10)


def test_messages_are_counted() -> None:
    with in_thread(app({"live": Live()})) as port:  # type: ignore[dict-item]
        with stream(port, "live/stream") as talk:
            for _ in range(3):
                talk.send(np.ones(2, np.float32).tobytes())
                talk.recv(20)
        text = request(port, "GET", "/metrics")[2]
        assert b'max_conv_requests_total{code="200",model="live"} 3.0' in text
        assert b'max_conv_request_seconds_count{model="live"} 3.0' in text


def test_a_token() -> None:
    with in_thread(app({"m": Plain(), "live": Live()}, token="secret")) as port:  # type: ignore[dict-item]
        for path in ("/v2", "/metrics", "/v2/models/m", "/v2/models/other"):
            for wrong in ("Basic x", "Bearer secre", "Bearer", "secret", "Bearer secret x", "Bearer \xe9"):
                answer = request(port, "GET", path, Authorization=wrong)
                assert answer[0] == 401 and "token" in sentence(answer)
        assert request(port, "POST", INFER, GOOD)[0] == 401
        for path in ("/v2/health/live", "/v2/health/ready", "/"):
            assert request(port, "GET", path)[0] == 200
        for path in ("/v2", "/metrics", "/v2/models/m"):
            lines = f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n\r\n"
            assert raw(port, lines.encode())[0] == 200
        url = f"ws://127.0.0.1:{port}/v2/models/live/stream"
        with pytest.raises(websockets.exceptions.InvalidStatus) as error:
            websocket.connect(url).recv()
        assert error.value.response.status_code == 403


def test_a_token_in_a_browser() -> None:
    """A browser's WebSocket cannot send headers; its subprotocol carries the token."""
    with in_thread(app({"live": Live()}, token="secret")) as port:  # type: ignore[dict-item]
        url = f"ws://127.0.0.1:{port}/v2/models/live/stream"
        with websocket.connect(url, subprotocols=["token.secret"]) as talk:  # type: ignore[list-item]
            assert talk.subprotocol == "token.secret"
            talk.send(np.ones(4, np.float32).tobytes())
            assert np.frombuffer(bytes(talk.recv(20)), np.float32).tolist() == [2, 3, 3]  # type: ignore[arg-type]
        with pytest.raises(websockets.exceptions.InvalidStatus):
            websocket.connect(url, subprotocols=["token.secre"])  # type: ignore[list-item]


def stream(port: int, path: str) -> Any:
    return websocket.connect(f"ws://127.0.0.1:{port}/v2/models/{path}")


@pytest.mark.parametrize(
    ("path", "message", "code", "reason"),
    [
        ("other/stream", None, 1008, "there is no model 'other' here."),
        ("m/stream?output=z", None, 1008, "m has no output 'z'."),
        ("live/stream?in=mp3", None, 1008, "?in= must be f32 or s16, but is 'mp3'."),
        ("fixed/stream", None, 1008, "fixed keeps no state; leave sequence_id out."),
        ("live/stream", b"abc", 1007, "a message must hold whole positions of 4 bytes, but has 3 bytes."),
        ("live/stream", "stop", 1003, 'the only text is "end"; send values as binary messages.'),
        ("m/stream", x_of([13, 1]).tobytes(), 1007, "model: 13 is not taken."),
    ],
)
def test_sockets_that_are_closed(port: int, path: str, message: Any, code: int, reason: str) -> None:
    with stream(port, path) as talk:
        with pytest.raises(websockets.exceptions.ConnectionClosed) as error:
            if message is not None:
                talk.send(message)
            talk.recv(20)
    assert error.value.rcvd is not None
    assert (error.value.rcvd.code, error.value.rcvd.reason) == (code, reason)


def test_a_page_of_another_site_gets_no_socket(port: int) -> None:
    url = f"ws://127.0.0.1:{port}/v2/models/live/stream"
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null"):
        with pytest.raises(websockets.exceptions.InvalidStatus) as error:
            websocket.connect(url, origin=Origin(origin)).recv()
        assert error.value.response.status_code == 403
    with websocket.connect(url, origin=Origin(f"http://127.0.0.1:{port}")) as talk:
        talk.send(np.ones(2, np.float32).tobytes())
        assert talk.recv(20)


def test_a_socket_that_sends_nothing() -> None:
    with in_thread(app({"live": Live()}, idle=0.3)) as port:  # type: ignore[dict-item]
        with stream(port, "live/stream") as talk:
            with pytest.raises(websockets.exceptions.ConnectionClosed) as error:
                talk.recv(20)
        assert error.value.rcvd is not None
        assert (error.value.rcvd.code, error.value.rcvd.reason) == (4408, "nothing came for 0.3 s.")


def test_too_many_signals() -> None:
    with in_thread(app({"live": Live()}, max_streams=2)) as port:  # type: ignore[dict-item]
        piece = np.ones(2, np.float32).tobytes()
        with stream(port, "live/stream") as one:
            one.send(piece)
            one.recv(20)
            with stream(port, "live/stream") as two:
                two.send(piece)
                two.recv(20)
                with stream(port, "live/stream") as three:
                    with pytest.raises(websockets.exceptions.ConnectionClosed) as error:
                        three.recv(20)
                assert error.value.rcvd is not None and error.value.rcvd.code == 1013
            time.sleep(0.2)
            with stream(port, "live/stream") as four:
                four.send(piece)
                assert four.recv(20)


def test_a_socket_that_goes(port: int) -> None:
    for _ in range(30):
        with stream(port, "live/stream") as talk:
            talk.send(np.ones(1000, np.float32).tobytes())
            talk.socket.close()
    wait_for(lambda: b'max_conv_streams{model="live"} 0.0' in request(port, "GET", "/metrics")[2], 20)
