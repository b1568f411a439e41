"""Names and options become a policy, or an error that says which name was meant."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from era_vllm import policies
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.policies import defaults, era, make_policy, policy_class, policy_names, uniform
from era_vllm.types import Signal


def _make(policy: str, **options: object) -> object:
    return make_policy(EraConfig.parse({"policy": policy, "policy_options": options}))


@dataclass(frozen=True, slots=True)
class Outside(uniform.Policy):
    """A policy of another package, with an option of each kind."""

    strength: float = 1.0
    passes: int = 2
    label: str = "x"
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Prompted(uniform.Policy):
    """Says of itself, as policies once did, that it goes by the prompt."""

    prompt_dependent: ClassVar[bool] = True


@dataclass(frozen=True)
class NoMerge:
    """Not a policy: it cannot merge."""

    needs: ClassVar[frozenset[object]] = frozenset()

    def select(self) -> None:
        """Do nothing."""

    def log_bias(self) -> None:
        """Do nothing."""


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a package ``their.policies`` that holds the classes above."""
    package, module = ModuleType("their"), ModuleType("their.policies")
    package.__path__ = []
    for value in (Outside, Prompted, NoMerge):
        setattr(module, value.__name__, value)
    module.__dict__["number"] = 3
    monkeypatch.setitem(sys.modules, "their", package)
    monkeypatch.setitem(sys.modules, "their.policies", module)
    yield


def test_the_menu_is_the_folder_listing() -> None:
    files = {file.stem for file in Path(policies.__path__[0]).glob("*.py")} - {"__init__"}
    assert set(policy_names()) == files >= {"era", "dpp", "random", "uniform", "pool"}


def test_names_give_classes_with_default_options() -> None:
    assert policy_class("era") is era.Policy
    assert _make("era") == era.Policy()
    assert make_policy(EraConfig(policy="uniform")) == uniform.Policy()


def test_options_are_set_and_integers_become_floats() -> None:
    policy = _make("era", entropy_penalty=1, search="dpp")
    assert policy == era.Policy(entropy_penalty=1.0, search="dpp")
    assert isinstance(policy, era.Policy) and isinstance(policy.entropy_penalty, float)


def test_a_class_of_another_package() -> None:
    policy = _make("their.policies:Outside", strength=2, passes=3, label="y", strict=True)
    assert policy == Outside(strength=2.0, passes=3, label="y", strict=True)


@pytest.mark.parametrize(
    ("policy", "options", "text"),
    [
        ("eras", {}, "unknown policy 'eras'; did you mean 'era'"),
        ("", {}, "unknown policy ''"),
        ("_private", {}, "unknown policy '_private'"),
        ("era", {"serch": "dpp"}, "unknown option of policy 'era' 'serch'; did you mean 'search'"),
        ("uniform", {"x": 1}, "unknown option of policy 'uniform' 'x' .allowed: none"),
        ("era", {"search": "best"}, "search: got 'best', allowed: 'additive', 'multiplicative'"),
        ("era", {"search": 1}, "search: got 1"),
        ("era", {"temperature": "hot"}, "temperature: got 'hot', allowed: a float"),
        ("era", {"temperature": True}, "temperature: got True, allowed: a float"),
        ("era", {"temperature": 0}, "temperature: got 0.0, allowed: .0.001, 1000."),
        ("random", {"seed": 1.5}, "seed: got 1.5, allowed: a int"),
        ("random", {"seed": True}, "seed: got True, allowed: a int"),
        ("their.policies:Outside", {"strict": 1}, "strict: got 1, allowed: a bool"),
        ("their.policies:Outsider", {}, "'Outsider' in 'their.policies' is None"),
        ("their.policies:number", {}, "'number' in 'their.policies' is 3"),
        ("their.policies:NoMerge", {}, "needed a frozen dataclass that keeps"),
        ("their.other:Outside", {}, "no module 'their.other' is installed"),
        ("nobody_s:Policy", {}, "no module 'nobody_s' is installed"),
        ("json.tool.deep:Policy", {}, "no module 'json.tool.deep' is installed"),
        (":Policy", {}, "no module '' is installed"),
        (".era:Policy", {}, "no module '.era' is installed"),
    ],
)
def test_refusals_name_what_was_meant(policy: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _make(policy, **options)


def test_a_policy_that_says_prompt_dependent_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="read Signal.RELEVANCE.* or choose one of: .*era"):
        _make("their.policies:Prompted")


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("cdpruner", {}),
        ("mfpruner", {"relevance": True}),
        ("dpp", {"relevance_weight": 0.25}),
        ("era", {"relevance_weight": 0.25}),
    ],
)
def test_what_reads_the_question_needs_it_in_a_picture_s_identity(
    policy: str, options: dict[str, object]
) -> None:
    raw = {"policy": policy, "policy_options": options}
    with pytest.raises(ConfigError, match=f"policy '{policy}' .* add --era-question-aware"):
        make_policy(EraConfig.parse(raw))
    assert Signal.RELEVANCE in make_policy(EraConfig.parse({**raw, "question_aware": True})).needs


@pytest.mark.parametrize("policy", ["era", "dpp", "mfpruner", "uniform", "their.policies:Outside"])
def test_questions_that_nobody_reads_are_no_reason_to_cache_apart(policy: str) -> None:
    with pytest.raises(ConfigError, match="question_aware: got True.*--era-policy cdpruner, mfpr"):
        make_policy(EraConfig(policy=policy, question_aware=True))
    assert defaults(policy) == EraConfig(policy=policy)
    assert defaults("cdpruner", min_anchors=2).question_aware


def test_a_failing_import_inside_a_policy_s_module_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halfway.py").write_text("import a_library_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        _make("halfway:Policy")
