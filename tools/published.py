"""Write docs/families.md: the pipeline classes that are served, and what each role loads of published checkpoints.

python tools/published.py

A folder of docs/published/ holds the index and the configurations of one published checkpoint, and in `source.json`
where each comes from and the dtype of the published weights. A repository without data is made of them: every weight
file has the header that the classes of diffusers and transformers give it, and a hole for its data. `triptych plan`
reads it as it would read the checkpoint itself.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from triptych.cli import run
from triptych.cli.console import human
from triptych.cli.families import describe
from triptych.roles import RoleType, get_module_role

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "docs/published"
PAGE = ROOT / "docs/families.md"
HEADER_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip

INTRODUCTION = """\
<!-- Written by tools/published.py (`make families-page`); do not edit. -->

# Families

## What is served

A model is served when the pipeline class in its `model_index.json` is one of these. `triptych families` prints this
table, and `triptych families PIPELINE` the parameters a request may carry.
"""

LOADED = """\
## What each role loads

Bytes of weights in memory, for all tasks of the family and in the dtypes that the checkpoint is published in: what
`triptych plan` says of it. No weights are needed for that, and none were there: the figures are computed from the
configurations in `docs/published`. Below a checkpoint's name are its pipeline class and the size of the whole model.

*By name* is what a split by the names of components would load: the role's own components, those that belong to no
role, and those of other roles whose weights its stages use, each of them whole. *In part* says of which components less
than the whole is loaded. A monolithic process leaves out what no role uses.
"""

DOUBTS = """\
## What could not be confirmed

Of a checkpoint with an asterisk, a configuration or the dtype that weights are stored in could not be confirmed. A
wrong dtype changes the bytes of that component, and those of the split by names alike. Where each configuration comes
from is in the checkpoint's `source.json`.
"""


@dataclass(frozen=True)
class Published:
    """A published checkpoint: the folder it is described in, its index and its `source.json`."""

    folder: Path
    index: dict[str, Any]
    source: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Published:
        return cls(folder, _read(folder / "model_index.json"), _read(folder / "source.json"))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def pipeline(self) -> str:
        return str(self.index["_class_name"])

    @property
    def components(self) -> dict[str, dict[str, Any]]:
        """What `source.json` says of each component that has a configuration here."""
        components: dict[str, dict[str, Any]] = self.source["components"]
        return components

    @property
    def entries(self) -> dict[str, tuple[str, str]]:
        """Library and class of each component; those that are published outside the index are here too."""
        outside = {name: about["entry"] for name, about in self.components.items() if "entry" in about}
        indexed = {name: value for name, value in self.index.items() if isinstance(value, list)}
        return {name: (library, cls) for name, (library, cls) in {**indexed, **outside}.items()}

    def config(self, component: str) -> str:
        """Return the text of a component's configuration."""
        return (self.folder / component / "config.json").read_text(encoding="utf-8")

    @property
    def doubts(self) -> dict[str, str]:
        """Component to what could not be confirmed of it."""
        return {name: about["why"] for name, about in self.components.items() if not about["verified"]}


def published() -> list[Published]:
    """Return the checkpoints whose pipeline class is served, by that class and by name."""
    found = (Published.read(folder) for folder in sorted(CHECKPOINTS.iterdir()))
    served = describe(None, parameters=False)
    return sorted((each for each in found if each.pipeline in served), key=lambda each: each.pipeline)


def lay_out(checkpoint: Published, target: Path) -> None:
    """Make the checkpoint's repository in `target`, without data."""
    (target / "model_index.json").write_text(json.dumps(checkpoint.index), encoding="utf-8")
    for name, (library, cls) in checkpoint.entries.items():
        (target / name).mkdir()
        if name not in checkpoint.components:
            (target / name / "tokenizer_config.json").write_text("{}", encoding="utf-8")
            continue
        for file in (checkpoint.folder / name).iterdir():
            (target / name / file.name).write_bytes(file.read_bytes())
        if "dtype" in checkpoint.components[name]:
            header, size = _header(library, cls, checkpoint.config(name), checkpoint.components[name]["dtype"])
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            with open(target / name / f"{stem}.safetensors", "wb") as weights:
                weights.write(len(header).to_bytes(8, "little") + header)
                weights.truncate(8 + len(header) + size)


