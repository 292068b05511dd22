"""The clients of load.py, in a separate process: they send prepared requests, and check every answer."""

import asyncio
import contextlib
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HEADS = [
    b"GET /v2/models/m/infer HTTP/1.1\r\n",
    b"POST /v2/models/other/infer HTTP/1.1\r\ncontent-length: 0\r\n",
    b"\x00\x01\r\n",
]


def request_of(
    arrays: dict[str, np.ndarray],
    parameters: dict[str, Any] | None = None,
    model: str = "m",
    names: Sequence[str] = ("probability", "state"),
) -> bytes:
    """Returns a whole HTTP request in binary."""
    inputs = [
        {"name": name, "shape": a.shape, "datatype": "FP32", "parameters": {"binary_data_size": a.nbytes}}
        for name, a in arrays.items()
    ]
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in names]
    head = json.dumps({"inputs": inputs, "outputs": outputs, "parameters": parameters or {}}).encode()
    body = head + b"".join(a.tobytes() for a in arrays.values())
    lines = f"POST /v2/models/{model}/infer HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\ninference-header-content-length: {len(head)}\r\n\r\n"
    return lines.encode() + body


async def read(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Returns the status, the JSON and the bytes after it."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    sizes = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
    body = await reader.readexactly(int(sizes.get(b"content-length", 0)))
    split = int(sizes.get(b"inference-header-content-length", len(body)))
    return int(lines[0].split()[1]), body[:split], body[split:]


def connect(port: int) -> Any:
    return asyncio.open_connection("127.0.0.1", port, limit=1 << 24)


def sounds(count: int, chunks: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {
            "chunks": (0.1 * random.standard_normal((1, chunks, 512))).astype(np.float32),
            "state": (0.1 * random.standard_normal((1, 320))).astype(np.float32),
        }
        for _ in range(count)
    ]


def alone(folder: str, inputs: list[dict[str, np.ndarray]]) -> list[bytes]:
    """Returns the bytes of the model's own answers."""
    import max_conv

    model = max_conv.load(Path(folder) / "silero.maxconv")
    return [b"".join(np.ascontiguousarray(y).tobytes() for y in model(*given.values())) for given in inputs]


def percentiles(seconds: list[float]) -> dict[str, float]:
    times = 1e3 * np.array(seconds)
    return {"p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99)), "most": float(times.max())}


async def requests(port: int, clients: int, seconds: float, chunks: int, folder: str, exact: bool) -> dict[str, Any]:
    """Each client sends the next request when it has its answer."""
    inputs = sounds(clients, chunks)
    want = alone(folder, inputs)
    took: list[float] = []
    start = time.perf_counter() + 0.5  # the first ones warm up

    async def client(n: int) -> None:
        reader, writer = await connect(port)
        data = request_of(inputs[n])
        while (begin := time.perf_counter()) < start + seconds:
            writer.write(data)
            status, _, got = await read(reader)
            now = time.perf_counter()
            right = (
                got == want[n]
                if exact
                else np.allclose(np.frombuffer(got, "f4"), np.frombuffer(want[n], "f4"), atol=1e-4)
            )
            if status != 200 or not right:
                raise RuntimeError(f"client {n}: status {status}, the answer is {'right' if right else 'wrong'}")
            if begin > start:
                took.append(now - begin)
        writer.close()

    await asyncio.gather(*(client(n) for n in range(clients)))
    return {"answers": len(took), "rate": len(took) / seconds, **percentiles(took)}


class Caller(asyncio.Protocol):
    """A WebSocket without a library: a library's client would use more processor time than the server."""

    def __init__(self, want: np.ndarray, took: list[float]) -> None:
        self.want, self.took, self.due = want, took, [0.0] * len(want)
        self.got, self.data, self.open = 0, b"", asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        lines = ["GET /v2/models/live/stream HTTP/1.1", "Host: a", "Upgrade: websocket", "Connection: Upgrade"]
        lines += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13", "", ""]
        transport.write("\r\n".join(lines).encode())

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.data += data
        if not self.open.done():
            head, end, self.data = self.data.partition(b"\r\n\r\n")
            if not end:
                self.data = head
                return
            self.open.set_result(head.startswith(b"HTTP/1.1 101"))
        while len(self.data) >= 6:  # a head of two bytes and a float32
            frame, self.data = self.data[:6], self.data[6:]
            value = np.frombuffer(frame, "f4", offset=2)[0]
            if frame[:2] != b"\x82\x04" or abs(value - self.want[self.got]) > 1e-6:
                raise SystemExit(f"piece {self.got}: {frame!r}, not {self.want[self.got]}")
            self.took.append(now - self.due[self.got])
            self.got += 1


async def streams(port: int, count: int, seconds: float, folder: str) -> dict[str, Any]:
    """Each caller sends 32 ms of sound every 32 ms; the callers are spread evenly over that time."""
    import max_conv

    pieces, warm = int(seconds / 0.032), 30
    sound = (0.1 * np.random.default_rng(0).standard_normal(pieces * 512)).astype(np.float32)
    want = max_conv.load(Path(folder) / "live.maxconv").stream().push(sound[None])[0]
    # A frame of 2,048 bytes with a mask of zeros.
    frames = [b"\x82\xfe\x08\x00\0\0\0\0" + piece.tobytes() for piece in sound.reshape(-1, 512)]
    took: list[list[float]] = [[] for _ in range(count)]
    loop, callers = asyncio.get_running_loop(), []
    for n in range(count):
        callers.append((await loop.create_connection(functools.partial(Caller, want, took[n]), "127.0.0.1", port))[1])
    if not all(await asyncio.gather(*(caller.open for caller in callers))):
        raise RuntimeError("a connection was refused")
    start = time.perf_counter() + 0.1
    for k in range(pieces):
        for n, caller in enumerate(callers):
            due = start + 0.032 * (k + n / count)
            if (early := due - time.perf_counter()) > 0.0005:
                await asyncio.sleep(early)
            elif n % 16 == 0:
                await asyncio.sleep(0)
            caller.due[k] = due
            caller.transport.write(frames[k])
    end = time.perf_counter() + 10
    while any(caller.got < pieces for caller in callers) and time.perf_counter() < end:
        await asyncio.sleep(0.01)
    answers = sum(caller.got for caller in callers)
    if answers < pieces * count:
        raise RuntimeError(f"{pieces * count - answers} pieces had no answer after 10 s")
    return {"answers": answers, **percentiles([second for own in took for second in own[warm:]])}


async def callers(port: int, clients: int, seconds: float, folder: str, chunk: int, live: bool) -> dict[str, Any]:
    """Each caller sends a spectrogram chunk by chunk, as fast as it can: to a live model, or to a whole one with the frames around the chunk."""
    facts = json.loads((Path(folder) / "facts.json").read_text())
    left, right, hop = (0, 0, facts["hop"]) if live else (facts["left"], facts["right"], facts["hop"])
    mels, want = (np.load(Path(folder) / f"{name}.npy") for name in ("mels", "sound"))
    frames, end, done, took = mels.shape[1], time.perf_counter() + seconds, [0], list[float]()

    async def caller(n: int) -> None:
        reader, writer = await connect(port)
        turn = 0
        while time.perf_counter() < end:
            turn, got = turn + 1, list[np.ndarray]()
            for at in range(0, frames, chunk):
                first, stop = max(0, at - left), min(frames, at + chunk + right)
                place = {"sequence_id": f"{n}-{turn}", "sequence_start": at == 0, "sequence_end": at + chunk >= frames}
                given = {"mels": np.ascontiguousarray(mels[:, first:stop])}
                begin = time.perf_counter()
                writer.write(request_of(given, place if live else None, "live" if live else "m", ["sound"]))
                status, _, data = await read(reader)
                took.append(time.perf_counter() - begin)
                if status != 200:
                    raise RuntimeError(f"caller {n}: status {status}")
                sound = np.frombuffer(data, np.float32)
                got.append(sound if live else sound[(at - first) * hop : (min(at + chunk, frames) - first) * hop])
                if time.perf_counter() < end:
                    done[0] += min(chunk, frames - at)
            off = np.abs(np.concatenate(got) - want[0]).max() / np.abs(want).max()
            if not off < 1e-5:
                raise RuntimeError(f"caller {n}: the sound is off by {off:.2g} of its peak")
        writer.close()

    await asyncio.gather(*(caller(n) for n in range(clients)))
    return {"frames": done[0] / seconds, **percentiles(took)}


async def connections(port: int, count: int, seconds: float, folder: str) -> dict[str, Any]:
    """All connections send two requests at once."""
    inputs = sounds(8, 1)
    want, told = alone(folder, inputs), Counter({"right": 0, "503": 0, "wrong": 0, "lost": 0})

    async def client(n: int) -> None:
        try:
            reader, writer = await connect(port)
            for _ in range(2):
                writer.write(request_of(inputs[n % 8]))
                status, _, got = await asyncio.wait_for(read(reader), seconds)
                told["503" if status == 503 else "right" if status == 200 and got == want[n % 8] else "wrong"] += 1
            writer.close()
        except (OSError, EOFError, TimeoutError):
            told["lost"] += 1

    await asyncio.gather(*(client(n) for n in range(count)))
    return dict(told)


class Faults:
    """Clients that send right and wrong requests, leave in the middle, and come back; every answer is checked."""

    def __init__(self, port: int, seconds: float, folder: str, seed: int) -> None:
        self.port, self.seed, self.end = port, seed, time.perf_counter() + seconds
        self.inputs = sounds(16, 2)
        self.want = alone(folder, self.inputs)
        self.told = Counter({"right": 0, "wrong": 0, "lost": 0, "refused": 0, "left": 0, "down": 0})
        self.kinds: list[Any] = [self.good] * 12 + [self.sequence] * 3
        self.kinds += [self.bad, self.huge, self.leaves, self.nonsense]

    async def ask(self, connection: Connection, data: bytes) -> tuple[int, bytes, bytes]:
        connection[1].write(data)
        return await asyncio.wait_for(read(connection[0]), 60)

    def count(self, status: int, right: bool) -> None:
        """Counts an answer to a good request: "try later" is an answer, too."""
        self.told["right" if status == 200 and right else "refused" if status in (503, 504) else "wrong"] += 1

    async def good(self, connection: Connection, n: int) -> None:
        status, _, got = await self.ask(connection, request_of(self.inputs[n]))
        self.count(status, got == self.want[n])

    async def sequence(self, connection: Connection, n: int) -> None:
        facts = {"sequence_id": f"{self.seed}-{n}-{time.perf_counter()}"}
        begin = request_of(self.inputs[n], facts | {"sequence_start": True})
        status, _, got = await self.ask(connection, begin)
        self.count(status, got == self.want[n])
        if status == 200:
            rest = request_of({"chunks": self.inputs[n]["chunks"]}, facts | {"sequence_end": True})
            self.count((await self.ask(connection, rest))[0], True)

    async def bad(self, connection: Connection, n: int) -> None:
        chunks = self.inputs[n]["chunks"]
        wrong = {"chunks": [chunks[:, :, :7], chunks[0], chunks.astype("f8")][n % 3]}
        status, text, _ = await self.ask(connection, request_of(wrong))
        self.told["refused" if status == 400 and list(json.loads(text)) == ["error"] else "wrong"] += 1

    async def huge(self, connection: Connection, n: int) -> None:
        values = {"chunks": self.inputs[n]["chunks"] * np.float32([np.nan, 1e30][n % 2])}
        self.count((await self.ask(connection, request_of(values)))[0], True)

    async def leaves(self, connection: Connection, n: int) -> None:
        data = request_of(self.inputs[n])
        connection[1].write(data[: [len(data) // 2, len(data)][n % 2]])
        await connection[1].drain()
        connection[1].transport.abort()
        self.told["left"] += 1

    async def nonsense(self, connection: Connection, n: int) -> None:
        status, _, _ = await self.ask(connection, HEADS[n % 3] + b"host: a\r\n\r\n")
        self.told["refused" if status in (400, 404, 405) else "wrong"] += 1
        connection[1].close()

    async def client(self, number: int) -> None:
        random = np.random.default_rng(1000 * self.seed + number)
        connection: Connection | None = None
        while time.perf_counter() < self.end + 1:
            try:
                connection = connection or await connect(self.port)
            except OSError:  # the server is asked to end, or has ended
                self.told["down"] += 1
                await asyncio.sleep(0.2)
                continue
            kind = self.kinds[random.integers(len(self.kinds))]
            try:
                await kind(connection, int(random.integers(16)))
            except (OSError, EOFError, TimeoutError):
                # While the server ends, it closes waiting connections: it had accepted no request on them.
                self.told["down" if time.perf_counter() > self.end else "lost"] += 1
                connection = None
            if kind in (self.leaves, self.nonsense):
                connection = None
        if connection:
            with contextlib.suppress(OSError):
                connection[1].close()


async def faults(port: int, clients: int, seconds: float, folder: str, seed: int) -> dict[str, Any]:
    """Runs `Faults`; returns the number of answers of each kind."""
    users = Faults(port, seconds, folder, seed)
    print("begin", flush=True)
    await asyncio.gather(*(users.client(n) for n in range(clients)))
    return dict(users.told)


if __name__ == "__main__":
    kind, port, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    cases: dict[str, Callable[..., Any]] = {
        "requests": requests,
        "streams": streams,
        "callers": callers,
        "connections": connections,
        "faults": faults,
    }
    print(json.dumps(asyncio.run(cases[kind](port, **options))))
