"""A cut model is the source with layers skipped, and with neurons and heads at zero; everything kept is the source itself."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from kdray.checks.preflight import check
from kdray.config import PrunedModel, TinyModel, parse_config
from kdray.errors import ConfigError, DataError
from kdray.models.inspect import shape
from kdray.models.pruning import activation_importance, plan_pruning, prune, weight_importance
from kdray.models.resolve import build_tiny_model, resolve_model, task_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
}
TOKENS = torch.arange(2 * 11).reshape(2, 11) % 40


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _model(family: str) -> PreTrainedModel:
    """A random model in float64 whose biases and norms are random too, so that none of them can be forgotten."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 + ("norm" in name))
    return model


def _cut(model: PreTrainedModel, **wanted: Any) -> PreTrainedModel:
    plan = plan_pruning(model.config, PrunedModel(type="pruned", source="unused", **wanted))
    cut = AutoModelForCausalLM.from_config(plan.config).double().eval()
    cut.load_state_dict(prune(model.state_dict(), plan))
    return cut


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_with_everything_kept_it_is_the_source(family: str) -> None:
    model = _model(family)
    for wanted in ({}, {"layers": 4, "intermediate_size": 20, "num_key_value_heads": 3}):
        assert torch.equal(_logits(_cut(model, **wanted)), _logits(model))


@pytest.mark.parametrize(("wanted", "layers"), [(2, [0, 3]), (3, [0, 2, 3]), ([1, 2], [1, 2]), ([2], [2])])
@pytest.mark.parametrize("family", CONFIGS)
def test_fewer_layers_are_the_source_without_the_others(family: str, wanted: int | list[int], layers: list[int]) -> None:
    model = _model(family)
    by_hand = copy.deepcopy(model)
    by_hand.model.layers = nn.ModuleList(by_hand.model.layers[layer] for layer in layers)
    by_hand.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        # Transformers reads a layer's kind of attention from the config, by its place.
        by_hand.config.layer_types = [model.config.layer_types[layer] for layer in layers]
    for index, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = index
    assert torch.equal(_logits(_cut(model, layers=wanted)), _logits(by_hand))


def test_windows_of_attention_stay_with_their_layers() -> None:
    config = CONFIGS["qwen2"]()
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    cut = plan_pruning(config, _pruned("unused", layers=[1, 2, 3])).config
    assert cut.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    assert cut.max_window_layers == 1


def test_the_kept_layers_are_evenly_spaced() -> None:
    def layers(wanted: int, count: int) -> list[int]:
        config = LlamaConfig(**SIZES | {"num_hidden_layers": count})
        return plan_pruning(config, PrunedModel(type="pruned", source="unused", layers=wanted)).layers

    assert layers(2, 32) == [0, 31]
    assert layers(5, 9) == [0, 2, 4, 6, 8]
    for count in range(2, 40):
        for wanted in range(2, count + 1):
            found = layers(wanted, count)
            gaps = {after - before for before, after in pairwise(found)}
            assert (found[0], found[-1], len(found)) == (0, count - 1, wanted)
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("family", CONFIGS)
def test_fewer_neurons_are_the_source_with_the_others_at_zero(family: str) -> None:
    """Which ones is worked out again from the modules, with norms of vectors."""
    model = _model(family)
    zeroed = copy.deepcopy(model)
    for layer in zeroed.model.layers:
        mlp = layer.mlp
        scores = torch.stack([_norm_of(mlp, neuron) for neuron in range(20)])
        out = scores.argsort()[: 20 - 7]
        assert len(set(out.tolist()) & set(range(7))) > 0, "the first ones are not simply the best ones"
        with torch.no_grad():
            mlp.down_proj.weight[:, out] = 0.0
    cut = _cut(model, intermediate_size=7)
    assert cut.model.layers[0].mlp.up_proj.out_features == 7
    torch.testing.assert_close(_logits(cut), _logits(zeroed), rtol=0, atol=1e-11)
    assert (_logits(cut) - _logits(model)).abs().max() > 1e-3


