"""The tests that need an NVIDIA GPU and a CUDA vLLM; elsewhere each is skipped and says why."""

import pytest
import torch

from tests.engine.conftest import (  # noqa: F401 - fixtures
    apart,
    measured,
    oracle,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no GPU."""
    missing = _missing()
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker("gpu")
            item.add_marker("vllm")
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


def _missing() -> str:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU and a CUDA build of torch and vLLM"
    from vllm.platforms import current_platform

    return "" if current_platform.is_cuda() else "needs a CUDA build of vLLM"
