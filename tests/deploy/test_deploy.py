"""What is written about deployment can be run: every command parses, every file is of its form."""

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from triptych.cli import app
from triptych.server.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGES = ("deployment.md", "serving.md", "cli.md")


def commands(text: str) -> Iterator[list[str]]:
    """The commands in the bash blocks of a page, as words; without variables before them and comments."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = [re.sub(r"^/usr/local/lib/triptych/bin/", "", word) for word in words]
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            for mark in ("&&", ">>", "|"):
                words = words[: words.index(mark)] if mark in words else words
            if words:
                yield words


def accept(words: list[str]) -> None:
    """Parse the words after `triptych`, as the command line does, without running anything."""
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], list(words[1:]))


def written() -> list[Any]:
    return [
        pytest.param(words, id=f"{page}: {' '.join(words)[:60]}")
        for page in PAGES
        for words in commands((ROOT / "docs" / page).read_text())
        if words[0] == "triptych" and len(words) > 1
    ]


@pytest.mark.parametrize("words", written())
def test_every_command_in_the_pages_is_one_that_the_command_line_takes(words: list[str]) -> None:
    accept(words[1:])


def test_a_command_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(KeyError):
        accept(["swerve"])
    with pytest.raises(typer.TyperException):
        accept(["serve", "--no-such-option"])


def test_every_option_of_ray_in_the_pages_exists() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    text = (ROOT / "docs" / "deployment.md").read_text()
    told = [words for words in commands(text) if words[0] == "ray"]
    assert len(told) >= 3
    for _, name, *options in told:
        known = {option for parameter in scripts.cli.commands[name].params for option in parameter.opts}
        assert {option.partition("=")[0] for option in options} <= known


def test_every_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"deploy/[\w./-]+\w", (ROOT / "docs" / "deployment.md").read_text()))
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / name).exists()] == []


def containers(document: Any) -> Iterator[dict[str, Any]]:
    """Every container that is described anywhere in a document."""
    if isinstance(document, dict):
        yield from document.get("containers") or []
    for each in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from containers(each)


def test_manifests_are_whole_and_start_what_exists() -> None:
    kinds = {}
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        documents = list(yaml.safe_load_all(path.read_text()))
        kinds[path.name] = [each["kind"] for each in documents]
        for document in documents:
            assert document["apiVersion"] and document["metadata"]["name"]
            for container in containers(document):
                mounted = {each["name"] for each in container.get("volumeMounts", [])}
                assert mounted <= volumes(document)
                if "args" in container:
                    accept(container["args"])
            if document["kind"] == "RayJob":
                accept(shlex.split(document["spec"]["entrypoint"])[1:])
                assert document["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert kinds == {
        "ray.yaml": ["RayJob", "Service", "NetworkPolicy"],
        "single.yaml": ["Deployment", "PersistentVolumeClaim", "Service"],
    }


def volumes(document: Any) -> set[str]:
    """The names of the volumes anywhere in a document."""
    if isinstance(document, list):
        return set().union(*(volumes(each) for each in document))
    if not isinstance(document, dict):
        return set()
    here = {each["name"] for each in document.get("volumes", []) if isinstance(each, dict)}
    return here.union(*(volumes(each) for each in document.values()))


def test_compose_and_docker_start_what_exists() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(compose["services"]) == {"cpu", "cuda"}
    for service in compose["services"].values():
        accept(service["command"])
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    lines = (DEPLOY / "docker" / "Dockerfile").read_text()
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", lines, re.MULTILINE)[0]) == ["triptych"]
    accept(json.loads(re.findall(r"^CMD (.*)$", lines, re.MULTILINE)[-1]))
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for source in re.findall(r"^COPY (.*) \S+$", lines, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists() and f"!{name}" in kept


def test_the_unit_starts_what_exists() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "systemd" / "triptych.service")
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    command = unit["Service"]["ExecStart"].replace("$MODEL", "model").replace("$OPTIONS", "--denoiser cuda:0")
    accept(command.split()[1:])
    drain = 30  # seconds, `--drain`
    assert int(unit["Service"]["TimeoutStopSec"]) > drain
    assert unit["Service"]["SuccessExitStatus"] == "143"  # of a signal while it loads
    assert "Documentation" not in unit["Unit"]  # the page is not installed with the package


def test_the_unit_keeps_requests_to_its_user() -> None:
    unit = (DEPLOY / "systemd" / "triptych.service").read_text().splitlines()
    assert {"StateDirectory=triptych", "StateDirectoryMode=0700", "UMask=0077"} <= set(unit)


def test_prometheus_is_told_where_to_ask() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]


def test_the_dashboard_and_the_page_name_metrics_that_there_are() -> None:
    counted = {"hits": 1, "misses": 1}
    replica = {"name": "a", "roles": ["denoiser"], "prompt_cache": counted, "forwards": {1: 1}}
    replica["hops"] = {"count": 1, "bytes": 1, "seconds": 1.0}
    metrics = Metrics(lambda: {"replicas": [replica]})
    families = {family.name for family in metrics.registry.collect()}
    dashboard = json.loads((DEPLOY / "grafana" / "triptych.json").read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    named = set(re.findall(r"\b(?:triptych|process)_\w+", asked))
    base = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in named}
    assert base <= families
    page = (ROOT / "docs" / "deployment.md").read_text()
    told = {re.sub(r"_total$", "", name) for name in re.findall(r"`(triptych_\w+)`", page)} | {
        "triptych_prompt_cache_misses"
    }
    assert {name for name in families if name.startswith("triptych_")} == told
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
