"""Tiny FastWan repositories: those of Wan, under the names of FastVideo's few-step pipelines.

Versions: `2.1` and `2.2-5b` make videos from text (`WanDMDPipeline`), `i2v` from text and a first frame
(`WanImageToVideoDmdPipeline`). As published, the scheduler in the folder is Wan's UniPC, which FastVideo does not use:
its 800 training timesteps and its shift (FastVideo: 1000, and another shift) would show.
"""

import json
from pathlib import Path

from . import wan, wan_i2v

VERSIONS = ("2.1", "2.2-5b", "i2v")


def build(path: Path, *, seed: int = 0, dtype: str = "float32", version: str = "2.1") -> Path:
    """Write the repository of one of `VERSIONS` to `path`."""
    if version not in VERSIONS:
        raise ValueError(f"version is one of {', '.join(VERSIONS)}, not {version}")
    if version == "i2v":
        wan_i2v.build(path, seed=seed, dtype=dtype, version="2.1")
    else:
        wan.build(path, seed=seed, dtype=dtype, version=version)
    index = json.loads((path / "model_index.json").read_text())
    index["_class_name"] = "WanImageToVideoDmdPipeline" if version == "i2v" else "WanDMDPipeline"
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
    return path
