"""The fit of gamma: attention as unpruned on pictures it has not seen; nothing to fit, nothing."""

from pathlib import Path

import pytest

from era_vllm.calibration import calibrated
from era_vllm.cli.calibrate import _cases
from era_vllm.cli.main import main
from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.calibrate import Case, as_setting, check, fit
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(str(CHECKPOINT))


@pytest.fixture(scope="module")
def cases(oracle: Oracle) -> list[Case]:
    config = EraConfig()
    return [
        case
        for sample in load_samples()[:8]
        for case in _cases(
            oracle, config, (0.889,), sample.image, [question.text for question in sample.questions]
        )
    ]


def _nothing() -> None:
    pass


def test_layers_attend_as_unpruned_on_other_pictures(oracle: Oracle, cases: list[Case]) -> None:
    half = len(cases) // 2
    gamma = as_setting(fit(oracle, cases[:half], step=_nothing))
    found = check(oracle, cases[half:], [(True, None), (True, gamma)], step=_nothing)
    before, after = found.odds.abs()
    assert (before > 0.4).all()  # the paper's bias is too little in each layer of this model
    assert (after < 0.25).all()


def test_what_was_not_pruned_keeps_the_papers_bias(oracle: Oracle, cases: list[Case]) -> None:
    whole = [Case(case.whole_ids, case.whole, case.whole_ids, case.whole) for case in cases[:2]]
    assert fit(oracle, whole, step=_nothing) == [[1.0]] * 4


def test_each_kv_head_may_have_its_own(oracle: Oracle, cases: list[Case]) -> None:
    heads = oracle.model.config.text_config.num_key_value_heads
    gamma = fit(oracle, cases[:8], per_head=True, step=_nothing)
    assert [len(row) for row in gamma] == [heads] * 4
    assert len({value for row in gamma for value in row}) > heads
    assert EraConfig(gamma=as_setting(gamma)).exponents(4, heads) is not None


def test_the_command_writes_what_a_server_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the lab extra)")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, sample in enumerate(load_samples()[:4]):
        sample.image.save(pictures / f"{index}.png")
    command = ["calibrate", str(CHECKPOINT), str(pictures), "--era-policy", "dpp"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "| gamma | " in capsys.readouterr().out
    file = tmp_path / "calibration.json"
    assert file.with_suffix(".png").stat().st_size > 10_000
    found = calibrated(str(CHECKPOINT), {"policy": "dpp", "calibration": str(file)})
    assert EraConfig.parse(found).gamma is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--era-gamma", "1"], "--era-gamma: is what is worked out here"),
        (["--era-no-bias"], "--era-no-bias"),
        (["--rates", "0"], "--rates: got 0"),
        (["--count", "3"], "pictures: got 3, needed 4"),
        (["nosuch"], "needed a folder with config.json"),
        ([str(CHECKPOINT), "nosuch"], "PICTURES: got 'nosuch', needed a folder"),
        (["--prompts", "x"], "--prompts: needs pictures of your own"),
        (["--era-calibration", "x"], "--era-calibration"),
    ],
)
def test_refusals(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *words, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.rstrip().count("\n") == 0
