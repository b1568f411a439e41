"""What an engine in this process put in the place of pictures and videos, for plain transformers.

``set_environment`` of ``setup.py`` comes before, as of ``engines.py``. Leaves out what is done with
it (``cli/doctor/check.py``, ``lab/calibrate.py``, ``lab/ecl.py``).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, Self

from torch import nn
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from era_vllm.errors import ConfigError
from era_vllm.lab.asking import Subject, messages_of
from era_vllm.lab.calibrate import Case
from era_vllm.lab.oracle import Segment
from era_vllm.vllm_plugin.injection import split_states
from era_vllm.vllm_plugin.packing import unpack
from era_vllm.vllm_plugin.reducer import PrunedItem

_A_WORD: Final = SamplingParams(max_tokens=1, temperature=0)
_IMAGE: Final = ("image_token_id", "image_token_index")


class Taken:
    """Items that an engine prunes while this is entered, in the order in which it does."""

    def __init__(self, llm: LLM) -> None:
        self.items: list[PrunedItem] = []
        self._llm, self._injected = llm, 0

    def __enter__(self) -> Self:
        self._injected = self._reach("append")
        return self

    def __exit__(self, *_: object) -> None:
        self._reach("remove")

    def _reach(self, change: str) -> int:
        def listen(model: nn.Module) -> int:
            era: Any = model.era
            getattr(model.reducer.listeners, change)(self.items.extend)
            return era.scout if era.scout_injection else 0

        (injected,) = self._llm.apply_model(listen)
        return injected

    def segments(self) -> list[Segment]:
        """Return what stands in the runs of all items."""
        return [run for item in self.items for run in runs_of(item, self._injected)]

    def forget(self) -> None:
        """Have the engine encode anew what it is asked about next."""
        self._llm.llm_engine.reset_encoder_cache()

    def of(
        self, messages: list[dict[str, Any]], rate: float, known: Sequence[Segment] | None = None
    ) -> tuple[list[int], Sequence[Segment]]:
        """Ask for a word; return the prompt's token ids, and what stands in its runs.

        Visual tokens of all kinds have the id of a picture's.

        Args:
            messages: One of a user; pictures and videos as data.
            rate: Of all of them.
            known: What stands there where the engine encodes none of them again.

        Raises:
            ConfigError: vLLM refuses them, two are the same, or the text has a visual mark.
        """
        self.items.clear()
        extra: Any = {"mm_processor_kwargs": {"era": rate}}
        try:
            (output,) = self._llm.chat([messages], _A_WORD, use_tqdm=False, **extra)
        except VLLMValidationError as error:
            raise ConfigError(str(error)) from error
        given = sum(part["type"] != "text" for part in messages[0]["content"])
        if self.items or known is None:
            known = self.segments()
            if len(self.items) != given:
                raise ConfigError(
                    f"got {given} pictures in one message of which the engine encoded "
                    f"{len(self.items)}, needed different ones"
                )
        picture, visual = self._marks()
        ids = [picture if token in visual else token for token in output.prompt_token_ids]
        rows = sum(len(segment.anchors) for segment in known)
        if (found := ids.count(picture)) != rows:
            raise ConfigError(
                f"a question: got {found - rows} visual tokens written in its text, allowed: none"
            )
        return ids, known

    def _marks(self) -> tuple[int, set[int]]:
        """Return the id of a picture's tokens in plain transformers, and all visual ones."""
        config = self._llm.model_config.hf_config
        processor = self._llm.llm_engine.renderer.get_mm_processor().info.get_hf_processor()
        picture = next(found for name in _IMAGE if (found := getattr(config, name, None)))
        video = getattr(config, "video_token_id", None)
        if video is None and (mark := getattr(processor, "video_token", None)):
            video = processor.tokenizer.convert_tokens_to_ids(mark)
        return picture, {picture} if video is None else {picture, video}


def engine_cases(
    taken: Taken, rates: Sequence[float], number: int, subject: Subject
) -> Iterator[Case]:
    """Yield a case for each question about a subject, at one of the rates in turn.

    Args:
        taken: Of a float32 engine without a prefix cache.
        rates: As of ``lab/calibrate.py``.
        number: Of the subject.
    """
    shared: dict[float, Sequence[Segment]] = {}
    taken.forget()
    for index, messages in enumerate(messages_of(subject), number // 2):
        sides: list[tuple[list[int], Sequence[Segment]]] = []
        for rate in (0.0, rates[index % len(rates)]):
            ids, shared[rate] = taken.of(messages, rate, shared.get(rate))
            sides.append((ids, shared[rate]))
        (whole_ids, whole), (pruned_ids, pruned) = sides
        yield Case(whole_ids, whole, pruned_ids, pruned, number)


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
        rows, states = split_states(rows, layers, width)
        offsets = at if axes > 1 else None
        segments.append(Segment(rows, log_bias, at[:, 0], length, offsets, span, states))
    return segments
