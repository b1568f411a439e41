"""Attention on visual tokens, on the shipped checkpoint: what each stage does to it."""

import pytest
import torch

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT, mass
from era_vllm.lab.asking import chat_prompt
from era_vllm.lab.oracle import Oracle, segments_of
from era_vllm.lab.samples import load_samples


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(str(CHECKPOINT))


def test_pruning_takes_attention_away_and_the_bias_gives_it_back(oracle: Oracle) -> None:
    sample, config = load_samples()[0], EraConfig()
    text = chat_prompt(oracle.processor.tokenizer, sample.questions[0].text)
    whole = segments_of(oracle.reduce([sample.image], config, 0.0))
    merged = segments_of(oracle.reduce([sample.image], config, 0.889))
    unpruned = mass.visual_mass(oracle, text, whole, bias=False)
    assert len(unpruned) == 4
    assert torch.equal(unpruned, mass.visual_mass(oracle, text, whole, bias=True))
    without = mass.visual_mass(oracle, text, merged, bias=False)
    with_bias = mass.visual_mass(oracle, text, merged, bias=True)
    for share in (unpruned, without, with_bias):
        assert (share > 0).all() and (share < 1).all()
    assert (without < unpruned).all()
    assert (without < with_bias).all()
    shares = dict(zip(mass.STAGES, (unpruned, without, without, with_bias), strict=True))
    needed, got = mass.growth(shares)
    assert torch.allclose(
        needed[0], unpruned[0] / (1 - unpruned[0]) * (1 - without[0]) / without[0]
    )
    assert (got > 1).all()
    assert len(mass.table(shares).splitlines()) == 2 + 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuch"], "needed a folder with a model's config.json"),
        ([str(CHECKPOINT), "--rate", "1.5"], "1.5"),
        ([str(CHECKPOINT), "--pictures", "0"], "--pictures: got 0"),
    ],
)
def test_bad_input_is_said_at_once(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        mass.main(words)
    assert said in capsys.readouterr().err
