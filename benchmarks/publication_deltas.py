"""Bytes of updates of a student that are sent by what they changed (`training.sync_full_every`), over those of a whole version.

    python -m benchmarks.publication_deltas

A student in bfloat16 with float32 masters is trained by AdamW, for learning rates and scales of the initial weights; every
update is published, and loaded again bit for bit. Then the times of one bucket, of which 2% change, in the rank and in a
replica. Writes benchmarks/results/publication_deltas.json.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from actors.student.trainer import Phase, StudentTrainer
from actors.weights.deltas import Chain
from kdray.config import ReverseKLLoss
from tests.integration.conftest import EOS, VOCAB, TinyModels
from tests.support.student_group import batches_of, training_of

_UPDATES = 12
_LEARNING_RATES = (1e-6, 5e-6, 2e-5)
_SCALES = (0.01, 0.02, 0.05)
"""Standard deviations of the initial weights: transformers' default is 0.02."""


def write_model(folder: Path, width: int, layers: int, scale: float, seed: int) -> Path:
    """A random Llama in bfloat16 as transformers makes it, with weights of a given standard deviation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        initializer_range=scale,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def updates(learning_rate: float, scale: float, folder: Path) -> dict[str, Any]:
    """Bytes of the updates of a student of 2.6M weights over those of a whole version: on-policy, reverse KL."""
    tiny = TinyModels(folder)
    teacher, student = tiny.make("teacher", 2, 64, seed=1), write_model(folder / f"student-{scale}", 256, 4, scale, seed=2)
    batches = batches_of(tiny, teacher, student, _UPDATES)
    training = training_of(backend={"type": "torch"}, precision="bf16", learning_rate=learning_rate)
    trainer = StudentTrainer(training, VOCAB, 0)
    trainer.start_phase(Phase("measure", str(student), None, ReverseKLLoss(type="reverse_kl"), learning_rate, _UPDATES))
    chain = Chain(_UPDATES + 1, lambda each: each)
    (bucket,) = trainer.weight_buckets()
    _, whole = chain.add(np.frombuffer(save(bucket), dtype=np.uint8))
    bytes_of, changed = [], []
    for batch in batches:
        trainer.train_step(batch)
        (bucket,) = trainer.weight_buckets()
        file = np.frombuffer(save(bucket), dtype=np.uint8)
        (first, *deltas), sent = chain.add(file)
        bytes_of.append(sent.nbytes / whole.nbytes)
        changed.append(sent.changed / sent.words)
        loaded = first.copy()
        for delta in deltas:
            delta.apply(loaded)
        if not np.array_equal(loaded, file):
            raise ValueError(f"update {batch.step} is not what was published")
    return {
        "learning_rate": learning_rate,
        "initial_scale": scale,
        "whole_bytes": whole.nbytes,
        "bytes_of_each_update_over_whole": bytes_of,
        "share_of_words_that_changed": changed,
        "tenth_update_over_whole": bytes_of[9],
    }


def one_bucket(mib: int = 256, share: float = 0.02) -> dict[str, Any]:
    """Seconds that changes add for a bucket: to find them in the rank, to apply them to the file in a replica."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**16, mib * 2**19).astype(np.uint16)
    newer = words.copy()
    newer[rng.random(len(newer)) < share] ^= 1
    chain = Chain(2, lambda each: each)
    chain.add(words.view(np.uint8))
    begun = time.perf_counter()
    (whole, delta), sent = chain.add(newer.view(np.uint8))
    found = time.perf_counter() - begun
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        begun = time.perf_counter()
        Path(file.name).write_bytes(whole.data)
        written = time.perf_counter() - begun
        begun = time.perf_counter()
        delta.apply(np.memmap(file.name, dtype=np.uint8, mode="r+"))
        applied = time.perf_counter() - begun
    return {
        "mib": mib,
        "share_of_words": share,
        "bytes_over_whole": sent.nbytes / whole.nbytes,
        "find_s": found,
        "write_whole_s": written,
        "apply_s": applied,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [updates(rate, scale, Path(folder)) for rate in _LEARNING_RATES for scale in _SCALES]
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    text = json.dumps({"machine": machine, "updates": rows, "one_bucket": one_bucket()}, indent=2)
    print(text)
    (Path(__file__).parent / "results" / "publication_deltas.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
