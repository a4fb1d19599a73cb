"""Real engines on tiny models. What is slow to start is started once a session."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdray.config import TinyModel
from kdray.data.tasks import generate_examples
from kdray.models.resolve import build_tiny_model
from tests.support.runs import STARTED

# Nothing here may look outside; the tiny models are made on the spot.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Ray clusters are joined by address here, with the token that Ray keeps; read when Ray is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")

# Threads of one process that spin while they wait take the cores from the others here, of which there are more than cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell that starts this in the background has its children ignore Ctrl-C, which these tests send to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

VOCAB = 48
EOS = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.integration)


@dataclass
class TinyModels:
    """Folders and modules of random Llamas whose distributions differ clearly."""

    root: Path

    def make(self, name: str, layers: int, width: int, rows: int = VOCAB, tied: bool = False, seed: int = 0) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = self.root / name
        if folder.exists():
            return folder
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            head_dim=32,
            vocab_size=rows,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).float().save_pretrained(folder)
        return folder

    def load(self, folder: Path) -> Any:
        """The Hugging Face model in `folder`, float32."""
        from transformers import AutoModelForCausalLM

        if folder not in self._loaded:
            self._loaded[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return self._loaded[folder]

    def log_rows(self, folder: Path, prompt: np.ndarray, response: np.ndarray, vocab: int = VOCAB) -> torch.Tensor:
        """Hugging Face's log-softmax rows at the response's positions, [T, vocab], float32."""
        model = self.load(folder)
        ids = torch.from_numpy(np.concatenate([prompt, response])).long().unsqueeze(0)
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1, :vocab]
        return logits.log_softmax(-1)

    def __post_init__(self) -> None:
        self._loaded: dict[Path, torch.nn.Module] = {}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


def make_workplace(root: Path) -> Path:
    """A folder as a user has it: a teacher and a student saved by save_pretrained, prompts in a JSONL file."""
    build_tiny_model(
        TinyModel(type="tiny", layers=2, width=64, seed=1, train={"steps": 150, "difficulty": 1}), root / "teacher"
    )
    build_tiny_model(TinyModel(type="tiny", layers=2, width=64, tie_embeddings=True, seed=2), root / "student")
    with (root / "prompts.jsonl").open("w") as file:
        for example in generate_examples(["last_letters"], 1, 400, seed=3):
            file.write(json.dumps({"question": example.prompt, "answer": example.answer}) + "\n")
    return root


@pytest.fixture(autouse=True)
def _end_what_was_started() -> Iterator[None]:
    """A failed test must not leave its run to the next one: ask it to stop, and to stop at once."""
    yield
    for process in STARTED:
        for _ in range(2):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
        if process.poll() is None:
            process.kill()
    STARTED.clear()


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch) -> str:
    """An environment variable that every process of a run inherits."""
    value = f"{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("KDRAY_TEST_MARKER", value)
    return value
