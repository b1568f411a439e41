"""Matrix entropy by layer: known spectra, and the rule for the collapse."""

import json
import math
from pathlib import Path

import pytest
import torch

from era_vllm.cli.main import main
from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.asking import chat_prompt
from era_vllm.lab.ecl import collapse, layer_entropies, matrix_entropy
from era_vllm.lab.oracle import Oracle, segments_of
from era_vllm.lab.samples import load_samples


def test_entropies_of_known_spectra() -> None:
    assert matrix_entropy(torch.ones(7, 3)) == 0.0  # all alike: no direction
    line = torch.outer(torch.arange(5.0), torch.tensor([1.0, 2.0, 0.0]))
    assert matrix_entropy(line) == pytest.approx(0.0, abs=1e-9)
    corners = torch.cat([torch.eye(4), -torch.eye(4)])
    assert matrix_entropy(corners) == pytest.approx(math.log(4))


@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
def test_it_is_that_of_the_covariance(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    tokens = torch.randn(shape) * torch.linspace(1, 9, shape[1])
    values = torch.linalg.eigvalsh(torch.cov(tokens.T.double())).clamp_min(1e-300)
    share = values / values.sum()
    assert matrix_entropy(tokens) == pytest.approx(float(-(share * share.log()).sum()), rel=1e-6)
    assert matrix_entropy(3 * tokens + 5) == pytest.approx(matrix_entropy(tokens), rel=1e-4)


def test_the_collapse_is_the_largest_fall_in_the_first_half() -> None:
    assert collapse(torch.tensor([5.0, 4.9, 2.0, 1.9, 0.1])) == 2
    assert collapse(torch.tensor([5.0, 3.0, 2.9, 2.8, 0.1])) == 1
    assert collapse(torch.tensor([1.0, 2.0, 3.0, 1.0, 0.5])) is None
    assert collapse(torch.tensor([5.0, 4.9, 4.8, 1.0, 0.5])) is None  # no fall is sharp


def test_layers_are_those_that_transformers_gives() -> None:
    oracle, sample = Oracle(str(CHECKPOINT)), load_samples()[0]
    segments = segments_of(oracle.reduce([sample.image], EraConfig(), 0.0))
    text = chat_prompt(oracle.processor, "is there a red circle?")
    ids = oracle.prompt_ids(text, [segments[0].n], add_special_tokens=False)
    ours = layer_entropies(oracle, ids, segments)
    plain = {"add_special_tokens": False, "return_tensors": "pt"}  # the template has its own
    given = oracle.processor(images=sample.image, text=text, **plain)
    given.pop("token_type_ids", None)
    with torch.no_grad():
        states = oracle.model(**given, output_hidden_states=True).hidden_states
    visual = given["input_ids"][0] == oracle.image_token
    theirs = [matrix_entropy(layer[0, visual]) for layer in states[:-1]]  # the last one is normed
    assert ours[:-1].tolist() == pytest.approx(theirs, abs=1e-3)
    assert len(ours) == len(states)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the lab extra)")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    assert main(["ecl", str(CHECKPOINT), str(pictures), "--out", str(tmp_path)]) == 2
    assert "has 0 pictures that can be asked about" in capsys.readouterr().err
    for index, sample in enumerate(load_samples()[:2]):
        sample.image.save(pictures / f"{index}.png")
    assert main(["ecl", str(CHECKPOINT), str(pictures), "--out", str(tmp_path)]) == 0
    assert "Entropy Collapse Layer: " in capsys.readouterr().out
    assert len(json.loads((tmp_path / "ecl.json").read_text())["entropy"]) == 5
    assert (tmp_path / "ecl.png").stat().st_size > 5_000
    (pictures / "x.png").write_text("no picture")
    assert main(["ecl", str(CHECKPOINT), str(pictures), "--out", str(tmp_path)]) == 0
    assert "left out" in capsys.readouterr().err
