"""Several routers before one Ray cluster of two nodes: one that dies takes nothing with it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import triptych
import triptych.engine  # before ray: it asks for Ray's authentication

import ray  # isort: skip
from ray.cluster_utils import Cluster

from triptych.engine.ray_register import NAMESPACE, REGISTER, open_register

pytestmark = pytest.mark.slow

ROUTER = """
import json, sys, threading
import triptych.engine, ray
from triptych.engine.ray import RayEngine
from triptych.request import Request

ask = dict(prompt="a red fox", height=64, width=48, output_type="pt", max_sequence_length=24, exact=True)
source, address, pools = sys.argv[1:]
engine = RayEngine(source, address=address, pools=pools or None, threads=1, warm_up=bool(pools))
print("ready", flush=True)

def one(line):
    result = engine.submit(Request(**{**ask, **json.loads(line)})).result()
    print(json.dumps({"seed": result.seed, "sum": result.images.double().sum().item()}), flush=True)

for line in sys.stdin:
    if line.startswith("scale"):
        engine.scale("decoder", 2)
    elif line.startswith("replicas"):
        ready = sorted((each.pool, each.told["node"]) for each in engine.replicas if each.state == "ready")
        print(json.dumps(ready), flush=True)
    else:
        threading.Thread(target=one, args=(line,)).start()
engine.close(30)
"""


class Process:
    """A router in a process of its own."""

    def __init__(self, repository: Path, address: str, pools: str) -> None:
        command = [sys.executable, "-c", ROUTER, str(repository), address, pools]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.hear() == "ready"

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, **parameters: Any) -> None:
        self.say(json.dumps(parameters))

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.hear())
        return answer

    def replicas(self) -> list[list[str]]:
        self.say("replicas")
        replicas: list[list[str]] = json.loads(self.hear())
        return replicas


@pytest.fixture(scope="module")
def repository(tiny_repo: Callable[..., Path]) -> Path:
    return tiny_repo("flux2_klein")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        root = str(Path(triptych.__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        try:
            yield cluster.address
        finally:
            ray.shutdown()
            cluster.shutdown()


def members() -> dict[str, Any]:
    found: dict[str, Any] = ray.get(ray.get_actor(REGISTER, namespace=NAMESPACE).members.remote())
    return found


def named() -> set[str]:
    return {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_router_that_is_killed_takes_no_replica_and_no_request_of_another_with_it(
    repository: Path, address: str
) -> None:
    whole = triptych.load(repository, device="cpu")
    expected = {
        seed: whole.generate(
            prompt="a red fox", height=64, width=48, output_type="pt", max_sequence_length=24, seed=seed,
            num_inference_steps=steps,
        ).images.double().sum().item()
        for seed, steps in ((1, 3), (2, 200))
    }  # fmt: skip
    first = Process(repository, address, "encoder=1,denoiser=1,decoder=1")
    second = Process(repository, address, "")
    nodes = {node for _, node in second.replicas()}
    assert len(nodes) == 2, "replicas lie on both nodes"
    first.ask(seed=1, num_inference_steps=3)
    assert first.answer() == {"seed": 1, "sum": expected[1]}
    second.ask(seed=2, num_inference_steps=200)
    first.ask(seed=3, num_inference_steps=200)
    time.sleep(0.3)
    first.process.kill()
    assert second.answer() == {"seed": 2, "sum": expected[2]}
    second.ask(seed=1, num_inference_steps=3)
    assert second.answer() == {"seed": 1, "sum": expected[1]}
    second.say("scale")  # it keeps the pools now
    wait_until(lambda: len(second.replicas()) == 4)
    second.process.stdin.close()  # type: ignore[union-attr]
    assert second.process.wait(60) == 0
    wait_until(lambda: members() == {})


def test_a_register_that_dies_learns_again_from_the_routers(repository: Path, address: str) -> None:
    router = Process(repository, address, "encoder+decoder=1,denoiser=1")
    before = members()
    register = ray.get_actor(REGISTER, namespace=NAMESPACE)
    ray.kill(register, no_restart=False)
    wait_until(lambda: members() == before)
    router.ask(seed=1, num_inference_steps=3)
    assert router.answer()["seed"] == 1
    assert len(router.replicas()) == 2
    router.process.stdin.close()  # type: ignore[union-attr]
    assert router.process.wait(60) == 0


def test_replicas_without_a_router_are_found_again_or_end(repository: Path, address: str) -> None:
    if REGISTER in named():
        ray.kill(ray.get_actor(REGISTER, namespace=NAMESPACE))
    wait_until(lambda: REGISTER not in named())
    identity = {"version": triptych.__version__, **triptych.load(repository, role="server").identity}
    register = open_register("the test", identity, orphaned=12.0)
    ray.get(register.leave.remote("the test"))
    first = Process(repository, address, "encoder+decoder=1,denoiser=1")
    names = set(members())
    first.process.send_signal(signal.SIGKILL)
    second = Process(repository, address, "encoder+decoder=1,denoiser=1")
    assert set(members()) == names  # the very same replicas, without loading anew
    second.ask(seed=1, num_inference_steps=3)
    assert second.answer()["seed"] == 1
    second.process.send_signal(signal.SIGKILL)
    wait_until(lambda: members() == {}, 40)
    wait_until(lambda: not names & named())
