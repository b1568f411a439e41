"""The fit of gamma: attention as unpruned on pictures it has not seen; nothing to fit, nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from era_vllm.calibration import calibrated
from era_vllm.cli.calibrate import verdict
from era_vllm.cli.main import main
from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.asking import chat_prompt
from era_vllm.lab.calibrate import (
    Case,
    Check,
    Seen,
    _sums,
    as_setting,
    cases_of,
    check,
    fit,
    fit_mass,
    rescaled,
)
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples

PAPER = EraConfig.parse({"preset": "paper"})


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(str(CHECKPOINT))


@pytest.fixture(scope="module")
def cases(oracle: Oracle) -> list[Case]:
    return [case for number in range(8) for case in _cases(oracle, PAPER, (0.889,), number)]


def _cases(oracle: Oracle, config: EraConfig, rates: Sequence[float], number: int) -> list[Case]:
    sample = load_samples()[number]
    questions = [question.text for question in sample.questions]
    return cases_of(oracle, config, rates, (number, sample.image, questions))


def _nothing() -> None:
    pass


def test_layers_attend_as_unpruned_on_other_pictures(oracle: Oracle, cases: list[Case]) -> None:
    half = len(cases) // 2
    gamma = as_setting(fit(oracle, cases[:half], step=_nothing))
    found = check(oracle, cases[half:], [(True, None, 1.0), (True, gamma, 1.0)], step=_nothing)
    before, after = found.odds.abs()
    assert (before > 0.4).all()  # the paper's bias is too little in each layer of this model
    assert (after < 0.25).all()


def test_one_mass_for_all_layers_restores_their_mean(oracle: Oracle, cases: list[Case]) -> None:
    """What is left is between layers; a bias that is three times too little is found out."""
    half = len(cases) // 2
    factor = fit_mass(oracle, cases[:half], step=_nothing)
    assert factor > 1.2, "the paper's figure has another model"
    third = [replace(case, pruned=rescaled(case.pruned, 1 / 3)) for case in cases[:half]]
    assert fit_mass(oracle, third, step=_nothing) == pytest.approx(3 * factor, rel=0.02)
    found = check(oracle, cases[half:], [(True, None, 1.0), (True, None, factor)], step=_nothing)
    before, after = found.odds.mean(1)
    assert before > 0.4 and abs(after) < before / 3


def test_what_was_not_pruned_keeps_the_papers_bias(oracle: Oracle, cases: list[Case]) -> None:
    whole = [Case(case.whole_ids, case.whole, case.whole_ids, case.whole) for case in cases[:2]]
    assert fit(oracle, whole, step=_nothing) == [[1.0]] * 4


def test_query_heads_count_for_their_own_kv_head() -> None:
    """Four query heads of two KV heads: the first two want ln 2 more, the others ln 4."""
    share, bias = torch.full((1, 4, 3), 0.5), torch.full((1, 4, 3), 0.5)
    odds = torch.tensor([2.0, 2.0, 4.0, 4.0]).log().view(1, 4, 1).expand(1, 4, 3)
    whole = Seen(odds, share, bias, torch.zeros(1))
    pruned = Seen(torch.zeros(1, 4, 3), share, bias, torch.zeros(1))
    numerator, denominator = _sums(whole, pruned, 2)
    wanted = torch.tensor([[2.0, 4.0]]).log() / 0.5
    assert torch.allclose(numerator / denominator, wanted)


def test_every_rate_is_measured_on_both_halves(oracle: Oracle) -> None:
    kept = [
        [len(case.pruned[0].anchors) for case in _cases(oracle, EraConfig(), (0.5, 0.944), number)]
        for number in range(4)
    ]
    assert [counts[0] for counts in kept] == [72, 72, 8, 8]
    assert all({72, 8} == set(counts) for counts in kept)


def test_prompts_and_positions_are_those_that_are_served(oracle: Oracle) -> None:
    config = EraConfig(positions="compact")
    cases = _cases(oracle, config, (0.889,), 0)
    sample = load_samples()[0]
    prompt = chat_prompt(oracle.processor, sample.questions[0].text)
    assert list(cases[0].whole_ids).count(oracle.processor.tokenizer.bos_token_id) == 1
    assert cases[0].whole_ids == oracle.prompt_ids(prompt, [144], add_special_tokens=False)
    original = fit(oracle, cases, step=_nothing)
    assert fit(oracle, cases, positions="compact", step=_nothing) != original


def test_it_is_recommended_where_it_helps_alone() -> None:
    def saved(*values: float) -> Check:
        kl = torch.stack([torch.zeros(len(values)), torch.tensor(values), torch.zeros(len(values))])
        return Check(torch.zeros(3, 1), kl, torch.zeros(3, len(values)))

    path = Path("c.json")
    assert verdict(saved(0.2, 0.3, 0.25), path) == "use it: --era-calibration c.json"
    assert "gains nothing that these pictures show" in verdict(saved(0.3, -0.3, 0.1), path)
    assert "loses" in verdict(saved(-0.2, -0.3, -0.25), path)


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
    gamma = EraConfig.parse(found).gamma
    assert isinstance(gamma, tuple) and len(gamma) == 4 and gamma != (1.0,) * 4
    words = ["calibrate", str(CHECKPOINT), str(pictures), "--sections", "mass_scale", "gamma"]
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert "needs era's weighting by saliency" in capsys.readouterr().err
    assert main([*words, "--era-preset", "paper", "--out", str(tmp_path)]) == 0
    assert "mass_scale: " in capsys.readouterr().out
    settings = calibrated(str(CHECKPOINT), {"preset": "paper", "calibration": str(file)})
    both = EraConfig.parse(settings)
    assert dict(both.policy_options)["mass_scale"] != 0.39 and both.gamma is not None
    refused = tmp_path / "refused"
    (refused / "calibration.json").mkdir(parents=True)
    assert main([*command, "--out", str(refused)]) == 2
    assert "is no file" in capsys.readouterr().err
    prompts = tmp_path / "prompts.txt"
    for text, said in (("what is in <image>?", "no <image>"), ("word " * 3000, "allowed: 2048")):
        prompts.write_text(text)
        assert main([*command, "--prompts", str(prompts), "--out", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    command = ["calibrate", str(CHECKPOINT), str(pictures), "--era-policy", "visionzip"]
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "gives no bias" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rates", "0"], "--rates: got 0"),
        (["--count", "3"], "--count: got 3, allowed: 4 or more"),
        (["--count", "-1"], "--count: got -1, allowed: 4 or more"),
        (["nosuch"], "needed a folder with config.json"),
        ([str(CHECKPOINT), "nosuch"], "PICTURES: got 'nosuch', needed a folder"),
        (["--prompts", "x"], "--prompts: needs pictures of your own"),
    ],
)
def test_refusals(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *words, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.rstrip().count("\n") == 0


@pytest.mark.parametrize("flag", ["--era-gamma=1", "--era-no-bias", "--era-pruning-rate=.5"])
def test_what_means_nothing_here_is_unknown(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", flag])
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_every_command_with_the_flag_reads_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(tmp_path / "nosuch.json")
    picture = tmp_path / "a.png"
    load_samples()[0].image.save(picture)
    flag = ["--era-calibration", missing]
    for words in (["inspect", str(picture)], ["doctor"], ["serve", "--print-command"]):
        assert main([*words, *flag]) == 2, words
        assert "nosuch.json': No such file" in capsys.readouterr().err
    monkeypatch.setenv("ERA_CALIBRATION", missing)
    assert main(["serve", "--print-command"]) == 2
    assert "nosuch.json': No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "serve", *flag])


@pytest.mark.parametrize("name", ["dpp", "paper"])
def test_the_files_beside_the_sample_model_are_of_it(name: str) -> None:
    settings = {"preset": "paper"} if name == "paper" else {"policy": "dpp"}
    file = CHECKPOINT / f"calibration.{name}.json"
    found = EraConfig.parse(calibrated(str(CHECKPOINT), {**settings, "calibration": file}))
    assert isinstance(found.gamma, tuple) and len(found.gamma) == 4
    assert ("mass_scale" in dict(found.policy_options)) == (name == "paper")
