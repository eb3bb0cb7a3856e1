"""Where Ray places the replicas of a service."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import triptych
import triptych.engine  # before ray: it asks for Ray's authentication

import ray  # isort: skip
from ray.cluster_utils import Cluster

from triptych.engine.ray_cluster import start_replica
from triptych.engine.ray_register import NAMESPACE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two nodes."""
    with pytest.MonkeyPatch.context() as patch:
        root = str(Path(triptych.__file__).parents[1])  # workers import this test's `triptych`, wherever it lies
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def node_of(actor: Any) -> str:
    """Wait until an actor's process runs, and return the node that it is on."""
    deadline = time.monotonic() + 60
    while (told := ray._private.state.actors(actor._actor_id.hex()))["State"] != "ALIVE":
        assert time.monotonic() < deadline, "it was not started"
        time.sleep(0.05)
    node: str = told["Address"]["NodeID"]
    return node


def test_replicas_without_gpus_lie_on_all_machines_in_turn(cluster: None) -> None:
    for trial in range(8):  # chance would have it so once in some hundred times
        names = [f"{trial}-{number}" for number in range(2)]
        pair = [start_replica(name, "/nowhere", "denoiser", {}, threads=1, gpus=0) for name in names]
        assert len({node_of(each) for each in pair}) == 2
        for each in pair:
            ray.kill(each)
