"""Each item's effective pruning rate: where it comes from and what is refused. No vllm import.

A prompt carries its rates as ``mm_processor_kwargs["era"]``: one number for all of its items, a
list with one a picture, or both by modality ({"image": ..., "video": ...}). Absent = the default.
Beside modalities may stand whether its items are pruned for what is asked of them ("question_aware"
), and, from the renderer on, what that is.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.question import Question
from era_vllm.vllm_plugin.names import QUESTION_AWARE, QUESTIONS, RATES
from era_vllm.vllm_plugin.requests import MODALITIES, checked_question_aware

_NEAR: Final = 0.85  # so that EVS's video_pruning_rate is another name


def effective_rates(
    processor_kwargs: Mapping[str, object], items: Mapping[str, int], config: EraConfig
) -> dict[str, list[float]]:
    """Return one rate an item, by modality.

    Args:
        processor_kwargs: A prompt's ``mm_processor_kwargs``.
        items: How many items it has of each modality.
        config: The engine's settings.

    Raises:
        ConfigError: not a number, a list of them or one of both for each modality; out of range;
            not as many rates as items; or a key that looks like a misspelt one.
    """
    refuse_misspelt(processor_kwargs)
    given = processor_kwargs.get(RATES)
    by_modality = _of_modalities(given)
    if unknown := [name for name in by_modality if name not in MODALITIES]:
        raise ConfigError(f"{RATES}: got {unknown[0]!r}, allowed: {' and '.join(MODALITIES)}")
    if isinstance(given, list | tuple) and given and not items.get("image"):
        kinds = " and ".join(items) or "no item"
        raise ConfigError(
            f"{RATES}: got a list, which is the images', for {kinds}; needed one number, or lists "
            'by modality: {"video": [...]}'
        )
    counts = {**dict.fromkeys(by_modality, 0), **items}
    rates = {
        modality: _rates(by_modality.get(modality), modality, count, config)
        for modality, count in counts.items()
    }
    return {modality: rates[modality] for modality in items}


def _of_modalities(given: object) -> dict[str, object]:
    """A number is for every item; a list is the pictures'."""
    if isinstance(given, Mapping):
        beside = (QUESTION_AWARE, QUESTIONS)
        return {name: value for name, value in given.items() if name not in beside}
    if isinstance(given, list | tuple):
        return {"image": given}
    return dict.fromkeys(MODALITIES, given)


def has_rates(processor_kwargs: Mapping[str, object]) -> bool:
    """Tell whether a prompt's arguments say how much is pruned."""
    given = processor_kwargs.get(RATES)
    return given is not None and (not isinstance(given, Mapping) or bool(_of_modalities(given)))


def question_aware(processor_kwargs: Mapping[str, object], config: EraConfig) -> bool:
    """Return whether a prompt's items are pruned for what is asked of them, as its arguments say.

    Raises:
        ConfigError: no boolean, or true of an engine that does not.
    """
    given = processor_kwargs.get(RATES)
    if not isinstance(given, Mapping):
        return config.question_aware
    if QUESTIONS in given:
        raise ConfigError(
            f"{RATES}: got {QUESTIONS!r}, which are the prompt's own text; leave them out"
        )
    at = f"{RATES}.{QUESTION_AWARE}"
    return checked_question_aware(given.get(QUESTION_AWARE), config, at)


def questions(processor_kwargs: Mapping[str, object]) -> Mapping[str, list[Question]]:
    """Return what the renderer has found to be asked of each item, by modality; {} = nothing."""
    given = processor_kwargs.get(RATES)
    return given.get(QUESTIONS, {}) if isinstance(given, Mapping) else {}


def _rates(given: object, modality: str, count: int, config: EraConfig) -> list[float]:
    if given is None:
        return [config.pruning_rate] * count
    if not isinstance(given, list | tuple):
        return [config.check_rate(given)] * count  # type: ignore[arg-type]  # which is checked
    rates = list(given)
    if len(rates) != count:
        raise ConfigError(
            f"{RATES}: got {len(rates)} pruning rates for {count} {modality}s, needed one for each "
            "or a single number for all"
        )
    return [config.check_rate(rate) for rate in rates]


def refuse_misspelt(names: Iterable[str]) -> None:
    """Check that no argument looks like ours and would be ignored.

    Raises:
        ConfigError: one starts with our key, in small or capital letters, or is the setting's name.
    """
    for name in names:
        small = name.lower().replace("-", "_")
        near = difflib.get_close_matches(small, ["pruning_rate"], cutoff=_NEAR)
        if name != RATES and (near or small.startswith(RATES)):
            raise ConfigError(
                f"mm_processor_kwargs: got {name!r}, needed {RATES!r}: one pruning rate for all "
                "images of a prompt or a list with one an image"
            )


def without_rates(processor_kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that are the Hugging Face processor's own."""
    return {name: value for name, value in processor_kwargs.items() if name != RATES}
