"""Calibration files: what they set, and that they belong to a model and a way of pruning."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from era_vllm.calibration import calibrated, model_identity, settings_of, write
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError

DPP = {"policy": "dpp"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "dtype": "float32"}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 2048)
    return folder


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "calibration.json"
    write(path, model, {"gamma": (EraConfig.parse(DPP), [[0.5], [1.25]])}, {"pictures": 8})
    return path


def test_it_sets_gamma_and_enters_every_cache_key(model: Path, file: Path) -> None:
    found = calibrated(str(model), {**DPP, "calibration": str(file)})
    assert found == {**DPP, "gamma": [0.5, 1.25]}
    ours = EraConfig.parse(found)
    assert ours.exponents(2, 3) == ((0.5,) * 3, (1.25,) * 3)
    assert ours.fingerprint() != EraConfig.parse(DPP).fingerprint()
    assert calibrated(str(model), DPP) == DPP


def test_heads_of_a_layer_may_differ(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    write(path, model, {"gamma": (EraConfig(), [[0.5, 1.0], [2.0, 0.0]])}, {})
    found = calibrated(str(model), {"calibration": path})
    assert EraConfig.parse(found).exponents(2, 2) == ((0.5, 1.0), (2.0, 0.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy": "era"}, 'measured with policy = "dpp", got "era"'),
        (
            {**DPP, "policy_options": {"ridge": 0.2}},
            'policy_options = {"ridge": 0.1, "relevance_weight": 0.0}, got {"ridge"',
        ),
        ({**DPP, "max_segment": 64}, "measured with max_segment = 4096, got 64"),
        ({**DPP, "merge": False}, "measured with merge = true, got false"),
        ({"preset": "scout"}, "measured with scout = 0, got 2"),
        ({**DPP, "scout": 2}, "measured with scout = 0, got 2"),
        ({**DPP, "frames_per_segment": 2}, "measured with frames_per_segment = 1, got 2"),
        (
            {**DPP, "question_aware": True, "policy_options": {"relevance_weight": 0.1}},
            "measured with question_aware = false, got true",
        ),
        ({**DPP, "positions": "compact"}, 'measured with positions = "original"'),
        ({**DPP, "bias": False}, "measured with bias = true, got false"),
        ({**DPP, "gamma": 0.5}, "calibration and gamma: choose one"),
    ],
)
def test_another_way_of_pruning_is_refused(
    settings: dict[str, object], said: str, model: Path, file: Path
) -> None:
    with pytest.raises(ConfigError, match="calibration") as caught:
        calibrated(str(model), {**settings, "calibration": str(file)})
    assert said in str(caught.value)


def test_every_setting_counts_or_is_known_not_to() -> None:
    """A new one has to be put on one of the two sides."""
    free = {*("pruning_rate", "min_pruning_rate", "max_pruning_rate", "levels"), "gamma", "bias"}
    free |= {"separators", "allow_extrapolation", "bias_store", "bias_columns"}
    assert {field.name for field in fields(EraConfig)} - free == set(settings_of(EraConfig()))


def test_rates_and_levels_may_differ(model: Path, file: Path) -> None:
    settings: dict[str, object] = {**DPP, "policy_options": {"ridge": 0.1}}  # as by default
    settings |= {"pruning_rate": 0.9, "calibration": str(file)}
    assert calibrated(str(model), settings)["pruning_rate"] == 0.9


def test_other_weights_are_refused_and_a_copy_is_not(model: Path, file: Path) -> None:
    copy = model.with_name("copy")
    shutil.copytree(model, copy)
    config = {"dtype": "bfloat16", "hidden_size": 8, "transformers_version": "9"}
    (copy / "config.json").write_text(json.dumps(config))
    assert model_identity(copy) == model_identity(model)
    calibrated(str(copy), {**DPP, "calibration": str(file)})
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[len(weights) // 2 + 7] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="another model"):
        calibrated(str(copy), {**DPP, "calibration": str(file)})


@pytest.mark.parametrize("name", ["a.weight", "z.weight"])
def test_a_changed_tensor_is_seen_wherever_it_lies(name: str, tmp_path: Path) -> None:
    tensors = {key: torch.zeros(300, 300) for key in ("a.weight", "m.weight", "z.weight")}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    before = model_identity(tmp_path)
    tensors[name] = torch.ones(300, 300)
    save_file(tensors, tmp_path / "model.safetensors")
    assert model_identity(tmp_path) != before
    (tmp_path / "y.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "x.bin").mkdir()
    model_identity(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        model_identity(tmp_path)


def test_a_name_of_the_hub_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="needed a folder with config.json and weights"):
        calibrated("llava-hf/llava-1.5-7b-hf", {**DPP, "calibration": str(file)})


def _without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {**content, "gamma": {key: v for key, v in content["gamma"].items() if key != name}}


def test_a_file_that_is_none_is_refused(model: Path, file: Path) -> None:
    settings = {**DPP, "calibration": str(file)}
    whole = json.loads(file.read_text())
    for text, said in (
        ("", "is no JSON"),
        ("[]", "has no section mass_scale or gamma"),
        ("[" * 100_000, "is no JSON"),
        (json.dumps({**whole, "format": 2}), "has no section .* of format 1"),
        (json.dumps(_without(whole, "model")), "gamma has no model"),
        (json.dumps({**whole, "gamma": {**whole["gamma"], "values": [1.0]}}), "no \\[layer\\]"),
        (json.dumps({**whole, "gamma": {**whole["gamma"], "values": [[-1.0]]}}), "gamma"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            calibrated(str(model), settings)
    file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        calibrated(str(model), settings)
    with pytest.raises(ConfigError, match="needed the name of a file"):
        calibrated(str(model), {"calibration": 3})


def test_mass_is_set_before_the_gamma_that_was_measured_with_it(
    model: Path, tmp_path: Path
) -> None:
    path, preset = tmp_path / "both.json", {"preset": "paper"}
    paper = EraConfig.parse(preset)
    options = {**dict(paper.policy_options), "mass_scale": 0.7}
    heavier = EraConfig.parse({**preset, "policy_options": options})
    write(path, model, {"mass_scale": (paper, 0.7), "gamma": (heavier, [[0.5], [1.25]])}, {})
    found = calibrated(str(model), {**preset, "calibration": path})
    assert EraConfig.parse(found) == EraConfig.parse(
        {**preset, "policy_options": options, "gamma": [0.5, 1.25]}
    )
    for settings, said in (
        ({**preset, "policy_options": {"mass_scale": 0.39}}, "calibration and mass_scale"),
        ({"policy": "era"}, "measured with policy_options = .*saliency"),
    ):
        with pytest.raises(ConfigError, match=said):
            calibrated(str(model), {**settings, "calibration": path})
    content = json.loads(path.read_text())
    content["mass_scale"]["values"] = 0.71
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="measured with policy_options"):
        calibrated(str(model), {**preset, "calibration": path})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gama": {}}, "unknown section 'gama'; did you mean 'gamma'"),
        ({"gamma": None}, "gamma is no section"),
        ({"gamma": [1, 2]}, "gamma is no section"),
        ({"mass_scale": {"values": "much"}}, "mass_scale's values are no number"),
        ({"mass_scale": {"values": True}}, "mass_scale's values are no number"),
        ({"mass_scale": {"values": 1}}, None),
    ],
    ids=str,
)
def test_nothing_in_a_file_is_passed_over(
    change: dict[str, Any], said: str | None, model: Path, tmp_path: Path
) -> None:
    path, paper = tmp_path / "both.json", EraConfig.parse({"preset": "paper"})
    write(path, model, {"mass_scale": (paper, 1.0)}, {})
    content = json.loads(path.read_text())
    for name, value in change.items():
        merged = {**content.get(name, {}), **value} if name in content else value
        content[name] = merged
    path.write_text(json.dumps(content))
    settings = {"preset": "paper", "calibration": path}
    if said is None:
        assert EraConfig.parse(calibrated(str(model), settings)).policy == "era"
        return
    with pytest.raises(ConfigError, match=said):
        calibrated(str(model), settings)
