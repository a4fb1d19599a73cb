"""Cost of what scoring records, beside the forward pass that it needs anyway: `python -m benchmarks.scoring_rows`.

Hidden states of a few layers of a real width, the output head over a real vocabulary, and then the teacher's columns of each
row: log p, its top 64, the mass outside. Baseline: the same layers and head, nothing recorded. The layers are a tenth of such a
model's, so that the share of recording is overstated. Sides alternate in one process. Writes
benchmarks/results/scoring_rows.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

from actors.vllm_plugin.row_statistics import Rows, RowStatistics, probabilities
from benchmarks import measured

WIDTH = 2048
LAYERS = 3
TOKENS = 256
"""As many rows as the recorder measures at once."""
TOP_K = 64
ROUNDS = 5
VOCABULARIES = (32_000, 152_000)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def measure(vocabulary: int) -> dict[str, Any]:
    """Seconds of the forward pass, of the head, and of head and recording."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=64,
    )
    layers = LlamaModel(config).eval()
    head = torch.randn(vocabulary, WIDTH) / WIDTH**0.5
    ids = torch.randint(0, 64, (1, TOKENS))
    tokens = torch.randint(0, vocabulary, (TOKENS,))
    versions = torch.zeros(TOKENS, dtype=torch.long)
    statistics_of = RowStatistics(teacher_top_k=TOP_K, student_top_k=0, record_hidden=False)

    def hidden() -> torch.Tensor:
        return layers(ids).last_hidden_state[0]

    def recorded() -> None:
        states = hidden()
        rows = Rows((states @ head.T).log_softmax(-1), None, states)
        statistics_of.measure(rows, probabilities(rows), tokens, versions)

    found: dict[str, list[float]] = {"layers": [], "layers and head": [], "layers, head and recording": []}
    for _ in range(ROUNDS + 1):
        found["layers"].append(_seconds(hidden))
        found["layers and head"].append(_seconds(lambda: hidden() @ head.T))
        found["layers, head and recording"].append(_seconds(recorded))
    # The first round warms up.
    medians = {name: statistics.median(values[1:]) for name, values in found.items()}
    return {
        "vocabulary": vocabulary,
        "seconds": medians,
        "without_over_with": medians["layers and head"] / medians["layers, head and recording"],
    }


def main() -> None:
    rows = [measure(vocabulary) for vocabulary in VOCABULARIES]
    for row in rows:
        print(row)
    figures = {"width": WIDTH, "layers": LAYERS, "tokens": TOKENS, "vocabularies": rows}
    measured.write("scoring_rows", ("torch", "transformers"), figures)


if __name__ == "__main__":
    main()
