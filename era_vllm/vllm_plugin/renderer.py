"""The renderer behind ``--tokenizer-mode era``: vLLM's own, plus one effective rate per image.

Every kind of request passes here after vLLM has refused what clients may not send, so this is
where rates are made explicit, and where a bad one becomes an HTTP 400 before any work is done.
"""

from collections.abc import Sized

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from era_vllm.errors import ConfigError
from era_vllm.vllm_plugin.rates import KEY, effective_rates
from era_vllm.vllm_plugin.resolve import era_config


class EraRenderer(HfRenderer):
    """vLLM's Hugging Face renderer that puts the list of rates on each prompt with images."""

    def _apply_prompt_extras(
        self, prompts: list[dict[str, object]], prompt_extras: dict[str, object] | None
    ) -> None:
        """Do what vLLM does, then replace each prompt with images by one that carries its rates.

        Mutates: prompts, the list; not the prompts in it, which may be the caller's own.
        """
        super()._apply_prompt_extras(prompts, prompt_extras)
        config = era_config(self.model_config.hf_config)
        for row, prompt in enumerate(prompts):
            data = prompt.get("multi_modal_data")
            images = data.get("image") if isinstance(data, dict) else None
            if images is None:
                continue
            given = prompt.get("mm_processor_kwargs")
            kwargs = dict(given) if isinstance(given, dict) else {}
            count = _count(images)
            try:
                kwargs[KEY] = effective_rates(kwargs, count, config)
            except ConfigError as error:
                raise VLLMValidationError(
                    str(error), parameter=f"mm_processor_kwargs.{KEY}", value=kwargs.get(KEY)
                ) from error
            prompts[row] = {**prompt, "mm_processor_kwargs": kwargs}


def _count(images: object) -> int:
    """Return how many pictures vLLM will make of what a prompt holds as ``image``.

    Upstream: vllm/multimodal/parse.py:753 ``_parse_image_data`` (0.32.0): a picture or an array of
    three axes is one, anything else a row of them.
    """
    if getattr(images, "ndim", None) == 3 or not isinstance(images, Sized):
        return 1
    return len(images)
