"""Original positions: an anchor stands where its token stood, and text where it stood unpruned.

vLLM carries M-RoPE positions through everything (chunks, prefix hits, preemption, speculation,
decode), but not 1-D ones that run ahead of the token index. So the runner is told that the model
is an M-RoPE model with three equal rows, and row 0 goes to its plain 1-D rotary embedding.

    text        the unpruned place, from ``prompt_positions``, once a request
    an anchor   the place of its run's first token there, plus the anchor's own offset from it,
                which rides with the embedding (``packing.py``): it is known after the encoder only

A model with M-RoPE has offsets on three axes and is told nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from era_vllm.errors import UnsupportedError

ROPE_TYPES: Final = ("default", "linear", "llama3", "dynamic")
"""Scalings whose table may be made longer without changing what it holds. vLLM's table of dynamic
scaling is the default one, whatever its length (rotary_embedding/dynamic_ntk_scaling_rope.py,
0.32.0), unless ``alpha`` or ``max_trained_positions`` say otherwise."""
_NO_TABLE: Final = 2**31
_OTHER_DYNAMIC: Final = ("alpha", "max_trained_positions")


class AnchorOffsets(nn.Module):
    """Where the anchors of one step stand within their runs, at a fixed address."""

    offsets: Tensor
    """[p, rows + 1] int64: of an anchor from its run's first place; 0 for text and padding."""
    positions: Tensor
    """[p, rows + 1] int64: what the language model is given. A step never fills the last column, so
    that no step's is contiguous: a compiled graph would take that for a rule."""

    def __init__(self, rows: int, axes: int, table_rows: int) -> None:
        """Make buffers for steps of up to ``rows`` tokens.

        Args:
            axes: p, those of a position.
            table_rows: Of the rotary table.
        """
        super().__init__()
        self.last = table_rows - 1
        empty = torch.zeros(axes, rows + 1, dtype=torch.int64)
        self.register_buffer("offsets", empty, persistent=False)
        self.register_buffer("positions", empty.clone(), persistent=False)
        self._dirty = False

    def write(self, is_visual: Bool[Tensor, "t"], offsets: Int[Tensor, "v p"]) -> None:
        """Set the offsets of the step's anchors, 0 elsewhere.

        Args:
            is_visual: True at the v tokens of the step that are anchors.
            offsets: Theirs, in the order of the tokens.

        Mutates: offsets.
        """
        self.offsets.zero_()
        step = self.offsets[:, : is_visual.shape[0]]
        mask = is_visual.to(step.device, non_blocking=True)
        step.masked_scatter_(mask.expand_as(step), offsets.T.contiguous())
        self._dirty = True

    def clear(self) -> None:
        """Set every offset to 0; free on steps that follow a step without images."""
        if self._dirty:
            self.offsets.zero_()
            self._dirty = False

    def add_to(self, carried: Int[Tensor, "3 t"]) -> Int[Tensor, "t"] | Int[Tensor, "3 t"]:
        """Return the positions of a step: one row for a model with one axis, else all three.

        The offsets are used up: batches of idle data-parallel ranks call the model's forward
        without embedding tokens first, and would be moved by what the last step left.

        A position past the table would read what lies behind it, and NaN in a KV block outlives its
        request. The processor refuses prompts that reach there; what comes in past it is wrong for
        itself alone.

        Mutates: positions, offsets. No host synchronisation; safe in CUDA graphs.
        """
        axes, tokens = self.offsets.shape[0], carried.shape[1]
        out = self.positions[:, :tokens]
        torch.add(carried[:axes], self.offsets[:, :tokens], out=out)
        out.clamp_(max=self.last)
        self.offsets.zero_()
        return out[0] if axes == 1 else out


