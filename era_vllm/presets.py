"""Settings by name: ``--era-preset NAME``. What each is worth is in docs/accuracy.md."""

from collections.abc import Mapping
from typing import Final

from era_vllm.errors import ConfigError, unknown_name

SETTING: Final = "preset"
PRESETS: Final[Mapping[str, Mapping[str, object]]] = {
    "paper": {
        "policy": "era",
        "policy_options": {"profile_weight": 0.5, "weighting": "saliency"},
    },
    "scout": {"policy": "dpp", "scout": 2, "scout_injection": True},
    "question": {
        "policy": "dpp",
        "policy_options": {"relevance_weight": 0.25},
        "scout": 2,
        "scout_injection": True,
        "question_aware": True,
    },
}
"""Name -> fields of ``EraConfig``.

``paper``: the reading of ERA that is nearest to its text and figures (docs/method.md); ``era``'s
own defaults are what measured best of the readings. ``scout``: the best of those that are
independent of the question, at the price of two layers of the language model a picture
(docs/scout.md). ``question``: the best of all, at that price for each question about a picture,
whose entries no other question finds (docs/question.md).
"""


def with_preset(settings: Mapping[str, object]) -> dict[str, object]:
    """Return settings in which ``preset`` has become what it stands for; others win over it.

    Raises:
        ConfigError: no such preset, or one of another policy than is set beside it.
    """
    found = dict(settings)
    name = found.pop(SETTING, None)
    if name is None:
        return found
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(unknown_name(SETTING, str(name), PRESETS))
    preset = dict(PRESETS[name])
    if (policy := found.get("policy", preset["policy"])) != preset["policy"]:
        raise ConfigError(
            f"{SETTING} {name!r}: has policy {preset['policy']!r}, got {policy!r} beside it; leave "
            "one of the two out"
        )
    given = found.get("policy_options")
    if given is None or isinstance(given, Mapping):
        options = preset.get("policy_options", {})
        assert isinstance(options, Mapping)
        found["policy_options"] = {**options, **(given or {})}
    return {**preset, **found}
