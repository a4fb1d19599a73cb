"""What importing each module of kdray loads, in a fresh interpreter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = ("ray", "vllm", "deepspeed")
LIGHT = ("kdray.config", "kdray.types", "kdray.interfaces", "kdray.errors", "kdray.rollouts.seeds", "cluster.cli")
ROOT = Path(importlib.util.find_spec("kdray").origin).parents[1]

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in (ROOT / "kdray").rglob("*.py")
)


IMPORT_ALL = """
import importlib, json, sys
loaded = {}
for module in json.loads(sys.argv[1]):
    before = set(sys.modules)
    importlib.import_module(module)
    loaded[module] = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps(loaded))
"""


def newly_loaded(*modules: str) -> dict[str, set[str]]:
    """Module -> top-level packages that came with it, the modules imported in this order in one fresh interpreter."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {module: set(names) for module, names in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    return newly_loaded(*MODULES)


def test_the_modules_are_found():
    assert {"kdray", "kdray.config", "kdray.runs.folder", "kdray.losses"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_loads_an_engine(loaded, module):
    assert loaded[module].isdisjoint(ENGINES)


@pytest.mark.parametrize("module", LIGHT)
def test_contracts_and_command_load_no_torch(module):
    assert newly_loaded(module)[module].isdisjoint({*ENGINES, "torch", "transformers"})
