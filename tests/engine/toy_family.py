"""A family that nobody has, for the tests: another order of rows, newlines, two runs an item.

First what vLLM would have of it (over LLaVA-1.5, whose weights it takes), then ours: what a
newcomer writes. The test gives its row to ``register_family``.
"""

from functools import cache

import torch
from torch import Tensor
from vllm.model_executor.models import llava
from vllm.multimodal.processing import PromptReplacement
from vllm.multimodal.processing.processor import PromptUpdateDetails

from era_vllm.layout import Layout, SegmentLayout
from era_vllm.models.llava import LlavaAdapter
from era_vllm.vllm_plugin.models import pruned_model

TOP, SIDE = 4, 12
"""Rows of the first run; rows and columns of the picture."""
NEWLINE = 9
"""The token whose embedding ends each row of the second run."""
BETWEEN = [11, 12]
"""Text between the runs."""
FIRST = TOP * SIDE
SECOND = (SIDE - TOP) * (SIDE + 1)


class ToyProcessor(llava.LlavaMultiModalProcessor):
    """Writes two runs for a picture, with text between."""

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        token = self.info.get_hf_config().image_token_index
        full = [token] * FIRST + BETWEEN + [token] * SECOND
        content = PromptUpdateDetails.select_token_id(full, token)
        return [PromptReplacement(modality="image", target=[token], replacement=lambda _: content)]


class ToyForConditionalGeneration(llava.LlavaForConditionalGeneration):
    """The upper third of a picture as it is, the rest with newlines."""

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Return 152 rows a picture."""
        newline = self.language_model.model.embed_tokens.weight[NEWLINE]
        return [packed(rows, newline) for rows in super().embed_multimodal(**kwargs)]


def packed(rows: Tensor, newline: Tensor) -> Tensor:
    """Return [152, d] for [144, d]."""
    rest = rows[FIRST:].unflatten(0, (SIDE - TOP, SIDE))
    ends = newline.expand(SIDE - TOP, 1, -1)
    return torch.cat([rows[:FIRST], torch.cat([rest, ends], 1).flatten(0, 1)])


# ---- ours: one file, by hand in place of a real family's


class ToyAdapter(LlavaAdapter):
    """Facts about it."""

    def layout(self, hf_config: object, modality: str, shape: tuple[int, ...]) -> Layout:
        """Two runs, each a segment; the second ends its rows with newlines."""
        return _layout()

    def signals(self, hf_config: object, tapped: Tensor, layouts: object) -> list[Tensor]:
        """As the features are packed; newlines have none."""
        return [packed(one.T, torch.zeros(len(one))).T for one in tapped]


@cache
def _layout() -> Layout:
    columns = torch.arange(SIDE + 1)
    places = FIRST + (torch.arange(SIDE - TOP)[:, None] * (SIDE + 1) + columns)
    segments = (
        SegmentLayout((TOP, SIDE), torch.arange(FIRST)),
        SegmentLayout((SIDE - TOP, SIDE), places[:, :SIDE].flatten()),
    )
    return Layout(
        (), FIRST + SECOND, segments, places[:, SIDE].clone(), run_lengths=(FIRST, SECOND)
    )


EraToyForConditionalGeneration = pruned_model(
    ToyForConditionalGeneration,
    ToyAdapter(),
    info=llava.LlavaProcessingInfo,
    processor=ToyProcessor,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
