"""Encoder inputs of ours: the wire from the processor to model, runner and scheduler.

They travel beside the pixels on the CPU, also where vLLM strips all else (a prefix hit). A field
belongs to one modality in vLLM, so each modality has its own names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from era_vllm.plan import Plan
from era_vllm.vllm_plugin.layouts import Layouts

NUM_ANCHORS: Final = "era_num_anchors"
"""K of each segment, int64 [segments]."""
PIXEL_HASH: Final = "era_pixel_hash"
"""Hash of the item's pixels, int64 []."""
SHAPE: Final = "era_shape"
"""``Layout.shape``, int64."""
QUESTION: Final = "era_question"
"""``Plan.question``, int64 [tokens]; only where ``EraConfig.question_aware``."""
WORK: Final = "era_work"
"""``Layout.work``, int64 []: what the scheduler's budget of a step is counted in."""
NAMES: Final = (NUM_ANCHORS, PIXEL_HASH, SHAPE, WORK)


def field(name: str, modality: str) -> str:
    """Return the name of a field of ours for a modality."""
    return name if modality == "image" else f"{modality}_{name}"


@dataclass(frozen=True, slots=True)
class Planned:
    """An item on its way to the encoder."""

    plan: Plan
    pixel_hash: int


def names(*, question_aware: bool) -> tuple[str, ...]:
    """Return what travels beside an item."""
    return (*NAMES, QUESTION) if question_aware else NAMES


def pack_items(
    plans: Sequence[Plan], hashes: Sequence[int], modality: str, *, question_aware: bool = False
) -> dict[str, list[Tensor] | Tensor]:
    """Return the fields of some items."""
    values: dict[str, list[Tensor] | Tensor] = {
        NUM_ANCHORS: [torch.tensor(plan.num_anchors) for plan in plans],
        PIXEL_HASH: torch.tensor(hashes),
        SHAPE: [torch.tensor(plan.layout.shape, dtype=torch.int64) for plan in plans],
        WORK: torch.tensor([plan.layout.work for plan in plans]),
    }
    if question_aware:
        values[QUESTION] = [torch.tensor(plan.question, dtype=torch.int64) for plan in plans]
    return {field(name, modality): value for name, value in values.items()}


def unpack_items(inputs: dict[str, object], layouts: Layouts, modality: str) -> list[Planned]:
    """Take the fields of a batch of items out of the encoder's inputs. Mutates: inputs."""
    columns = [list(inputs.pop(field(name, modality))) for name in NAMES]  # type: ignore[arg-type]
    asked = inputs.pop(field(QUESTION, modality), None)
    questions = [()] * len(columns[0]) if asked is None else [tuple(one.tolist()) for one in asked]  # type: ignore[attr-defined]
    return [
        Planned(
            Plan(layouts(modality, tuple(shape.tolist())), tuple(counts.tolist()), question),
            int(pixel_hash),
        )
        for (counts, pixel_hash, shape, _), question in zip(
            zip(*columns, strict=True), questions, strict=True
        )
    ]


def modality_of(inputs: Mapping[str, object], modalities: Sequence[str]) -> str:
    """Return the modality of a batch of items: vLLM sends one at a time."""
    return next(name for name in modalities if field(SHAPE, name) in inputs)


def work_of(data: Mapping[str, object] | None, modality: str) -> int | None:
    """Return an item's work for the scheduler; None where this process does not hold it."""
    name = field(WORK, modality)
    if data is None or name not in data:
        return None
    return int(data[name].data)  # type: ignore[attr-defined]


def shape_of(data: Mapping[str, object], modality: str) -> tuple[int, ...]:
    """Return an item's shape from what is left of it for the runner."""
    return tuple(data[field(SHAPE, modality)].data.tolist())  # type: ignore[attr-defined]
