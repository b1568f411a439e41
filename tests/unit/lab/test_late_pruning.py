"""EntropyPrune inside the language model: what leaves is gone from there on, and what is served."""

from collections.abc import Iterator

import pytest
from torch import Tensor

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.asking import chat_prompt
from era_vllm.lab.late_pruning import RATES, answer_late, measure, most_entropic, table
from era_vllm.lab.oracle import Oracle, segments_of
from era_vllm.lab.samples import load_samples
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import QUOTAS, draw_task

QUESTION = "what shape is red?"


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(str(CHECKPOINT))


@pytest.fixture
def heard(oracle: Oracle) -> Iterator[list[Tensor]]:
    """What the layers attend to, a tensor each: [heads, rows, columns]."""
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, given: found.append(given[1][0]))
        for layer in oracle.model.model.language_model.layers
    ]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("layer", [1, 2])
def test_what_leaves_is_seen_below_and_by_nobody_above(
    oracle: Oracle, heard: list[Tensor], layer: int
) -> None:
    image = load_samples()[0].image
    (whole,) = segments_of(oracle.reduce([image], EraConfig(), 0.0))
    text = chat_prompt(oracle.processor, QUESTION)
    ids = oracle.prompt_ids(text, [144], add_special_tokens=False)
    _, chosen = answer_late(oracle, ids, whole, layer, most_entropic, 16)
    assert len(chosen) == 16
    first = ids.index(oracle.image_token)
    gone = sorted(set(range(144)) - set(chosen.tolist()))
    for index, attention in enumerate(heard[:4]):
        last = attention[:, -1, first : first + 144]
        assert bool((last[:, gone] == 0).all()) == (index >= layer)
        assert (last[:, chosen] > 0).all()


def test_by_the_picture_alone_the_choice_is_the_published_one(oracle: Oracle) -> None:
    """Behind the template's text; and random tokens are others, so that the measure can tell."""
    quotas = {"shape": QUOTAS["shape"]}
    drawn = (
        draw_task("standard", 5, at, load_material(split="test"), quotas=quotas) for at in (0, 1)
    )
    tasks = [task for task in drawn if task.questions]
    rows = measure(oracle, tasks, 2)
    assert [row.rate for row in rows] == [0.0, *(rate for rate in RATES for _ in range(4))]
    for row in rows[1:]:
        same = sum(row.same) / len(row.same)
        assert same < 0.5 if "random" in row.name else same > 0.95
        assert [len(own) for own in row.answers] == [len(task.questions) for task in tasks]
    assert table(tasks, rows).count("\n") == len(rows) + 1