def _norm_of(mlp: nn.Module, neuron: int) -> torch.Tensor:
    own = [mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron], mlp.down_proj.weight[:, neuron]]
    if mlp.gate_proj.bias is not None:
        own += [mlp.gate_proj.bias[neuron : neuron + 1], mlp.up_proj.bias[neuron : neuron + 1]]
    return torch.cat(own).norm()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_fewer_heads_are_the_source_with_the_others_outputs_at_zero(family: str) -> None:
    model = _model(family)
    zeroed = copy.deepcopy(model)
    dropped = []
    for layer in zeroed.model.layers:
        attention = layer.self_attn
        scores = []
        for group in range(3):
            queries, keys = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
            own = [attention.q_proj.weight[queries], attention.k_proj.weight[keys], attention.v_proj.weight[keys]]
            own += [attention.o_proj.weight[:, queries]]
            if attention.q_proj.bias is not None:
                own += [attention.q_proj.bias[queries], attention.k_proj.bias[keys], attention.v_proj.bias[keys]]
            scores.append(torch.cat([part.flatten() for part in own]).norm())
        dropped.append(int(torch.stack(scores).argmin()))
        with torch.no_grad():
            attention.o_proj.weight[:, 16 * dropped[-1] : 16 * dropped[-1] + 16] = 0.0
    assert set(dropped) != {2}, "the last ones are not simply the worst ones"
    cut = _cut(model, num_key_value_heads=2)
    assert (cut.config.num_attention_heads, cut.config.num_key_value_heads, cut.config.head_dim) == (4, 2, 8)
    torch.testing.assert_close(_logits(cut), _logits(zeroed), rtol=0, atol=1e-11)
    assert (_logits(cut) - _logits(model)).abs().max() > 1e-3


def test_importance_by_hand() -> None:
    layer = {
        "mlp.gate_proj.weight": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        "mlp.gate_proj.bias": torch.tensor([3.0, 0.0]),
        "mlp.up_proj.weight": torch.tensor([[0.0, 0.0], [2.0, 0.0]]),
        "mlp.down_proj.weight": torch.tensor([[1.0, 0.0], [1.0, 5.0]]),
        "mlp.down_proj.bias": torch.tensor([9.0, 9.0]),
        # One query head and one key-value head of two channels, twice; a hidden size of 1.
        "self_attn.q_proj.weight": torch.tensor([[1.0], [1.0], [2.0], [0.0]]),
        "self_attn.k_proj.weight": torch.tensor([[0.0], [3.0], [0.0], [0.0]]),
        "self_attn.v_proj.weight": torch.tensor([[1.0], [0.0], [0.0], [1.0]]),
        "self_attn.o_proj.weight": torch.tensor([[1.0, 0.0, 2.0, 2.0]]),
    }
    importance = weight_importance(layer, 2)
    assert importance.neurons.tolist() == [1 + 4 + 9 + 1 + 1, 1 + 4 + 25]
    assert importance.groups.tolist() == [1 + 1 + 9 + 1 + 1, 4 + 1 + 4 + 4]


@pytest.mark.parametrize("family", CONFIGS)
def test_activation_importance_is_what_dropping_one_part_changes(family: str) -> None:
    """Each neuron and each group is really dropped, and the block's outputs on all tokens compared."""
    model = _model(family)
    texts = [[3, 17, 9, 30, 2], [5], list(range(20, 33))]
    found = activation_importance(model, texts)
    assert len(found) == 4
    for index in (0, 3):
        layer = model.model.layers[index]
        for module, width, importance in (
            (layer.mlp.down_proj, 1, found[index].neurons),
            (layer.self_attn.o_proj, 16, found[index].groups),
        ):
            before = _outputs(model, module, texts)
            changes = []
            for part in range(len(importance)):
                columns = slice(part * width, (part + 1) * width)
                weight = module.weight.detach().clone()
                with torch.no_grad():
                    module.weight[:, columns] = 0.0
                changes.append((_outputs(model, module, texts) - before).square().sum(1).mean())
                with torch.no_grad():
                    module.weight.copy_(weight)
            torch.testing.assert_close(importance, torch.stack(changes), rtol=1e-5, atol=0)
    assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks, "the model is left as it was"


def _outputs(model: PreTrainedModel, module: nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """What `module` writes at all tokens of all texts, [tokens, hidden]."""
    written: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: written.append(output[0]))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text]))
    hook.remove()
    return torch.cat(written)


