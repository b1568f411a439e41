"""Qwen3-VL with experts, in a process of its own: groups of experts are made as it starts."""

import pytest

from tests.engine import test_tiled as tiled
from tests.engine.conftest import EAGER
from tests.engine.families import qwen

pytestmark = pytest.mark.slow
case = pytest.fixture(scope="module")(lambda: qwen.EXPERTS)
folder, theirs, apart = tiled.folder, tiled.theirs, tiled.apart


@pytest.mark.situation("several images at different rates")
def test_pictures_and_videos_with_experts(apart):
    apart({}, **EAGER)
