"""The entry point: tells vLLM our names. Called in every process, perhaps twice; imports no model.

Nothing happens until an engine is started with our architecture and renderer (``launch.py``), or
in a server with our front, whose processes end together (``parent.py``).
"""

import logging
import os
from typing import Final

from era_vllm.errors import UnsupportedError
from era_vllm.vllm_plugin.families import FAMILIES, Family
from era_vllm.vllm_plugin.names import PREFIX, TOKENIZER_MODE
from era_vllm.vllm_plugin.requests import MODALITIES
from era_vllm.vllm_plugin.version import TESTED, installed_version

logger = logging.getLogger(__name__)

_OUR_SERVER: Final = ("VLLM_MEDIA_CONNECTOR", "era")
"""A variable of every process of a server with our front, and of no other."""


def register() -> None:
    """Register architectures, tokenizer mode, renderer and config hook; idempotent.

    Over another vLLM, whose parts have moved, it warns and registers nothing: vLLM does not catch
    what a plugin raises here, so an exception would end every engine, also one that never prunes.
    """
    try:
        _register()
    except (ImportError, AttributeError) as error:
        logger.warning(
            "era_vllm is not available: made for vLLM %s.x, found %s (%s); stock vLLM is "
            "unaffected",
            TESTED,
            installed_version(),
            error,
        )


def _register() -> None:
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from era_vllm.compat import models_config_map  # noqa: F401  # before anything is registered

    if TOKENIZER_MODE in RENDERER_REGISTRY.renderers:
        return
    TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "era_vllm.vllm_plugin.renderer", "EraRenderer")
    end_together()
    for architecture, family in list(FAMILIES.items()):
        register_family(architecture, family)


def register_family(architecture: str, family: Family) -> None:
    """Make a family known to vLLM: one of ours, or of another package's plugin.

    Args:
        architecture: As it stands in a model's config.json.
        family: Its row.

    Raises:
        UnsupportedError: it takes something else than pictures and videos.
    """
    if not set(family.modalities) <= set(MODALITIES):
        raise UnsupportedError(
            f"family {architecture}: got modalities {', '.join(family.modalities)}, allowed: "
            f"{', '.join(MODALITIES)}"
        )
    from vllm.model_executor.models.registry import ModelRegistry

    from era_vllm.compat import models_config_map
    from era_vllm.vllm_plugin.resolve import resolve

    FAMILIES[architecture] = family
    models_config_map.add(PREFIX + architecture, architecture, resolve)
    ModelRegistry.register_model(PREFIX + architecture, family.target)


def end_together() -> None:
    """Have a process of our server end with its parent, and those that it starts end with it."""
    if _OUR_SERVER not in os.environ.items():
        return
    from era_vllm.compat import process_targets
    from era_vllm.vllm_plugin import parent

    process_targets.replace(parent.run_engine, parent.run_coordinator)
    process_targets.on_failure(parent.end_soon)
    parent.end_with_parent()
