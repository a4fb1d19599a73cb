"""The character tokenizer gives text back exactly; tiny models are whole Hugging Face folders, built once."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdray.models.resolve
from kdray.config import TinyModel, TinyTraining
from kdray.data.tasks import generate_examples
from kdray.errors import DataError
from kdray.models.resolve import ALPHABET, OnStep, build_tiny_model, resolve_model, task_tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _tiny(**settings: Any) -> TinyModel:
    return TinyModel(**{"type": "tiny", "layers": 1, "width": 32, **settings})


def test_tokenizer_round_trips_text_after_a_reload(tmp_path: Path) -> None:
    task_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    texts = [ALPHABET, "  two  spaces , and a 'quote'.\n\n", *("".join(rng.choices(ALPHABET, k=40)) for _ in range(50))]
    for text in texts:
        token_ids = tokenizer(text)["input_ids"]
        assert len(token_ids) == len(text), "one token a character, nothing added around"
        assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode([*tokenizer("yes")["input_ids"], tokenizer.eos_token_id], skip_special_tokens=True) == "yes"
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")


def test_a_tiny_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    source = _tiny(width=64, layers=2, vocab_rows=128, tie_embeddings=True, max_positions=77)
    folder = build_tiny_model(source, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (2, 64, 128)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 32)
    assert config.max_position_embeddings == 77
    assert config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no staging folder is left behind"


def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    train = TinyTraining(steps=2, batch_size=4)
    state = torch.random.get_rng_state()
    weights = [
        load_file(build_tiny_model(_tiny(seed=seed, train=train), tmp_path / name) / "model.safetensors")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    same = [all(torch.equal(weights[0][key], other[key]) for key in weights[0]) for other in weights[1:]]
    assert same == [True, False]


def test_training_teaches_the_answer_and_where_it_ends(tmp_path: Path) -> None:
    """Fails if the targets are shifted, if the end is not learned, or if the loss counts something else."""
    train = TinyTraining(tasks=["coin_flip"], difficulty=1, steps=60, batch_size=32, learning_rate=1e-2)
    folder = build_tiny_model(_tiny(train=train), tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = []
    for example in generate_examples(["coin_flip"], 1, 20, seed=123):
        prompt = tokenizer(example.prompt, return_tensors="pt")
        response = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        right.append(tokenizer.decode(response) == example.answer + "<eos>")
    assert sum(right) >= 18


def test_a_tiny_model_is_built_once_for_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    build = build_tiny_model

    def counting(source: TinyModel, folder: Path, on_step: OnStep | None = None) -> Path:
        built.append(folder)
        return build(source, folder, on_step)

    monkeypatch.setattr(kdray.models.resolve, "build_tiny_model", counting)
    first = resolve_model(_tiny(), tmp_path / "cache")
    assert resolve_model(_tiny(), tmp_path / "cache") == first
    assert len(built) == 1
    assert resolve_model(_tiny(seed=1), tmp_path / "cache") != first
    assert resolve_model(_tiny(train=TinyTraining(steps=1, batch_size=1)), tmp_path / "cache") != first
    monkeypatch.setattr(kdray.models.resolve, "BUILDER_FORMAT", kdray.models.resolve.BUILDER_FORMAT + 1)
    assert resolve_model(_tiny(), tmp_path / "cache") != first
    assert len(built) == 4
    assert json.loads((Path(first) / "config.json").read_text())["model_type"] == "llama"


def test_training_tells_its_steps_and_ends_where_it_is_told(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    def on_step(done: int, total: int) -> None:
        steps.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    source = _tiny(train=TinyTraining(steps=4, batch_size=1))
    with pytest.raises(KeyboardInterrupt):
        resolve_model(source, tmp_path / "cache", on_step)
    assert steps == [(0, 4), (1, 4), (2, 4)]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "half a model is left behind"


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        resolve_model(_tiny(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_model_of_a_process_that_was_faster_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    rename = Path.rename

    def lose_the_race(staging: Path, target: Path) -> Path:
        target.mkdir()
        (target / "config.json").write_text("theirs")
        return rename(staging, target)

    monkeypatch.setattr(Path, "rename", lose_the_race)
    assert build_tiny_model(_tiny(), folder) == folder
    assert (folder / "config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_sources_that_are_no_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "student").mkdir(parents=True)
    (tmp_path / "mine" / "student" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for hub_id in ("gpt2", "org/model-7b", "meta-llama/Llama-3.1-8B"):
        assert resolve_model(hub_id, tmp_path) == hub_id
    assert resolve_model("mine/student", tmp_path) == str(tmp_path / "mine" / "student")
    for missing in ("/no/such", "./org/name", "runs/quick/student", "~/no-such-model-here"):
        with pytest.raises(DataError, match="no such folder"):
            resolve_model(missing, tmp_path)
    with pytest.raises(DataError, match=r"no config\.json"):
        resolve_model("empty", tmp_path)
    with pytest.raises(DataError, match="is a file"):
        resolve_model("mine/student/config.json", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_rows": 10}, r"vocab_rows=10 is less than the 99 tokens"),
        ({"max_positions": 16, "train": TinyTraining(steps=1, batch_size=2)}, r"max_positions=16 is less than"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        build_tiny_model(_tiny(**settings), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="already exists"):
        build_tiny_model(_tiny(), tmp_path)
