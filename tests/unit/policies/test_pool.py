"""pool: exactly a cells that tile the grid, each a rectangle around its anchor."""

import pytest
import torch

from era_vllm.errors import PolicyError
from era_vllm.pipeline import prune
from era_vllm.policies.pool import Policy
from era_vllm.types import VisualTokens

GRIDS = [(1, 1), (1, 9), (9, 1), (2, 3), (5, 7), (7, 5), (3, 11), (2, 11), (10, 10), (13, 4)]


def _tokens(height: int, width: int) -> VisualTokens:
    return VisualTokens(torch.arange(2.0 * height * width).view(2, -1, 1), (height, width))


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_cells_are_rectangles_that_tile_the_grid(height: int, width: int) -> None:
    tokens = _tokens(height, width)
    for count in range(1, height * width):
        pruned = prune(tokens, count, Policy())
        assert torch.equal(pruned.assignment[0], pruned.assignment[1])
        cells = pruned.assignment[0].view(height, width)
        assert sorted(set(cells.flatten().tolist())) == list(range(count)), "none empty"
        for cell, anchor in enumerate(pruned.anchors[0].tolist()):
            rows, columns = (cells == cell).nonzero().unbind(1)
            top, bottom = int(rows.min()), int(rows.max())
            left, right = int(columns.min()), int(columns.max())
            assert len(rows) == (bottom - top + 1) * (right - left + 1), "a rectangle"
            assert divmod(anchor, width) == ((top + bottom) // 2, (left + right) // 2)


@pytest.mark.parametrize(
    ("grid", "count", "shape"),
    [
        ((24, 24), 144, (2, 2)),
        ((24, 24), 64, (3, 3)),
        ((12, 12), 16, (3, 3)),
        ((8, 12), 24, (2, 2)),
    ],
)
def test_a_divisible_grid_is_pooled_evenly(
    grid: tuple[int, int], count: int, shape: tuple[int, int]
) -> None:
    tokens = _tokens(*grid)
    image = tokens.embeds.view(2, 1, *grid)
    expected = torch.nn.functional.avg_pool2d(image, shape).flatten(1)
    pruned = prune(tokens, count, Policy())
    torch.testing.assert_close(pruned.embeds[..., 0], expected)
    torch.testing.assert_close(
        pruned.log_bias.exp(), torch.full((2, count), 1.0 * shape[0] * shape[1])
    )


@pytest.mark.parametrize("count", [5, 32, 50, 100, 128])
def test_cells_are_near_square(count: int) -> None:
    """No cell of a 24 x 24 grid is more than twice as long as wide, give or take a token."""
    cells = prune(_tokens(24, 24), count, Policy()).assignment[0].view(24, 24)
    for cell in range(count):
        rows, columns = (cells == cell).nonzero().unbind(1)
        sides = sorted((int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1))
        assert sides[1] <= 2 * sides[0] + 1


def test_a_grid_that_does_not_hold_the_tokens_is_refused() -> None:
    with pytest.raises(PolicyError, match="4 x 5 does not hold 19"):
        prune(VisualTokens(torch.zeros(1, 19, 2), (4, 5)), 3, Policy())
