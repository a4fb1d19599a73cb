"""Lines of libraries are in the run folder, errors and all else on the terminal, and nothing is lost without a folder."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.commands.library_log import FILE, LibraryLog, libraries_kept


@pytest.fixture
def names() -> Iterator[None]:
    """Loggers of libraries that were not imported yet; the real ones may be, in the process of the tests."""
    before = set(logging.Logger.manager.loggerDict)
    yield
    for name in set(logging.Logger.manager.loggerDict) - before:
        del logging.Logger.manager.loggerDict[name]


def library(name: str) -> logging.Logger:
    """A logger as libraries set it up: its own handler, and nothing passed on."""
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return logger


def test_warnings_of_libraries_wait_for_the_run_folder_and_are_told_of_once(
    names: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path | None = None
    with libraries_kept(lambda: folder):
        early = library("ray.authentication_for_this_test")
        early.warning("Token authentication is enabled")
        folder = tmp_path / "run" / "logs"
        late = library("vllm.for_this_test")
        late.info("Using the CPU backend")
        late.error("engine %s died", 3)
        library("my_grader").warning("no answer in row %s", 7)
    told = capsys.readouterr()
    kept = (folder / FILE).read_text().splitlines()
    assert ["WARNING ray.authentication_for_this_test: Token authentication is enabled" in kept[0], len(kept)] == [True, 3]
    assert kept[1].endswith("INFO vllm.for_this_test: Using the CPU backend")
    assert kept[2].endswith("ERROR vllm.for_this_test: engine 3 died")
    assert told.err.splitlines() == ["engine 3 died", "no answer in row 7"], "errors, and what is no library's"
    assert told.out == f"log of Ray, vLLM and other libraries: {folder / FILE}\n"
    early.warning("after the run")
    assert capsys.readouterr().err == "after the run\n"


def test_without_a_run_folder_lines_are_shown_after_all(names: None, capsys: pytest.CaptureFixture[str]) -> None:
    with libraries_kept(lambda: None):
        library("ray.for_this_test").warning("the reason, perhaps")
        assert capsys.readouterr().err == ""
    assert "the reason, perhaps" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = LibraryLog(lambda: tmp_path / "file" / "logs")
    log.keep("a line")
    assert (log.finish(), log.files) == (["a line"], [])


def test_python_warnings_are_kept_by_where_they_come_from(
    names: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, module in (("site-packages/torch", "quiet_for_this_test"), ("plugins", "loud_for_this_test")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / f"{module}.py").write_text(f"import warnings\nwarnings.warn('from {module}', stacklevel=1)\n")
        monkeypatch.syspath_prepend(str(tmp_path / place))
    with warnings.catch_warnings(), libraries_kept(lambda: tmp_path / "logs"):
        warnings.simplefilter("always")
        # pytest records warnings by a function of its own, which stands for the terminal here.
        importlib.import_module("quiet_for_this_test")
        with pytest.warns(UserWarning, match="from loud_for_this_test"):
            importlib.import_module("loud_for_this_test")
    assert "UserWarning" in (tmp_path / "logs" / FILE).read_text()
    assert "from quiet_for_this_test" in (tmp_path / "logs" / FILE).read_text()
    assert "quiet" not in capsys.readouterr().err


def test_ray_and_transformers_set_up_their_loggers_only_when_imported(tmp_path: Path) -> None:
    """What keeps their lines is there before they are: with another order of imports, they would go to the terminal."""
    program = (
        "import logging, pathlib, sys\n"
        "import cluster.cli\n"
        "assert not {'ray', 'transformers', 'torch', 'vllm'} & set(sys.modules), 'imported too early'\n"
        "from cluster.commands.library_log import libraries_kept\n"
        f"with libraries_kept(lambda: pathlib.Path({str(tmp_path)!r})):\n"
        "    import ray\n"
        "    from transformers.utils import logging as transformers_logging\n"
        "    logging.getLogger('ray._private.worker').warning('of ray')\n"
        "    transformers_logging.get_logger('transformers.models').warning('of transformers')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    text = (tmp_path / FILE).read_text()
    assert "WARNING ray._private.worker: of ray" in text
    assert "WARNING transformers.models: of transformers" in text
