"""What an engine in this process put in the place of pictures and videos, for plain transformers.

``set_environment`` of ``setup.py`` comes before, as of ``engines.py``. Leaves out what is done with
it (``cli/doctor/check.py``, ``lab/calibrate.py``).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from torch import nn
from vllm import LLM, SamplingParams

from era_vllm.errors import UnsupportedError
from era_vllm.lab.asking import Subject, messages_of
from era_vllm.lab.calibrate import Case
from era_vllm.lab.oracle import Segment
from era_vllm.vllm_plugin.injection import taken_apart
from era_vllm.vllm_plugin.packing import unpack
from era_vllm.vllm_plugin.reducer import PrunedItem

_A_WORD: Final = SamplingParams(max_tokens=1, temperature=0)


class Taken:
    """Items that an engine pruned, in the order in which it did."""

    def __init__(self, llm: LLM) -> None:
        """Listen to an engine from now on."""
        self.items: list[PrunedItem] = []
        self._llm = llm

        def listen(model: nn.Module) -> int:
            era: Any = model.era
            model.reducer.listeners.append(self.items.extend)
            return era.scout if era.scout_injection else 0

        (self._injected,) = llm.apply_model(listen)

    def segments(self) -> list[Segment]:
        """Return what stands in the runs of all items."""
        return [run for item in self.items for run in runs_of(item, self._injected)]

    def of(self, messages: list[dict[str, Any]], rate: float) -> tuple[list[int], list[Segment]]:
        """Ask for a word, and return the prompt's token ids and what stands in its runs.

        Args:
            messages: One of a user; pictures and videos as data.
            rate: Of all of them.

        Raises:
            UnsupportedError: two of them are the same, of which an engine encodes one.
        """
        self._llm.llm_engine.reset_encoder_cache()
        self.items.clear()
        extra: Any = {"mm_processor_kwargs": {"era": rate}}
        (output,) = self._llm.chat([messages], _A_WORD, use_tqdm=False, **extra)
        given = sum(part["type"] != "text" for part in messages[0]["content"])
        if len(self.items) != given:
            raise UnsupportedError(
                f"got {given} pictures in one message of which the engine encoded "
                f"{len(self.items)}, needed different ones"
            )
        return list(output.prompt_token_ids), self.segments()


def cases_of(taken: Taken, rates: Sequence[float], number: int, subject: Subject) -> Iterator[Case]:
    """Yield a case for each question about a subject, at one of the rates in turn.

    Args:
        taken: Of a float32 engine without a prefix cache.
        rates: As of ``lab/calibrate.py``.
        number: Of the subject.
    """
    for index, messages in enumerate(messages_of(subject), number // 2):
        whole, pruned = (taken.of(messages, rate) for rate in (0.0, rates[index % len(rates)]))
        yield Case(*whole, *pruned, number)


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
