"""``era-vllm train``: refusals in one line. Trains nothing."""

from pathlib import Path

import pytest
import torch

from era_vllm.cli.main import main
from era_vllm.lab import CHECKPOINT


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--minutes", "-1"], "--minutes: got -1, allowed: 0 or more"),
        (["--ranks", "0"], "--ranks: got 0, allowed: 1 or more"),
        (["--lr", "1"], "--lr: got 1, allowed: above 0"),
        (["--resume"], "no state.pt"),
        (["--weights", "nowhere"], "no config.json in 'nowhere'"),
        (["--weights", str(CHECKPOINT)], "is of --arch llava, got qwen3_vl"),
        (["--arch", "smol", "--weights", str(CHECKPOINT)], "no delta.safetensors in"),
        (["--device", "cuda", "--ranks", "2"], "--ranks: got 2"),
        (["--device", "cuda"], "--device: got cuda, allowed here: cpu"),
    ],
)
def test_refusals(
    flags: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "--arch", "qwen3_vl", "--out", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_training_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.pt").touch()
    assert main(["train", "--arch", "llava", "--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
