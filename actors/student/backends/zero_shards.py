"""Weights and optimizer state that any number of DeepSpeed ranks saved at any ZeRO stage, for any other number and stage.

DeepSpeed itself loads a checkpoint at the number of ranks and the stage that wrote it. Files are mapped into memory, so that a
parameter's part is read when it is asked for, and no rank ever holds the state of all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdray.errors import TrainingError

_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_WHOLE_MODEL, _FIRST_SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
_STEP = "step"


@dataclass(frozen=True)
class _Piece:
    """Consecutive elements of a parameter, within one flat group of one rank."""

    rank: int
    group: int
    start: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """Division of a checkpoint among the ranks that wrote it."""

    ranks: int
    zero_stage: int


class ZeroShards:
    """A checkpoint of all ranks, by the names of the module's trained parameters."""

    def __init__(self, folder: Path, load: Callable[[Path], Any], names: Sequence[Sequence[str]]) -> None:
        """Open a checkpoint's folder with the files of all ranks.

        Args: load: reads one of its files, mapped into memory; names: of the trained parameters in each of the optimizer's
        groups, in its order.
        Raises: TrainingError if files are missing, or their contents are not those of these parameters.
        """
        self._folder = folder
        self.plain, self.layout = first_file(folder, load)
        if self.layout.zero_stage == 0:
            self._unsharded(names)
            return
        found = {int(match[1]): path for path in folder.iterdir() if (match := _SHARD.search(path.name))}
        if sorted(found) != list(range(self.layout.ranks)):
            raise TrainingError(f"{folder}: has the optimizer states of ranks {sorted(found)}, not of all {self.layout.ranks}")
        states = [load(found[rank])["optimizer_state_dict"] for rank in range(self.layout.ranks)]
        stage_3 = self.layout.zero_stage == 3
        self._masters = [state["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"] for state in states]
        self._moments = [state["optimizer_state_dict" if stage_3 else "base_optimizer_state"]["state"] for state in states]
        self._pieces: dict[str, list[_Piece]] = {}
        for name, piece in self._of_parameters() if stage_3 else self._of_slices(states):
            self._pieces.setdefault(name, []).append(piece)
        if missing := [name for group in names for name in group if name not in self._pieces]:
            raise TrainingError(f"{folder}: no checkpoint of this student: {missing[0]} is not in it")

    def keys(self) -> list[str]:
        """Names of the optimizer's tensors for each parameter; empty before the first update."""
        return [name for name in self._first_moments() if name != _STEP]

    @property
    def step(self) -> float:
        """Number of updates, as the optimizer counts them for its bias correction."""
        return float(self._first_moments().get(_STEP, 0.0))

    def read(self, name: str, numel: int, key: str | None = None) -> torch.Tensor:
        """All elements of a parameter's float32 weights, or of one of the optimizer's tensors for it, as one row.

        Args: numel: elements of the parameter; key: one of `keys`; None: the weights.
        Raises: TrainingError if the checkpoint has another number of elements.
        """
        parts = []
        for piece in self._pieces[name]:
            flat = self._masters[piece.rank][piece.group] if key is None else self._moments[piece.rank][piece.group][key]
            parts.append(flat.flatten()[piece.start : piece.start + piece.numel])
        row = torch.cat(parts).float()
        if row.numel() != numel:
            raise TrainingError(
                f"{self._folder}: no checkpoint of this student: {name} has {row.numel()} elements, not {numel}"
            )
        return row

    # ------------------------------------------------------------------------------------------------------ inside

    def _first_moments(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = next(iter(self._moments[0].values()), {})
        return found

    def _unsharded(self, names: Sequence[Sequence[str]]) -> None:
        """Stage 0: every parameter is a flat group of its own."""
        flat = [name for group in names for name in group]
        optimizer, module = self.plain["optimizer"], self.plain["module"]
        if "fp32_groups" in optimizer:
            masters = [master for group in optimizer["fp32_groups"] for master in group]
            moments = optimizer["optimizer_state_dict"]["state"]
        else:
            masters, moments = [module[name] for name in flat if name in module], optimizer["state"]
        if len(masters) != len(flat):
            raise TrainingError(f"{self._folder}: no checkpoint of this student: {len(masters)} parameters, not {len(flat)}")
        self._masters, self._moments = [masters], [moments]
        self._pieces = {name: [_Piece(0, number, 0, masters[number].numel())] for number, name in enumerate(flat)}

    def _of_slices(self, states: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, _Piece]]:
        """Stages 1 and 2: ranks cut the concatenated parameters of a group, and record which they have."""
        for rank, state in enumerate(states):
            for group, slices in enumerate(state["param_slice_mappings"]):
                for name, each in slices.items():
                    yield name, _Piece(rank, group, each.start, each.numel)

    def _of_parameters(self) -> Iterator[tuple[str, _Piece]]:
        """Stage 3: every parameter is cut into equal parts, of which the last may be padded."""
        ranks, group, start = self.layout.ranks, 0, 0
        for shapes in self.plain["param_shapes"]:
            for name, shape in shapes.items():
                numel = math.prod(shape)
                part = -(-numel // ranks)
                if start == self._masters[0][group].numel():
                    group, start = group + 1, 0
                for rank in range(ranks):
                    yield name, _Piece(rank, group, start, max(0, min(part, numel - rank * part)))
                start += part


def first_file(folder: Path, load: Callable[[Path], Any]) -> tuple[dict[str, Any], Layout]:
    """Contents of the file that rank 0 wrote for all, and the layout that it names. Raises: TrainingError if there is none."""
    found = [folder / name for name in (_WHOLE_MODEL, _FIRST_SHARD) if (folder / name).is_file()]
    if not found:
        raise TrainingError(f"{folder}: no checkpoint that training.backend.type=deepspeed wrote")
    plain = load(found[0])
    stage = int(plain["ds_config"]["zero_optimization"]["stage"])
    # Without ZeRO, rank 0 writes everything, and the file does not depend on the number of ranks.
    return plain, Layout(int(plain["dp_world_size"]) if stage else 1, stage)


def restore(engine: Any, zero_stage: int, shards: ZeroShards, groups: Sequence[Mapping[str, torch.nn.Parameter]]) -> None:
    """Give a freshly started DeepSpeed engine the weights and optimizer state of a checkpoint, divided as this engine does.

    Args: groups: trained parameters of each of the optimizer's groups by name, in its order.
    Raises: TrainingError if the engine keeps its optimizer state on NVMe.
    """
    wrapper = engine.optimizer
    base = getattr(wrapper, "optimizer", wrapper)
    if zero_stage == 3:
        if wrapper.swap_optimizer:
            raise TrainingError("a checkpoint of other ranks cannot be loaded into optimizer state on NVMe; offload it to cpu")
        wrapper.checkpoint_event_prologue()
    keys = shards.keys()
    with torch.no_grad():
        for number, group in enumerate(groups):
            for index, (name, parameter) in enumerate(group.items()):
                numel = getattr(parameter, "ds_numel", parameter.numel())
                row = shards.read(name, numel)
                _compute_copy(parameter, zero_stage).copy_(_part(parameter, row, zero_stage))
                home = _home(wrapper, base, zero_stage, parameter, (number, index))
                if home is None:
                    continue
                flat, start, first, count = home
                _fill(flat, start, row[first : first + count])
                state = base.state[flat]
                for key in keys:
                    if key not in state:
                        state[key] = torch.zeros_like(flat)
                    _fill(state[key], start, shards.read(name, numel, key)[first : first + count])
        if keys:
            for state in base.state.values():
                before = state.get(_STEP)
                on = before.device if isinstance(before, torch.Tensor) else _step_device(base)
                state[_STEP] = torch.tensor(shards.step, dtype=torch.float32, device=on)
    if zero_stage == 3:
        wrapper.checkpoint_event_epilogue()


def _home(
    wrapper: Any, base: Any, zero_stage: int, parameter: Any, place: tuple[int, int]
) -> tuple[torch.Tensor, int, int, int] | None:
    """The optimizer's float32 tensor that holds this rank's elements of a parameter, their start there, the first of them and
    their number; None if this rank holds none. Args: place: group of the optimizer, and position there."""
    if zero_stage == 3:
        group, start, count = wrapper.grad_position[wrapper.get_param_id(parameter)]
        return wrapper.fp32_partitioned_groups_flat[group], start, dist.get_rank() * parameter.ds_tensor.ds_numel, count
    if zero_stage:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        own, within = mapping.lp_fragment_address, mapping.hp_fragment_address
        return base.param_groups[place[0]]["params"][0], within.start, own.start, within.numel
    flat = base.param_groups[place[0]]["params"][place[1]]
    return flat, 0, 0, flat.numel()


def _compute_copy(parameter: Any, zero_stage: int) -> torch.Tensor:
    """The tensor that forward passes use, or this rank's part of it, as a row."""
    held: torch.Tensor = parameter.ds_tensor if zero_stage == 3 else parameter
    return held.data.view(-1)


def _part(parameter: Any, row: torch.Tensor, zero_stage: int) -> torch.Tensor:
    """The elements that belong into `_compute_copy`, padded as DeepSpeed does."""
    if zero_stage < 3:
        return row
    count = parameter.ds_tensor.ds_numel
    part = row[dist.get_rank() * count : (dist.get_rank() + 1) * count]
    return torch.nn.functional.pad(part, (0, count - part.numel()))


def _fill(flat: torch.Tensor, start: int, values: torch.Tensor) -> None:
    flat.data.view(-1)[start : start + values.numel()].copy_(values)


def _step_device(base: Any) -> torch.device:
    """Where AdamW keeps its count: with its parameters in the fused kernel, on the CPU otherwise."""
    group = base.param_groups[0]
    parameters = group["params"]
    return parameters[0].device if parameters and (group.get("fused") or group.get("capturable")) else torch.device("cpu")
