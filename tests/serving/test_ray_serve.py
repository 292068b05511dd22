"""The server's application inside Ray Serve: two replicas, each with the models; the state travels with the requests."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import ENVIRONMENT, request

import max_conv
from max_conv.serving import open_network

pytest.importorskip("ray.serve", reason="replicas need ray[serve]")
pytestmark = pytest.mark.nightly

SCRIPT = """
import sys, time
import ray
from ray import serve

path, port = sys.argv[1], int(sys.argv[2])

def build():
    from max_conv.serving import app
    return app([f"vad={path}"])

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
replicas = serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.5})(serve.ingress(build)())
serve.run(replicas.bind(), name="vad", route_prefix="/")
print("up", flush=True)
sys.stdin.readline()
serve.shutdown()
ray.shutdown()
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_two_replicas(tmp_path: Path) -> None:
    path = tmp_path / "vad.maxconv"
    open_network("silero_vad").model.save(path)
    chunks = (0.1 * np.random.default_rng(0).standard_normal((1, 20, 512))).astype(np.float32)
    want, last = max_conv.load(path)(chunks, np.zeros((1, 320), np.float32))
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT)
    port = free_port()
    environment = {**ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script), str(path), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == b"up\n", log.read_text()
        got, state, processes = [], np.zeros((1, 320), np.float32), set()
        for n in range(20):
            arrays = {"chunks": chunks[:, n : n + 1], "state": state}
            tensors = [
                {"name": k, "shape": a.shape, "datatype": "FP32", "parameters": {"binary_data_size": a.nbytes}}
                for k, a in arrays.items()
            ]
            outputs = [{"name": name, "parameters": {"binary_data": True}} for name in ("probability", "state")]
            head = json.dumps({"inputs": tensors, "outputs": outputs}).encode()
            body = head + b"".join(np.ascontiguousarray(a).tobytes() for a in arrays.values())
            status, headers, answer = request(
                port, "POST", "/v2/models/vad/infer", body, Inference_Header_Content_Length=str(len(head))
            )
            assert status == 200, answer
            values = np.frombuffer(answer[int(headers["inference-header-content-length"]) :], np.float32)
            got.append(values[:1])
            state = values[1:].reshape(1, 320)
        for _ in range(20):  # each replica counts its own requests
            text = request(port, "GET", "/metrics")[2].decode()
            processes |= {line for line in text.splitlines() if line.startswith("max_conv_requests_total")}
            time.sleep(0.05)
        np.testing.assert_array_equal(np.concatenate(got), want[0])
        np.testing.assert_array_equal(state, last)
        assert len(processes) == 2 and sum(float(line.rpartition(" ")[2]) for line in processes) == 20
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
