"""How an engine lays its items out: a family's layouts, with segments as the settings want them.

The one place that processor, model, runner and doctor get layouts from. Leaves out how a segment is
cut (``layout.cut``).
"""

from functools import lru_cache

from era_vllm.config import EraConfig
from era_vllm.contracts import ModelAdapter
from era_vllm.layout import Layout, cut


class Layouts:
    """One engine's; the settings are looked at once, and an item's layout is kept."""

    def __init__(self, adapter: ModelAdapter, hf_config: object, era: EraConfig) -> None:
        """Lay out by a family's facts and an engine's settings."""
        self._adapter, self._hf_config, self._era = adapter, hf_config, era
        self._of = lru_cache(maxsize=256)(self._made)

    def __call__(self, modality: str, shape: tuple[int, ...]) -> Layout:
        """Return where an item's tokens stand unpruned, and what is pruned together."""
        return self._of(modality, shape)

    def _made(self, modality: str, shape: tuple[int, ...]) -> Layout:
        frames = self._era.frames_per_segment if modality == "video" else 1
        whole = self._adapter.layout(self._hf_config, modality, shape)
        return cut(whole, self._era.max_segment, frames)
