"""How long `triptych serve` takes from the command to the first answer.

    python bench/start.py

Limits, on the embedded model: over `LocalEngine`, importing the libraries and loading the model (both measured in
processes of their own, in the same run) + 2 s; over Ray, Ray's own start + those + 5 s. Writes bench/results/start.json;
exits 1 where a limit is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "start.json"
LOAD = "import time; b = time.perf_counter(); import triptych; from triptych import embedded; triptych.load(embedded.path())"
RAY = (
    "import triptych.engine, ray; ray.init(include_dashboard=False, _node_ip_address='127.0.0.1', log_to_driver=False)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    seconds: dict[str, list[float]] = {"import and load": [], "Ray's own start": [], "local": [], "ray": []}
    for _ in range(asked.repeats):
        seconds["import and load"].append(process(LOAD))
        seconds["Ray's own start"].append(process(RAY))
        seconds["local"].append(first_answer([]))
        seconds["ray"].append(first_answer(["--pools", "encoder=1,denoiser=1,decoder=1", "--threads", "1"]))
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    figures: dict[str, Any] = {"command": " ".join(["python bench/start.py", *sys.argv[1:]]), "seconds": middle}
    figures["checks"] = {
        "local <= import + load + 2 s": middle["local"] <= middle["import and load"] + 2,
        "ray <= Ray's start + import + load + 5 s": middle["ray"]
        <= middle["Ray's own start"] + middle["import and load"] + 5,
    }
    print(json.dumps(figures, indent=2))
    asked.output.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def process(code: str) -> float:
    """Return the seconds that a Python process takes to run some code, from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_answer(options: list[str]) -> float:
    """Return the seconds from the start of `triptych serve` to the end of its first request."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.perf_counter()
    command = [sys.executable, "-m", "triptych", "serve", "--port", str(port), "--no-state", *options]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(server, f"{url}/ready")
            body = json.dumps({"parameters": {"prompt": "a red heart", "num_inference_steps": 1}}).encode()
            headers = {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/requests", body, headers)) as answer:
                name = json.load(answer)["id"]
            while True:
                with urllib.request.urlopen(f"{url}/v1/requests/{name}") as answer:
                    told = json.load(answer)
                if told["status"] == "done":
                    return time.perf_counter() - began
                if told["status"] in ("failed", "cancelled"):
                    raise SystemExit(f"the request was given up: {told['error']}")
                time.sleep(0.01)
        finally:
            server.send_signal(signal.SIGTERM)


def wait_for(server: subprocess.Popen[bytes], url: str) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)
    raise SystemExit(f"triptych serve ended with {server.returncode}")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.exit(main())
