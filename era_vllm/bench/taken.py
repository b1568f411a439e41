"""What an engine in this process put in the place of pictures and videos, for plain transformers.

``set_environment`` of ``setup.py`` comes before, as of ``engines.py``. Leaves out what is done with
it (``cli/doctor/check.py``, ``lab/calibrate.py``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn
from vllm import LLM, SamplingParams

from era_vllm.errors import UnsupportedError
from era_vllm.lab.asking import Subject, messages_of
from era_vllm.lab.calibrate import Case
from era_vllm.lab.oracle import Segment
from era_vllm.vllm_plugin.injection import taken_apart
from era_vllm.vllm_plugin.packing import unpack
from era_vllm.vllm_plugin.reducer import PrunedItem


@dataclass
class Taken:
    """Items that an engine pruned, in the order in which it did."""

    items: list[PrunedItem] = field(default_factory=list)
    layers: int = 0
    """Of which states are injected."""

    @classmethod
    def of(cls, llm: LLM) -> Self:
        """Listen to an engine from now on."""
        found = cls()

        def listen(model: nn.Module) -> None:
            era: Any = model.era
            found.layers = era.scout if era.scout_injection else 0
            model.reducer.listeners.append(found.items.extend)

        llm.apply_model(listen)
        return found

    def segments(self) -> list[Segment]:
        """Return what stands in the runs of all items."""
        return [run for item in self.items for run in runs_of(item, self.layers)]


def cases_of(
    llm: LLM, taken: Taken, rates: Sequence[float], number: int, subject: Subject
) -> Iterator[Case]:
    """Yield a case for each question about a subject, at one of the rates in turn.

    Args:
        llm: float32, without a prefix cache.
        rates: As of ``lab/calibrate.py``.
        number: Of the subject.

    Raises:
        UnsupportedError: two of its pictures are the same, of which the engine encodes one.
    """
    greedy = SamplingParams(max_tokens=1, temperature=0)

    def asked(messages: list[dict[str, Any]], rate: float) -> tuple[list[int], list[Segment]]:
        llm.llm_engine.reset_encoder_cache()
        taken.items.clear()
        (output,) = llm.chat([messages], greedy, use_tqdm=False, mm_processor_kwargs={"era": rate})
        if len(taken.items) != len(subject.media):
            raise UnsupportedError(
                f"picture {number}: got {len(subject.media)} pictures of which the engine encoded "
                f"{len(taken.items)}, needed different ones"
            )
        return list(output.prompt_token_ids), taken.segments()

    for index, messages in enumerate(messages_of(subject), number // 2):
        yield Case(*asked(messages, 0.0), *asked(messages, rates[index % len(rates)]), number)


def runs_of(item: PrunedItem, layers: int = 0) -> list[Segment]:
    """Return what stands in each of an item's runs, as it goes to the language model.

    Args:
        layers: Of which states are injected.
    """
    plan = item.item.plan
    axes = plan.layout.position_offsets.shape[1]
    found = unpack(item.packed.cpu(), axes)
    parts = zip(*(values.split(list(plan.kept)) for values in found), strict=True)
    runs = zip(parts, plan.layout.run_lengths, plan.layout.spans, strict=True)
    width = item.segments[0].result.embeds.shape[-1]
    segments: list[Segment] = []
    for (rows, log_bias, at), length, span in runs:
        rows, states = taken_apart(rows, layers, width)
        offsets = at if axes > 1 else None
        segments.append(Segment(rows, log_bias, at[:, 0], length, offsets, span, states))
    return segments
