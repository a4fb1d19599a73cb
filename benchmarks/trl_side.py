"""The trainer's side of `against_trl.py`, run in the environment that holds TRL; it imports nothing of kdray.

Arguments: the size as JSON, the learning rate, the folder with `student`, `teacher` and `prompts.jsonl`. Writes `trl.json`
there: [time, response tokens] of every step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DistillationConfig, DistillationTrainer


class Timed(DistillationTrainer):
    """Notes the end and the response tokens of every step."""

    steps: list[tuple[float, int]]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.tokens = int(self._buffered_inputs[0]["completion_mask"].sum())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.steps.append((time.time(), self.tokens))
        super().log(logs, start_time)


def main() -> None:
    size, rate, folder = json.loads(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=size["batch"],
        max_completion_length=size["new_tokens"],
        learning_rate=rate,
        max_steps=size["steps"],
        beta=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
    )
    trainer = Timed(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
    )
    trainer.steps = []
    trainer.train()
    (folder / "trl.json").write_text(json.dumps(trainer.steps))


if __name__ == "__main__":
    main()
