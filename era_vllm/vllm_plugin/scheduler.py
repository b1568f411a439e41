"""vLLM's scheduler, with the encoder's work of a step bounded by what the tower makes.

vLLM's budget of a step is in placeholders, which are the K rows that are left of an item's N: at
K = N / 16 it would admit sixteen times the pictures that it has profiled, and every running stream
would wait for all of them. Here an item counts its N, against the budget that vLLM profiled
(``max_num_encoder_input_tokens``); one larger than that passes alone.

``resolve`` names the class; what it is mixed into is vLLM's own choice, made where the engine
starts. Leaves out how vLLM is made to count (``compat/encoder_inputs.py``).
"""

import copy
from functools import cache, cached_property
from typing import TYPE_CHECKING

from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.import_utils import resolve_obj_by_qualname

from era_vllm.compat.encoder_inputs import Scheduler, WorkBoundScheduler
from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.vllm_plugin.fields import work_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec


class EraScheduler(WorkBoundScheduler):
    """Named by ``scheduler_cls``; an instance is of a class over vLLM's choice or the user's."""

    def __new__(cls, vllm_config: "VllmConfig", *args: object, **kwargs: object) -> "EraScheduler":
        del args, kwargs  # __init__'s
        return object.__new__(cls if cls is not EraScheduler else _over(_chosen(vllm_config)))

    def encoder_work(self, feature: "MultiModalFeatureSpec") -> int:
        """Return the tokens that the tower makes for an item, or for the largest.

        They lie beside the pixels, which are in the engine's process also if it had them cached,
        but for ``--mm-processor-cache-type shm``, where it only holds an address.
        """
        work = work_of(feature.data, feature.modality)
        if work is None:
            work = self._largest.get(feature.modality, self.max_num_encoder_input_tokens)
        return work

    @cached_property
    def _largest(self) -> "Mapping[str, int]":
        """Work of the largest item of each modality."""
        config = self.vllm_config.model_config
        info = MULTIMODAL_REGISTRY.create_processor(config).info
        return info.most_work(config.max_model_len, info.allowed_mm_limits)


def importable_name(given: str | type[object]) -> str:
    """Return the name of a user's own scheduler class, as it travels to the engine's process.

    Raises:
        ConfigError: no such class, or one that no name leads to.
        UnsupportedError: no scheduler of vLLM's kind.
    """
    name = given if isinstance(given, str) else f"{given.__module__}.{given.__qualname__}"
    try:
        found = resolve_obj_by_qualname(name)
    except (ImportError, AttributeError, ValueError) as error:
        found, why = None, f" ({error})"
    else:
        why = ""
    if found is None or not (isinstance(given, str) or found is given):
        raise ConfigError(
            f"--scheduler-cls: got {name!r}, which cannot be imported by that name{why}; needed "
            "module.Class, on the path of the engine's process and not inside of a function"
        )
    if not (isinstance(found, type) and issubclass(found, Scheduler)):
        raise UnsupportedError(
            f"--scheduler-cls: got {name!r}, which is no subclass of "
            f"{Scheduler.__module__}.{Scheduler.__name__}, so the encoder's work cannot be bounded "
            "in it; derive it from that, leave the flag out, or serve with --era-max-pruning-rate 0"
        )
    return name


def _chosen(vllm_config: "VllmConfig") -> type[Scheduler]:
    """Return the class that vLLM would take without us: the user's, or by async scheduling."""
    without = copy.copy(vllm_config.scheduler_config)
    without.scheduler_cls = getattr(vllm_config.model_config.hf_config, "era_scheduler", None)
    return without.get_scheduler_cls()


@cache
def _over(base: type[Scheduler]) -> type[EraScheduler]:
    if issubclass(EraScheduler, base):
        return EraScheduler
    if issubclass(base, EraScheduler):
        return base
    own = {"__doc__": base.__doc__, "__module__": __name__}
    return type(f"Era{base.__name__}", (EraScheduler, base), own)
