"""Attention on visual tokens, on the shipped checkpoint: what each stage does to it."""

from pathlib import Path

import pytest
import torch

from era_vllm.cli import main
from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT, mass
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import draw_task


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(str(CHECKPOINT))


def test_pruning_takes_attention_away_and_the_bias_gives_it_back(
    oracle: Oracle, tmp_path: Path
) -> None:
    task, config = draw_task("standard", 777, 0, load_material()), EraConfig()
    without = EraConfig(bias=False)
    bare = EraConfig(merge=False, bias=False)
    rows = mass.measure(
        oracle,
        [task],
        [
            ("unpruned", config, 0.0),
            ("unpruned without bias", without, 0.0),
            ("era", config, 0.889),
            ("era bias=false", without, 0.889),
            ("era merge=false bias=false", bare, 0.889),
            ("era gamma=0", EraConfig(gamma=0.0), 0.889),
        ],
    )
    whole, same, biased, merged, pruned, none = (torch.tensor(row.layers) for row in rows)
    assert whole.shape == (4,)
    assert torch.equal(whole, same)
    for share in (whole, biased, merged, pruned):
        assert (share > 0).all() and (share < 1).all()
    assert (merged < whole).all() and (pruned < whole).all()
    assert (merged < biased).all()
    assert torch.allclose(none, merged, atol=1e-6)
    mass.draw(tmp_path / "mass.png", "a title", rows)
    assert (tmp_path / "mass.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mass", "61"], "--mass: got 61, allowed: 0 to 60"),
        (["--mass", "-1"], "--mass: got -1"),
        (["--mass", "2", "--url", "http://127.0.0.1:9"], "--url"),
        (["era_vllm/lab/checkpoint_qwen3_vl", "--mass", "2"], "allowed: LlavaForConditional"),
        (["--split", "train"], "invalid choice: 'train'"),
    ],
)
def test_bad_input_is_said_at_once(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(CHECKPOINT.parents[2] / word) if "/lab/" in word else word for word in words]
    try:
        code = main.main(["eval", *words])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert said in capsys.readouterr().err
