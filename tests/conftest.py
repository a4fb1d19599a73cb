"""Settings of the whole test suite, and what unit and integration tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.plugins import EXAMPLE, install

# A deadline measures the machine: 200 ms an example, Hypothesis' default, is missed now and then on one that is busy. The blob
# that is printed with a failure repeats it elsewhere.
settings.register_profile("kdray", deadline=None, print_blob=True)
settings.load_profile("kdray")


@pytest.fixture(scope="session")
def example_plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example plugin as an installed distribution; `example_plugin` puts it on the path."""
    folder = tmp_path_factory.mktemp("plugins") / "site"
    install(EXAMPLE, folder)
    return folder


@pytest.fixture
def example_plugin(example_plugin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example plugin is installed, for this process and for those that it starts."""
    monkeypatch.syspath_prepend(str(example_plugin_folder))
    paths = [str(example_plugin_folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return example_plugin_folder
