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


def test_the_libraries_do_not_hold_up_the_start_of_ray_and_its_replicas() -> None:
    """A router imports them while its replicas do, and silences them before that."""
    imported = imported_after(
        "import triptych.cli.console as console; console.quieten_libraries_to_come(); import triptych.engine.ray"
    )
    assert {"ray", "torch"} <= imported
    assert not imported & {"diffusers", "transformers"}


def test_libraries_that_are_silenced_before_they_are_imported_stay_so() -> None:
    program = (
        "from triptych.cli.console import quieten_libraries_to_come; quieten_libraries_to_come();"
        "import diffusers.utils.logging as one, transformers.utils.logging as other;"
        "loggers = one.get_logger('diffusers.x'), other.get_logger('transformers.x');"
        "[each.warning('noise') for each in loggers]; [each.error('trouble') for each in loggers]"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stderr
    assert (told.count("noise"), told.count("trouble")) == (0, 2)