@cache
def _header(library: str, cls: str, config: str, dtype: str) -> tuple[bytes, int]:
    """Return the header of a component's weight file, and the bytes of its data."""
    header: dict[str, Any] = {}
    end = 0
    for key, tensor in state_of(library, cls, config).items():
        kind = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
        start, end = end, end + tensor.numel() * kind.itemsize
        header[key] = {"dtype": HEADER_NAMES[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return json.dumps(header).encode(), end


@cache
def state_of(library: str, cls: str, config: str) -> dict[str, torch.Tensor]:
    """Return what a checkpoint of a component holds, under the names it is saved under, without data.

    `config` is the text of the component's `config.json`.
    """
    settings = json.loads(config)
    module_name = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    kind = getattr(importlib.import_module(module_name), cls)
    with init_empty_weights():
        if not issubclass(kind, PreTrainedModel):
            state: dict[str, torch.Tensor] = kind.from_config(settings).state_dict()
            return state
        module = kind(kind.config_class.from_dict(settings))
    module.tie_weights()
    once: dict[int, tuple[str, torch.Tensor]] = {}  # a tied weight is saved under the first of its names
    for key, tensor in module.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (key, tensor))
    saved: dict[str, torch.Tensor] = revert_weight_conversion(module, dict(once.values()))  # as older versions name it
    return saved


def planned(checkpoint: Published) -> dict[str, Any]:
    """Return what `triptych plan --json` prints for a checkpoint.

    Raises:
        RuntimeError: it is refused.
    """
    with tempfile.TemporaryDirectory(prefix="triptych-published-") as folder:
        lay_out(checkpoint, Path(folder))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = run(["plan", folder, "--json"])
    if status:
        raise RuntimeError(f"there is no plan of {checkpoint.name}")
    plan: dict[str, Any] = json.loads(printed.getvalue())
    return plan


def by_name(plan: Mapping[str, Any], role: str) -> int:
    """Return the bytes that a role would load if components were split by their names and loaded whole."""
    whole, used = plan["whole"]["components"], plan["roles"][role]["components"]
    if role == RoleType.MONOLITHIC:
        return sum(whole.values())
    return sum(
        size
        for name, size in whole.items()
        if get_module_role(name) in (RoleType(role), None) or used.get(name, {}).get("bytes")
    )


def page(plans: Iterable[tuple[Published, Mapping[str, Any]]]) -> str:
    """Return docs/families.md, with these checkpoints and their plans in its table."""
    plans = list(plans)
    checkpoints = [checkpoint for checkpoint, _ in plans]
    missing = sorted(set(describe(None, parameters=False)) - {each.pipeline for each in checkpoints})
    notes = [
        *(f"{each.name}: {each.source['note']}" for each in checkpoints if "note" in each.source),
        *(f"{each.name}: {note}." for each, plan in plans for note in plan["notes"]),
        *(f"No checkpoint here is a `{pipeline}`." for pipeline in missing),
    ]
    sections = (
        INTRODUCTION,
        _table(("pipeline", "task", "makes", "roles"), "llll", _served()),
        LOADED,
        _table(("checkpoint", "role", "loads", "of the model", "by name", "in part"), "llrrrl", _loaded(plans)),
        "".join(f"- {note}\n" for note in notes),
        DOUBTS,
        "".join(f"- {each.name}: {_doubts(each)}.\n" for each in checkpoints if each.doubts),
    )
    return "\n".join(sections)


def _served() -> Iterator[tuple[str, ...]]:
    for pipeline, family in describe(None, parameters=False).items():
        for row, (task, about) in enumerate(family["tasks"].items()):
            named = f"`{pipeline}`" if row == 0 else ""
            yield named, task, about["description"], " > ".join(about["roles"])


def _loaded(plans: Iterable[tuple[Published, Mapping[str, Any]]]) -> Iterator[tuple[str, ...]]:
    for checkpoint, plan in plans:
        whole = plan["whole"]["bytes"]
        name = f"[{checkpoint.name}](https://huggingface.co/{checkpoint.source['repository']})"
        heads = (name + ("\\*" if checkpoint.doubts else ""), f"`{checkpoint.pipeline}`", human(whole), "")
        for head, (role, loaded) in zip(heads, plan["roles"].items(), strict=True):
            partly = "; ".join(
                f"`{component}`: {each['need']}"
                for component, each in loaded["components"].items()
                if 0 < each["bytes"] < each["whole_bytes"]
            )
            share = f"{100 * loaded['bytes'] / whole:.1f} %"
            yield head, role, human(loaded["bytes"]), share, human(by_name(plan, role)), partly


def _doubts(checkpoint: Published) -> str:
    components: dict[str, list[str]] = {}
    for component, why in checkpoint.doubts.items():
        components.setdefault(why, []).append(f"`{component}`")
    return "; ".join(f"{why} ({', '.join(names)})" for why, names in components.items())


def _table(names: tuple[str, ...], alignment: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown; `alignment` has an `l` or an `r` for each column."""
    rule = tuple("---:" if side == "r" else "---" for side in alignment)
    return "".join("| " + " | ".join(row) + " |\n" for row in (names, rule, *rows))


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


if __name__ == "__main__":
    PAGE.write_text(page((each, planned(each)) for each in published()), encoding="utf-8")
