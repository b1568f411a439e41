"""The loop: the same command gives the same losses, and a training can be gone on with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")
pytest.importorskip("matplotlib", reason="needs matplotlib (the lab extra)")

from era_vllm.errors import ConfigError
from era_vllm.lab.synth.tasks import Kind
from era_vllm.lab.train import loop
from era_vllm.lab.train.arch import ARCHS, architecture
from era_vllm.lab.train.curve import LINES, PICTURE, append, cut, read
from era_vllm.lab.train.loop import EXPORT, Settings, run
from era_vllm.lab.train.optim import SharedMuon, orthogonalised
from era_vllm.lab.train.ranks import Ranks
from era_vllm.lab.train.recipe import Recipe, Stage
from tests.unit.lab.train.small_decoder import use

STEPS = 4
ALL: dict[Kind, float] = {"picture": 1, "several": 1, "film": 1}
ROWS: dict[Kind, int] = {"picture": 2, "several": 2, "film": 2, "standard": 2}
RECIPES = {
    "qwen3_vl": Recipe(
        2, 4, Stage({"picture": 1}, ROWS, True), Stage(ALL, ROWS, True), Stage(ALL, ROWS)
    ),
    **dict.fromkeys(("llava", "smol"), Recipe(2, 2, *[Stage({"standard": 1}, ROWS)] * 3)),
}


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    for name in ARCHS:
        arch = architecture(name)
        monkeypatch.setattr(arch, "dev", dict.fromkeys(arch.dev, 2))
    monkeypatch.setattr(loop, "_REPORT", 2)


def settings(arch: str, out: Path) -> Settings:
    out.mkdir()
    return Settings(arch, out, 60.0, steps=STEPS, seed=3, warmup=2, recipe=RECIPES[arch])


@pytest.mark.parametrize(
    "arch",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "qwen3_vl")) for name in ARCHS],
)
def test_going_on_gives_the_losses_of_going_through(arch: str, tmp_path: Path) -> None:
    through = settings(arch, tmp_path / "through")
    losses = run(through, Ranks())
    half = replace(settings(arch, tmp_path / "half"), steps=STEPS // 2)
    first = run(half, Ranks())
    second = run(replace(half, resume=True), Ranks())
    assert first + second == pytest.approx(losses, rel=1e-5)
    assert {EXPORT, LINES, PICTURE, "state.pt"} <= {file.name for file in half.out.iterdir()}
    lines = read(half.out)
    assert lines[-1]["step"] == STEPS and sum(asked for _, asked in lines[-1]["dev"].values()) > 4


def test_weights_alone_are_enough_to_begin(tmp_path: Path) -> None:
    first = settings("qwen3_vl", tmp_path / "first")
    run(replace(first, steps=1), Ranks())
    other = replace(settings("qwen3_vl", tmp_path / "other"), steps=1, from_text=True)
    run(replace(other, weights=first.out / EXPORT), Ranks())
    assert read(other.out)[-1]["seen"] == 2


def test_a_state_of_another_architecture_is_refused(tmp_path: Path) -> None:
    first = settings("llava", tmp_path / "first")
    run(replace(first, steps=1), Ranks())
    with pytest.raises(ConfigError, match="is of --arch llava, got qwen3_vl"):
        run(replace(first, arch="qwen3_vl", resume=True), Ranks())
    with pytest.raises(ConfigError, match="is of --seed 3, got 0"):
        run(replace(first, seed=0, resume=True), Ranks())


def test_lines_of_steps_that_were_not_saved_are_dropped(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        append(tmp_path, {"step": step})
    with (tmp_path / LINES).open("a") as file:
        file.write('{"step": 7, "lo{"step": 2}\n{"step": 3, "lo')  # killed while it wrote
    cut(tmp_path, 4)
    assert [line["step"] for line in read(tmp_path)] == [2, 4]
    cut(tmp_path, 0)
    assert read(tmp_path) == []


def test_a_training_goes_on_without_what_it_began_without(tmp_path: Path) -> None:
    first = replace(settings("llava", tmp_path / "first"), steps=0, from_text=True)
    run(first, Ranks())
    resumed = loop._Training(replace(first, from_text=False, resume=True), Ranks())
    assert resumed.progress.from_text and resumed.recipe.tower == resumed.recipe.small == 0


def test_muon_is_torchs_in_float32() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(24, 40), torch.randn(40, 24), torch.randn(24, 40)]
    gradients = [torch.randn_like(matrix) for matrix in matrices]
    ours, theirs = ([matrix.clone().requires_grad_() for matrix in matrices] for _ in range(2))
    for own in (ours, theirs):
        for matrix, gradient in zip(own, gradients, strict=True):
            matrix.grad = gradient.clone()
    SharedMuon(ours, Ranks(), 0.1, 0.02).step()
    torch.optim.Muon(theirs, lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw").step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 0.01  # theirs is worked out in bfloat16


def test_orthogonalised_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(2, 16, 48)))
    assert values.min() > 0.6 and values.max() < 1.3
