"""Starting is immediate, because nothing heavy is imported before it is used. `bench/imports.py` has the times."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "numpy",
    "PIL",
    "av",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "fastapi",
    "uvicorn",
    "httpx",
    "ray",
)

PROBE = """
import json, sys
try:
    {code}
except SystemExit:
    pass
print("\\n" + json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def imported_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has imported after running `code`."""
    output = subprocess.run([sys.executable, "-c", PROBE.format(code=code)], check=True, capture_output=True, text=True)
    return set(json.loads(output.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import triptych; triptych.Request, triptych.RoleType, triptych.Result, triptych.State",
        "from triptych.cli import run; run(['--help'])",
        "from triptych.cli import run; run(['generate', '--help'])",
        "from triptych.cli import run; run(['--version'])",
        "from triptych.cli import run; run(['serve', '--help'])",
        "from triptych.cli import run; run(['serve', '--engine', 'local', '--pools', 'denoiser=2'])",
        "from triptych.cli import run; run(['top', '--help'])",
        "from triptych.cli import run; run(['families'])",
        "from triptych.cli import run; run(['generate', 'a fox', '--size', 'large'])",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    imported = imported_after(code)
    assert "triptych" in imported
    assert not imported & set(HEAVY)
