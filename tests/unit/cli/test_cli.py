"""The command line: helps, one-line refusals, and ``inspect`` end to end. Starts no engine."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from era_vllm.cli.doctor import findings, page
from era_vllm.cli.doctor.check import Check
from era_vllm.cli.doctor.findings import Finding
from era_vllm.cli.main import COMMANDS, main
from era_vllm.errors import UnsupportedError
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.servers import Server, wait_for
from era_vllm.policies import defaults, policy_names
from era_vllm.viz import Kept, cell_box, draw
from era_vllm.vllm_plugin.launch import plugins_to_allow

SAMPLE = CHECKPOINT.parent / "samples" / "sample_00.png"
BIAS_COLOURS = {(48, 76, 201): 0.0, (250, 226, 64): 1.0}
"""Ends of the colour bar -> share of the largest bias."""


@pytest.mark.parametrize("command", ["serve", "inspect", "doctor", "demo"])
def test_help_shows_an_example_or_what_is_written(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"era-vllm {command}" in text
    assert "out/demo.json" in text or f"  era-vllm {command} " in text


def test_help_comes_before_what_is_wrong_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help", "--era-pruning-rate", "x"])
    assert ended.value.code == 0 and "--era-pruning-rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", ["--version", "--help", *(f"{name} --help" for name in COMMANDS), "bench serve --help"]
)
def test_a_help_waits_for_nothing_heavy(words: str) -> None:
    """Modules are counted, since seconds depend on the machine."""
    code = "import sys; from era_vllm.cli.main import main; main(sys.argv[1:])"
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *words.split()],
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "era_vllm.cli.main" in loaded and "era-vllm" in ended.stdout
    heavy = {"torch", "transformers", "vllm", "fastapi", "PIL", "numpy"} & loaded
    assert not heavy
    assert "pydantic_settings" not in loaded or words == "serve --help"  # its flags are made of it
    assert len(loaded) < (600 if words == "serve --help" else 300)


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())  # a long name stands in a line of its own
    assert all(f" {name} {summary}" in text for name, summary in COMMANDS.items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pruning-rate", "2"], "allowed: [0, 0.95]"),
        (["--era-policy", "erra"], "did you mean 'era'?"),
        (["--era-option", "alpha"], "NAME=VALUE"),
        (["--era-option", "rigde=1"], "did you mean 'ridge'?"),
        (["--model", str(SAMPLE.parent)], "no config.json could be read"),
        (["--out", "kept.txt"], ".png"),
        (["--out", str(SAMPLE)], "the image itself"),
    ],
)
def test_inspect_refuses_in_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(SAMPLE), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("era-vllm inspect: ")
    assert said in error
    assert error.count("\n") == 1


def _damaged(folder: Path) -> Path:
    (folder / "cut.png").write_bytes(SAMPLE.read_bytes()[:3000])
    return folder / "cut.png"


@pytest.mark.parametrize(
    ("name", "said"),
    [("nothing.png", "does not exist"), (".", "is a folder"), ("text.png", "is not a picture")],
)
def test_inspect_refuses_what_is_no_image(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_a_decoders_own_words_are_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(_damaged(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert "damaged or cut off" in error
    assert "truncated" not in error  # Pillow's word
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["--era-polcy", "era"], ["--pruning-rates", "0.5"], ["--pruning-rate", "much"]]
)
def test_an_unknown_flag_or_type_ends_with_code_2(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(SAMPLE), *flags])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_inspect_draws_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "kept.png"
    assert main(["inspect", str(SAMPLE), "--pruning-rate", "0.889", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "kept 16 of 144 visual tokens" in said
    assert str(out) in said
    with Image.open(out) as drawn:
        bright = [_is_bright(drawn.convert("RGB"), token, (12, 12)) for token in range(144)]
        assert min(drawn.size) > 700
    assert sum(bright) == 16


@pytest.mark.parametrize("policy", policy_names())
def test_inspect_shows_every_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    """Also one that reads the language model, which the others do without."""
    out = ["--out", str(tmp_path / "kept.png")]
    if defaults(policy).question_aware:
        out += ["--era-question-aware"]
    assert main(["inspect", str(SAMPLE), "--era-policy", policy, *out]) == 0
    assert f"kept 32 of 144 visual tokens ({policy}, " in capsys.readouterr().out


def test_inspect_shows_what_a_question_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--era-policy", "cdpruner", "--era-question-aware", "--era-pruning-rate", "0.889"]
    drawn: list[bytes] = []
    for number, asked in enumerate(([], ["--question", "what shape is red?"], ["--question", ""])):
        out = tmp_path / f"{number}.png"
        assert main(["inspect", str(SAMPLE), *flags, *asked, "--out", str(out)]) == 0
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[2] != drawn[1]
    capsys.readouterr()
    assert main(["inspect", str(SAMPLE), "--question", "what?", "--out", str(out)]) == 2
    assert "--question: nothing is pruned for what is asked" in capsys.readouterr().err
    assert main(["inspect", str(SAMPLE), *flags[:2], "--out", str(out)]) == 2
    assert "add --era-question-aware" in capsys.readouterr().err


def _is_bright(drawn: Image.Image, token: int, grid: tuple[int, int]) -> bool:
    """Whether a cell shows the picture as given: the middle of it is the same on both sides."""
    middles = []
    for panel in (0, 1):
        left, upper, right, lower = cell_box(token, grid, panel)
        quarter = (right - left) // 4
        box = (left + quarter, upper + quarter, right - quarter, lower - quarter)
        middles.append(np.asarray(drawn.crop(box)).astype(int))
    return bool((middles[0] == middles[1]).all())


def test_anchors_carry_the_colour_of_their_bias_and_dropped_tokens_are_black() -> None:
    grid, given = (2, 3), Image.new("RGB", (30, 20), (200, 210, 220))
    one = Kept(given, grid, [1, 4], [1, 0, 1, 1, 1, -1], [0.0, 2.0], "tile 1 of 2")
    drawn = draw([one], "a title")
    frames = [drawn.getpixel(cell_box(token, grid)[:2]) for token in (1, 4)]
    assert [BIAS_COLOURS[frame] for frame in frames] == [0.0, 1.0]  # type: ignore[index]
    assert [_is_bright(drawn, token, grid) for token in range(6)] == [0, 1, 0, 0, 1, 0]
    left, upper, right, lower = cell_box(5, grid)
    assert drawn.getpixel(((left + right) // 2, (upper + lower) // 2)) == (0, 0, 0)
    sheet = draw([one] * 7, "a title", "3 newlines kept")
    colours = {colour for _, colour in sheet.getcolors(2**24)}
    assert {*BIAS_COLOURS, (0, 0, 0), (200, 210, 220)} <= colours


def test_doctors_page_ends_with_what_to_do() -> None:
    fine = Finding("Versions", "torch", "2.13.0")
    trouble = Finding("Versions", "vllm", "not installed", "install it")
    assert page([fine]).endswith("All is well.")
    text = page([fine, trouble])
    assert "!!  vllm" in text
    assert text.endswith("What to do\n  vllm: install it")


def test_doctor_survives_a_missing_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(findings, "find_spec", lambda name: None)
    for name in ("VLLM_LOGGING_LEVEL", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "ERROR")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "not installed" in text
    assert "'era-vllm[cpu]' with PyTorch's CPU index" in " ".join(text.split())


def test_serve_without_vllm_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["serve", "--port", "9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("era-vllm serve: ")
    assert "'era-vllm[cpu]' with PyTorch's CPU index" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("allowed", "better"),
    [(None, None), ("a,era", None), ("a, era", "a,era"), ("", "era"), ("a,", "a,era")],
)
def test_doctor_tells_what_vllm_plugins_must_be(
    allowed: str | None, better: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert plugins_to_allow() == better
    advice = "" if better is None else f"set VLLM_PLUGINS={better}, or unset it"
    assert list(findings.plugin())[-1].advice == advice


@pytest.mark.parametrize(
    ("difference", "without_bias", "passes"),
    [
        (9e-5, 3.1e-4, True),
        (2e-4, 1.0, False),
        (float("nan"), 1.0, False),
        (1e-6, 2.9e-4, False),
        (1e-6, None, True),
    ],
)
def test_a_live_check_needs_a_control_that_fails(
    difference: float, without_bias: float | None, passes: bool
) -> None:
    result = Check(9, 128, difference, without_bias, same_anchors=True)
    assert (result.exact and result.control_fails) is passes


def test_a_server_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        Server("the server", command, {}, tmp_path / "log") as server,
        pytest.raises(UnsupportedError, match=r"(?s)exit code 3.*no such model"),
    ):
        wait_for([server], limit_s=30)
    server.stop()  # harmless when repeated


def test_a_deep_picture_is_scaled(tmp_path):
    """Pillow's own conversion makes all but the darkest 255 of 65,536 greys white."""
    from PIL import Image

    from era_vllm.cli.loading import open_image

    Image.new("I;16", (2, 2), 256 * 100).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (100, 100, 100)