def test_calibration_decides_what_is_kept(tmp_path: Path) -> None:
    origin = build_tiny_model(_tiny(layers=1), tmp_path / "origin")
    lines = ["a b c", "12+7=", "a b c d e f g"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    calibration = {"source": {"type": "jsonl", "path": str(tmp_path / "texts.jsonl")}, "documents": 2, "tokens": 4}
    source = _pruned(str(origin), intermediate_size=40, calibration=calibration)
    folder = Path(resolve_model(source, tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(origin)
    ids = [task_tokenizer()(line)["input_ids"][:4] for line in lines[:2]]
    kept = activation_importance(model, ids)[0].neurons.argsort(descending=True)[:40].sort().values
    found = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight
    assert torch.equal(found, model.model.layers[0].mlp.up_proj.weight[kept])
    by_weight = weight_importance(model.model.layers[0].state_dict(), 2).neurons.argsort(descending=True)[:40].sort().values
    assert not torch.equal(kept, by_weight)
    # Other texts in the same file are another model; other texts behind those that are read are not.
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    assert resolve_model(source, tmp_path / "cache") == str(folder)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in reversed(lines)))
    assert resolve_model(source, tmp_path / "cache") != str(folder)


def test_calibration_texts_that_cannot_be_read_are_refused_at_start(tmp_path: Path) -> None:
    model = {"type": "pruned", "source": {"type": "tiny", "layers": 3, "width": 64}, "intermediate_size": 8}
    for source, message in [
        ({"type": "jsonl", "path": str(tmp_path / "none.jsonl")}, r"model\.calibration\.source\.path=.*no such file"),
        ({"type": "jsonl", "path": str(tmp_path / "empty.jsonl")}, r"model\.calibration\.source: no document"),
    ]:
        (tmp_path / "empty.jsonl").write_text("")
        with pytest.raises(DataError, match=message):
            check(_config(tmp_path, model | {"calibration": {"source": source}}))


# --------------------------------------------------------------------------------------------------------- folders


def _tiny(**settings: Any) -> TinyModel:
    return TinyModel(**{"type": "tiny", "layers": 3, "width": 64, "max_positions": 77, **settings})


def _pruned(source: Any, **wanted: Any) -> PrunedModel:
    return PrunedModel(type="pruned", source=source, **wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_a_pruned_model_is_an_ordinary_folder(tmp_path: Path, tied: bool) -> None:
    origin = build_tiny_model(_tiny(tie_embeddings=tied), tmp_path / "origin")
    wanted = {"layers": [0, 2], "intermediate_size": 32, "num_key_value_heads": 1}
    folder = Path(resolve_model(_pruned(str(origin), **wanted), tmp_path / "cache"))
    source, cut = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (origin, folder))
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (2, 32, 64)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (1, 1, 32)
    assert cut.dtype == torch.float32
    assert (cut.get_input_embeddings().weight is cut.get_output_embeddings().weight) == tied
    assert torch.equal(_logits(cut.double()), _logits(_cut(source.double(), **wanted)))
    assert cut.generation_config.eos_token_id == source.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == task_tokenizer().get_vocab()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name], "no staging folder is left behind"