def prompt_positions(
    num_tokens: int, runs: Sequence[tuple[int, int, int]]
) -> tuple[Int[Tensor, "3 t"], int]:
    """Return a prompt's positions, before anchors' own offsets, and what decoding adds.

    Args:
        num_tokens: t, tokens of the prompt as pruned (and what was generated before a preemption).
        runs: For each (first placeholder, placeholders K, positions that it takes up unpruned), in
            order.

    Returns:
        Three equal rows, and how far behind the last run a position is ahead of the token's index.
    """
    parts: list[Tensor] = []
    removed = done = 0
    for first, kept, span in runs:
        parts.append(torch.arange(done, first) + removed)
        parts.append(torch.full((kept,), first + removed))
        removed, done = removed + span - kept, first + kept
    parts.append(torch.arange(done, num_tokens) + removed)
    return torch.cat(parts).expand(3, -1), removed


def carry_positions(hf_config: PretrainedConfig) -> None:
    """Make vLLM carry positions for a 1-D RoPE model.

    Set on the top-level config: the runner looks there too, while the language model reads its
    own and still builds its plain rotary embedding (transformers_utils/config.py:656).

    Raises:
        UnsupportedError: a rotary embedding whose table depends on its length, or none.

    Mutates: hf_config.
    """
    found = rope_types(hf_config.get_text_config())
    if not found <= set(ROPE_TYPES):
        raise UnsupportedError(
            "positions 'original': got a language model with rope type "
            f"{' and '.join(sorted(found))}, allowed: {', '.join(ROPE_TYPES)}; use positions "
            "'compact' (--era-positions compact)"
        )
    hf_config.mrope_section = [1, 1, 1]


def rope_types(text_config: PretrainedConfig) -> set[str]:
    """Return the kinds of rotary embedding of a language model, one or one a type of layer."""
    found = rope_parameters(text_config)
    return {"mrope" if "mrope_section" in one else _rope_type(one) for one in found} or {"none"}


def _rope_type(rope: dict[str, object]) -> str:
    kind = str(rope.get("rope_type", "default"))
    others = [name for name in _OTHER_DYNAMIC if name in rope]
    return f"{kind} with {others[0]}" if kind == "dynamic" and others else kind


def table_rows(text_config: PretrainedConfig) -> int:
    """Return the positions that the rotary table has; linear scaling and yarn make it longer."""
    written = int(text_config.max_position_embeddings)
    found = (_rows(one, written) for one in rope_parameters(text_config))
    return min(found, default=written)


def _rows(rope: dict[str, object], written: int) -> int:
    factor = float(str(rope.get("factor") or 1.0))
    match rope.get("rope_type"):
        case "linear":
            return int(written * factor)
        case "yarn":  # not as long as positions: vllm/.../rotary_embedding/__init__.py:247 (0.32.0)
            return int(int(str(rope.get("original_max_position_embeddings") or written)) * factor)
        case _:
            return written


def built_rows(language_model: nn.Module) -> int:
    """Return the positions that the rotary table of a built model has, the least of several.

    A model without one has room for any.
    """
    tables = (getattr(one, "cos_sin_cache", None) for one in language_model.modules())
    return min((len(one) for one in tables if isinstance(one, Tensor)), default=_NO_TABLE)


def rope_parameters(text_config: PretrainedConfig) -> list[dict[str, object]]:
    """Return them as a list; Transformers nests them where layers differ."""
    found = getattr(text_config, "rope_parameters", None)
    if not isinstance(found, dict):
        return []
    nested = [one for one in found.values() if isinstance(one, dict)]
    return nested or [found]


@contextmanager
def longer_rope_table(text_config: PretrainedConfig, more: int) -> Iterator[None]:
    """Build the language model with ``more`` further rows in its rotary table.

    Prompts end within ``max_position_embeddings`` (``PrunedProcessorMixin.apply``) and generation
    adds at most ``max_model_len``, so a table of both can never be overrun: by answers that may
    leave the trained positions, or what speculation and look-ahead compute behind the last token.
    """
    rows = text_config.max_position_embeddings
    text_config.max_position_embeddings = rows + more
    try:
        yield
    finally:
        text_config.max_position_embeddings = rows
