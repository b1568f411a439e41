"""vLLM's table of per-architecture config hooks.

Upstream: vllm/model_executor/models/config.py:1063 ``MODELS_CONFIG_MAP`` (0.32.0), applied in
vllm/config/vllm.py:2648 while ``VllmConfig`` is built, before it is sent to any worker.
Private use: a row for each of our architectures, which chains the row of the original one.
Remove when: vLLM lets an out-of-tree model see ``additional_config`` from its processor.
"""

from collections.abc import Callable

from vllm.config import VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig


def add(architecture: str, original: str, resolve: Callable[[VllmConfig], None]) -> None:
    """Have ``resolve`` called whenever an engine is configured with ``architecture``."""

    class EraModelConfig(VerifyAndUpdateConfig):
        """Runs the original architecture's hook, then ours."""

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            if (hook := MODELS_CONFIG_MAP.get(original)) is not None:
                hook.verify_and_update_config(vllm_config)
            resolve(vllm_config)

    MODELS_CONFIG_MAP[architecture] = EraModelConfig