def test_it_is_built_once_for_its_source_and_settings(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    origin = build_tiny_model(_tiny(), tmp_path / "origin")
    first = resolve_model(_pruned(str(origin), layers=2), cache)
    written = (Path(first) / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(_pruned(str(origin), layers=2), cache) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == written
    moved = shutil.copytree(origin, tmp_path / "moved")
    assert resolve_model(_pruned(str(moved), layers=2), cache) == first, "the same weights in another place"
    assert resolve_model(_pruned(str(origin), layers=[0, 1]), cache) != first
    # Other weights under the same name, of the same size.
    shutil.rmtree(origin)
    build_tiny_model(_tiny(seed=1), origin)
    assert resolve_model(_pruned(str(origin), layers=2), cache) != first


def test_a_tiny_source_is_built_first(tmp_path: Path) -> None:
    folder = Path(resolve_model(_pruned(_tiny(), layers=2), tmp_path))
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["pruned", "tiny"]
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        (lambda: GPT2Config(), {"layers": 2}, "a gpt2 cannot be pruned here, only llama, mistral, qwen2, qwen3"),
        (CONFIGS["llama"], {"layers": 5}, r"layers=5: the source has 4"),
        (CONFIGS["llama"], {"layers": [1, 0]}, r"layers=\[1, 0\]: list each layer once, ascending"),
        (CONFIGS["llama"], {"layers": [1, 1]}, "list each layer once"),
        (CONFIGS["llama"], {"layers": [0, 4]}, "the source has layers 0 to 3"),
        (CONFIGS["llama"], {"intermediate_size": 21}, "intermediate_size=21: the source has 20 neurons"),
        (CONFIGS["llama"], {"num_key_value_heads": 4}, "num_key_value_heads=4: the source has 3"),
        (CONFIGS["qwen2"], {"num_key_value_heads": 2}, "vLLM derives the size of a qwen2's heads"),
        (lambda: LlamaConfig(**SIZES, quantization_config={"quant_method": "x"}), {}, "its weights are quantised"),
    ],
)
def test_what_cannot_be_cut_is_refused(config: Any, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_pruning(config(), _pruned("some/source", **wanted))


def _config(tmp_path: Path, model: Any, **student: Any) -> Any:
    tree = {
        "run": {"name": "pruned", "output": str(tmp_path / "runs")},
        "data": {"max_prompt_tokens": 40, "prompts": {"type": "task", "difficulty": 1}},
        "student": {"model": model, **student},
        "teachers": {"t": {"model": {"type": "tiny", "layers": 3, "width": 64}}},
        "rollout": {"max_new_tokens": 8},
    }
    return parse_config(tree)


def test_preflight_reads_the_sources_config_and_builds_nothing(tmp_path: Path) -> None:
    model = {"type": "pruned", "source": {"type": "tiny", "layers": 3, "width": 64, "vocab_rows": 128}, "layers": 2}
    config = _config(tmp_path, model | {"intermediate_size": 100})
    checked = check(config)
    assert not (tmp_path / "runs").exists()
    assert checked.tokenizer.get_vocab() == task_tokenizer().get_vocab()
    assert checked.vocab_size == len(task_tokenizer())
    assert checked.lines[0] == (
        "student: cut from tiny, 3 layers of 64: layers 0, 2 of 3, 100 of 128 neurons, 2 of 2 key-value heads, "
        "128 vocabulary rows"
    )
    assert shape(config.student.model, None) == (128, 512)
    with pytest.raises(ConfigError, match="layers=4: the source has 3"):
        check(_config(tmp_path, model | {"layers": 4}))
    with pytest.raises(ConfigError, match=r"revision=main: .* set model\.revision"):
        check(_config(tmp_path, model, revision="main"))


def test_the_end_of_sequence_ids_are_the_sources(tmp_path: Path) -> None:
    origin = build_tiny_model(_tiny(), tmp_path / "origin")
    generation = json.loads((origin / "generation_config.json").read_text())
    (origin / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [1, 7]}))
    assert check(_config(tmp_path, {"type": "pruned", "source": str(origin), "layers": 2})).stop_ids == (1, 7)


def test_a_quantised_student_is_refused(tmp_path: Path) -> None:
    origin = build_tiny_model(_tiny(), tmp_path / "origin")
    config = json.loads((origin / "config.json").read_text())
    (origin / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "compressed-tensors"}}))
    for model in (str(origin), {"type": "pruned", "source": str(origin)}):
        with pytest.raises(ConfigError, match="its weights are quantised"):
            check(_config(tmp_path, model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "prunned", "source": "a/b"}, "student.model: expected a folder, a hub id, or a section with `type: tiny` or"),
        ({"type": "pruned"}, "student.model.source: required"),
        (
            {"type": "pruned", "source": {"type": "pruned", "source": "a/b"}},
            "student.model.source: expected a folder, a hub id, or a section with `type: tiny`",
        ),
        ({"type": "pruned", "source": "a/b", "layer": 2}, "student.model.layer: unknown key; did you mean `layers`"),
        (
            {"type": "pruned", "source": "a/b", "layers": 1},
            "student.model.layers=1: input should be greater than",
        ),
        ({"type": "tiny", "layer": 2}, "student.model.layer: unknown key; did you mean `layers`"),
        ({"width": 64}, "student.model.type: required"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _config(tmp_path, model)
    assert message in str(refused.value)
