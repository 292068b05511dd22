"""The clients of load.py, in a process of their own: they send prepared requests, and check every answer."""

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
OUTPUTS = [{"name": name, "parameters": {"binary_data": True}} for name in ("probability", "state")]
HEADS = [
    b"GET /v2/models/m/infer HTTP/1.1\r\n",
    b"POST /v2/models/other/infer HTTP/1.1\r\ncontent-length: 0\r\n",
    b"\x00\x01\r\n",
]


def request_of(arrays: dict[str, np.ndarray], parameters: dict[str, Any] | None = None) -> bytes:
    """Returns a whole HTTP request in binary."""
    inputs = [
        {"name": name, "shape": a.shape, "datatype": "FP32", "parameters": {"binary_data_size": a.nbytes}}
        for name, a in arrays.items()
    ]
    head = json.dumps({"inputs": inputs, "outputs": OUTPUTS, "parameters": parameters or {}}).encode()
    body = head + b"".join(a.tobytes() for a in arrays.values())
    lines = f"POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\ninference-header-content-length: {len(head)}\r\n\r\n"
    return lines.encode() + body


async def read(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Returns the status, the JSON and what is behind it."""
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
    """Returns the bytes of what the model itself answers."""
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


async def streams(port: int, count: int, seconds: float, folder: str) -> dict[str, Any]:
    """Each client sends 32 ms of sound every 32 ms, and waits for the probability."""
    import websockets.asyncio.client as client

    import max_conv

    pieces = int(seconds / 0.032)
    sound = (0.1 * np.random.default_rng(0).standard_normal(pieces * 512)).astype(np.float32)
    want = max_conv.load(Path(folder) / "live.maxconv").stream().push(sound[None])[0]
    took: list[float] = []

    async def caller(n: int) -> None:
        url = f"ws://127.0.0.1:{port}/v2/models/live/stream"
        async with client.connect(url, compression=None, ping_interval=None) as talk:
            start = time.perf_counter() + 1 + 0.032 * n / count
            for k in range(pieces):
                due = start + 0.032 * k
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                await talk.send(sound[k * 512 : (k + 1) * 512].tobytes())
                got = np.frombuffer(await talk.recv(), np.float32)  # type: ignore[arg-type]
                took.append(time.perf_counter() - due)
                if got.shape != (1,) or abs(got[0] - want[k]) > 1e-6:
                    raise RuntimeError(f"caller {n}, piece {k}: {got}, not {want[k]}")

    await asyncio.gather(*(caller(n) for n in range(count)))
    return {"answers": len(took), **percentiles(took)}


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


async def faults(port: int, clients: int, seconds: float, folder: str, seed: int) -> dict[str, Any]:
    """Clients that send what is right and what is wrong, leave in the middle, and come back."""
    inputs = sounds(16, 2)
    want, told = alone(folder, inputs), Counter({"right": 0, "wrong": 0, "lost": 0, "refused": 0, "left": 0, "down": 0})
    end = time.perf_counter() + seconds

    async def good(connection: Connection, n: int) -> None:
        connection[1].write(request_of(inputs[n]))
        status, _, got = await asyncio.wait_for(read(connection[0]), 60)
        told["right" if status == 200 and got == want[n] else "refused" if status in (503, 504) else "wrong"] += 1

    async def bad(connection: Connection, n: int) -> None:
        arrays = dict(inputs[n])
        arrays["chunks"] = [arrays["chunks"][:, :, :7], arrays["chunks"][0], arrays["chunks"].astype("f8")][n % 3]
        connection[1].write(request_of(arrays))
        status, text, _ = await asyncio.wait_for(read(connection[0]), 60)
        told["refused" if status == 400 and list(json.loads(text)) == ["error"] else "wrong"] += 1

    async def huge(connection: Connection, n: int) -> None:
        arrays = {"chunks": inputs[n]["chunks"] * np.float32([np.nan, 1e30][n % 2]), "state": inputs[n]["state"]}
        connection[1].write(request_of(arrays))
        told["right" if (await asyncio.wait_for(read(connection[0]), 60))[0] == 200 else "wrong"] += 1

    async def sequence(connection: Connection, n: int) -> None:
        key = f"{seed}-{n}-{time.perf_counter()}"
        for place in ({"sequence_start": True}, {"sequence_end": True}):
            arrays = {"chunks": inputs[n]["chunks"]} | (
                {"state": inputs[n]["state"]} if "sequence_start" in place else {}
            )
            connection[1].write(request_of(arrays, {"sequence_id": key, **place}))
            status, _, got = await asyncio.wait_for(read(connection[0]), 60)
            if "sequence_start" in place:
                told[
                    "right" if (status, got) == (200, want[n]) else "refused" if status in (503, 504) else "wrong"
                ] += 1

    async def leaves(connection: Connection, n: int) -> None:
        data = request_of(inputs[n])
        connection[1].write(data[: [len(data) // 2, len(data)][n % 2]])
        await connection[1].drain()
        connection[1].transport.abort()
        told["left"] += 1

    async def nonsense(connection: Connection, n: int) -> None:
        connection[1].write(HEADS[n % 3] + b"host: a\r\n\r\n")
        status, _, _ = await asyncio.wait_for(read(connection[0]), 60)
        told["refused" if status in (400, 404, 405) else "wrong"] += 1
        connection[1].close()

    kinds: Sequence[Callable[[Connection, int], Any]] = [good] * 12 + [sequence] * 3 + [bad, huge, leaves, nonsense]

    async def client(number: int) -> None:
        random = np.random.default_rng(1000 * seed + number)
        connection: Connection | None = None
        while time.perf_counter() < end + 1:
            try:
                connection = connection or await connect(port)
            except OSError:  # the server is asked to end, or has ended
                told["down"] += 1
                await asyncio.sleep(0.2)
                continue
            kind = kinds[random.integers(len(kinds))]
            try:
                await kind(connection, int(random.integers(16)))
            except (OSError, EOFError, TimeoutError):
                # While the server ends, a connection that waits is closed: nothing had been sent that was taken.
                told["down" if time.perf_counter() > end else "lost"] += 1
                connection = None
            if kind in (leaves, nonsense):
                connection = None
        if connection:
            with contextlib.suppress(OSError):
                connection[1].close()

    await asyncio.gather(*(client(n) for n in range(clients)))
    return dict(told)


if __name__ == "__main__":
    kind, port, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    cases: dict[str, Callable[..., Any]] = {
        "requests": requests,
        "streams": streams,
        "connections": connections,
        "faults": faults,
    }
    print(json.dumps(asyncio.run(cases[kind](port, **options))))
