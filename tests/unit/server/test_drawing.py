"""What an inspected item's picture shows of each segment: its part of its tile, or its frames."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from era_vllm.layout import Layout, cut, equal_units, one_grid

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def _shown(layout: Layout, units: torch.Tensor, modality: str, monkeypatch: pytest.MonkeyPatch):
    """Return name, picture and grid of each segment, as they are handed on to be drawn."""
    from era_vllm_server import inspect

    drawn = []

    def draw(kept, title, note):
        drawn.extend(kept)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(inspect, "draw", draw)
    monkeypatch.setattr(inspect, "pixels_of", lambda item: item)
    monkeypatch.setattr(inspect, "shape_of", lambda item, modality: ())
    segments = [
        {
            **{"unit": one.unit, "units": one.units, "box": one.box, "grid": one.grid},
            **{"anchors": [0], "assignment": [0] * one.n, "log_bias": [0.0]},
        }
        for one in layout.segments
    ]
    pruned = {"segments": segments, "units": layout.units, "separators": 0}
    found = SimpleNamespace(item=units, pruned=pruned)
    adapter = SimpleNamespace(
        norm=lambda processor: ([0.0] * 3, [1.0] * 3), units=lambda config, pixels, shape: pixels
    )
    info = SimpleNamespace(
        adapter=adapter, get_hf_processor=lambda: None, get_hf_config=lambda: None
    )
    inspect._draw(found, info, "title", modality)
    return [(one.name, one.image, one.grid) for one in drawn]


def _coded(units: int, height: int, width: int) -> torch.Tensor:
    """Pixels whose channels are their unit, row and column, in 255ths."""
    axes = torch.meshgrid(*map(torch.arange, (units, height, width)), indexing="ij")
    return torch.stack(axes, 1).float() / 255


def test_a_block_shows_its_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _shown(cut(one_grid(8, 12, ()), 24), _coded(1, 80, 120), "image", monkeypatch)
    assert [name for name, _, _ in shown] == [f"tile 1 of 1, part {i} of 4" for i in (1, 2, 3, 4)]
    corners = [image.getpixel((0, 0)) for _, image, _ in shown]
    assert corners == [(0, 0, 0), (0, 0, 60), (0, 40, 0), (0, 40, 60)]
    assert {image.size for _, image, _ in shown} == {(60, 40)}


def test_frames_that_are_pruned_together_stand_one_above_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = cut(equal_units((2, 3), 5, (5,), work=9), 16, 2)
    shown = _shown(layout, _coded(5, 20, 30), "video", monkeypatch)
    names = ["frames 1 to 2 of 5", "frames 3 to 4 of 5", "frame 5 of 5"]
    assert [name for name, _, _ in shown] == names
    assert [(image.size, grid) for _, image, grid in shown] == [
        *[((30, 40), (4, 3))] * 2,
        ((30, 20), (2, 3)),
    ]
    assert shown[1][1].getpixel((4, 25)) == (3, 5, 4), "row 25 is the second frame's fifth"
