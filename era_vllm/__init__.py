"""Serve multimodal LLMs with a tenth of their visual tokens: a vLLM plugin (ERA, arXiv 2606.31982).

The flow, which is also the order to read the folders in::

    image -models-> tokens -policies-> anchors + log-bias -vllm_plugin-> KV slots
          -attention-> hidden -vLLM-> logits

Start with ``types``, ``pipeline``, ``policies/era``, ``attention/bias_store``, ``attention/layer``,
``vllm_plugin/register``. Importing this package imports nothing heavy.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__version__ = "0.1.0"


def register() -> None:
    """Entry point ``vllm.general_plugins``: make our architecture and renderer known to vLLM."""
    from era_vllm.vllm_plugin.register import register as register_with_vllm

    register_with_vllm()


def engine_args(model: "str | os.PathLike[str]", **settings: object) -> "Mapping[str, object]":
    """Arguments for ``vllm.LLM(**engine_args(...))`` that switch pruning on.

    Args:
        model: Model name or path.
        settings: Fields of ``EraConfig`` such as ``pruning_rate`` or ``policy``, and
            ``calibration``, a file of ``era-vllm calibrate``.

    Raises:
        ConfigError: unknown or malformed setting.
        UnsupportedError: a model family or vLLM version that is not served.
    """
    from era_vllm.vllm_plugin.launch import engine_args as build

    return build(model, settings)
