"""The entry point: tells vLLM our names. Called in every process, perhaps twice; imports no model.

Nothing happens until an engine is started with our architecture and renderer (``launch.py``).
"""

from era_vllm.vllm_plugin.families import FAMILIES, PREFIX

TOKENIZER_MODE = "era"
"""Value of ``--tokenizer-mode`` that selects our renderer."""


def register() -> None:
    """Register architectures, tokenizer mode, renderer and config hook; idempotent."""
    from vllm.model_executor.models.registry import ModelRegistry

    if PREFIX + next(iter(FAMILIES)) in ModelRegistry.get_supported_archs():
        return
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from era_vllm.compat import models_config_map
    from era_vllm.vllm_plugin.resolve import resolve

    TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "era_vllm.vllm_plugin.renderer", "EraRenderer")
    for architecture, target in FAMILIES.items():
        models_config_map.add(PREFIX + architecture, architecture, resolve)
        ModelRegistry.register_model(PREFIX + architecture, target)
