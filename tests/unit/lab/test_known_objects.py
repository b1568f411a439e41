"""A selection that knows the things: what it keeps, and that knowing nothing is the plain one."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.known_objects import KINDS, KnowingAsker, quality
from era_vllm.lab.oracle import Oracle, segments_of
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import QUOTAS, draw_task


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(str(CHECKPOINT))


def test_things_are_kept_before_background(oracle: Oracle) -> None:
    quotas = {family: QUOTAS[family] for family in KINDS}
    task = draw_task("standard", 3, 0, load_material(split="test"), quotas=quotas)
    (scene,), (picture,) = task.items[0].scenes, task.items[0].frames
    config, questions = EraConfig(policy="dpp"), task.questions[:1]
    things = quality(scene, 14, None)[0, 0] == 1
    of_kind = quality(scene, 14, KINDS[questions[0].family])[0, 0] == 1
    assert 8 < things.sum() < 72 and (of_kind & ~things).sum() == 0
    kept = {}
    for known in ("nothing", "things", "things of the kind asked about"):
        asker = KnowingAsker(oracle, config, known)
        asker._task = replace(task, questions=questions)
        (segment,) = asker.kept(questions[0].text, [picture], 0.944)
        kept[known] = segment.anchors
    (plain,) = segments_of(oracle.reduce([picture], config, 0.944))
    assert torch.equal(kept["nothing"], plain.anchors)
    assert things[kept["things"]].sum() > things[plain.anchors].sum()
    found = of_kind[kept["things of the kind asked about"]].sum()
    assert found > of_kind[plain.anchors].sum() and found >= min(8, int(of_kind.sum())) - 2
