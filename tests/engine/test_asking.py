"""The asker of ``era-vllm eval --asker engine``: transformers' answers, and what it counts."""

import pytest

from era_vllm.bench.engines import EngineAsker
from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT_QWEN3_VL
from era_vllm.lab.asking import TransformersAsker, ask
from era_vllm.lab.samples import load_task_samples
from era_vllm.lab.scores import agreement, count, divergence
from era_vllm.lab.synth.dataset import generate

SAME = 0.99


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.889])
def test_answers_are_those_of_transformers(engine, setup, oracle, rate):
    pictures = list(generate(56, seed=777))
    kinds = ("picture",) * len(pictures)
    live = engine(setup())
    ours = ask(EngineAsker(live.llm), pictures, rate)
    theirs = ask(TransformersAsker(oracle, live.config), pictures, rate)
    assert sum(map(len, ours)) >= 200
    same, far = agreement(kinds, ours, theirs), divergence(kinds, ours, theirs)
    print(f"rate {rate}: {same.text('.2f')} % the same, KL {far.text('.1e', 1)}")
    assert same.value >= SAME
    assert far.value < 1e-3
    kept = [[answer.image_tokens for answer in answers] for answers in ours]
    assert kept == [[answer.image_tokens for answer in answers] for answers in theirs]
    other = ask(TransformersAsker(oracle, EraConfig(policy="uniform")), pictures, 0.889)
    assert agreement(kinds, ours, other).value < SAME, "the comparison tells policies apart"


def test_questions_are_those_that_transformers_is_asked(engine, setup, oracle):
    """Through the chat template the engine takes the user's text, and no more."""
    pictures = list(generate(6, seed=778))
    kinds = ("picture",) * len(pictures)
    settings = {"policy": "cdpruner", "policy_options": {"rest": "merged"}, "question_aware": True}
    live = engine(setup(**settings))
    ours = ask(EngineAsker(live.llm), pictures, 0.889)
    theirs = ask(TransformersAsker(oracle, EraConfig.parse(settings)), pictures, 0.889)
    same, far = agreement(kinds, ours, theirs), divergence(kinds, ours, theirs)
    print(
        f"{sum(map(len, ours))} questions: {same.text('.2f')} % the same, KL {far.text('.1e', 1)}"
    )
    assert same.value >= SAME and far.value < 1e-3
    other = EraConfig.parse({**settings, "question_reduction": "mean"})
    unlike = divergence(kinds, ours, ask(TransformersAsker(oracle, other), pictures, 0.889))
    assert unlike.value > 10 * max(far.value, 1e-4), "the comparison tells questions apart"


@pytest.mark.slow
def test_several_pictures_and_videos(engine, setup):
    """As many tokens as a server tells of, and answers that are mostly right."""
    asker = EngineAsker(engine(setup(model=str(CHECKPOINT_QWEN3_VL))).llm)
    subjects = load_task_samples()
    whole, pruned = (ask(asker, subjects, rate) for rate in (0.0, 0.5))
    right = count(subjects, whole).total
    assert right.right / right.asked > 0.6
    for subject, one, other in zip(subjects, whole, pruned, strict=True):
        before, after = one[0].image_tokens, other[0].image_tokens
        assert before > 16 * len(subject.media) and 0.4 < after / before < 0.6
