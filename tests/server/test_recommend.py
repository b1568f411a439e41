"""``era-vllm recommend`` against the shared server: asked, refused, resumed, drawn."""

import json

import pytest
from PIL import Image

from era_vllm.cli.main import main
from era_vllm.lab.evaluation import ANSWERS
from era_vllm.lab.samples import load_samples

TOO_LARGE = (6000, 6000)
"""Pixels: more than a server takes, and no bomb for Pillow."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of sample pictures with one that no server takes, and questions about each."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    for place, sample in enumerate(load_samples()[:8]):
        name = f"{place}{('.png', '.jpg', '.bmp')[place % 3]}"
        sample.image.save(folder / name)
        rows += [{"picture": name, "question": question.text} for question in sample.questions]
    Image.new("L", TOO_LARGE).save(folder / "large.png")
    rows.append({"picture": "large.png", "question": "how many shapes?"})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.slow
def test_a_rate_is_recommended_and_what_changed_is_shown(servers, pictures, tmp_path, capsys):
    words = ["recommend", "--url", servers[0].url, str(pictures), str(pictures / "questions.jsonl")]
    words += ["--target", ".9", "--worst", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "left out: large.png" in err and "pixels" in err
    found = json.loads((tmp_path / "recommend.json").read_text())
    assert (found["pictures"], found["refused"]) == (8, ["large.png"])
    assert [level["name"] for level in found["levels"][1:]] == [
        *("light", "medium", "strong", "extreme")
    ]
    assert [level["tokens"] for level in found["levels"]] == [144, 72, 32, 16, 8]
    agreed = [level["agreement"]["value"] for level in found["levels"]]
    assert agreed[0] == 1 and agreed[1] > 0.85 and agreed[4] < 0.9
    kl = [level["kl"]["value"] for level in found["levels"]]
    assert kl[0] == 0 and 0 < kl[1] < kl[4]
    rates = [level["rate"] for level in found["levels"] if level["agreement"]["value"] >= 0.9]
    assert found["recommended"] in rates
    assert f"--era-pruning-rate {found['recommended']:g}" in out
    page = (tmp_path / "recommend.html").read_text()
    shown = sum(len(some) for some in found["disagreements"].values())
    assert 1 <= shown <= 4 and "not drawn" not in page
    assert page.count("<img ") == 2 * shown, "each picture beside what is kept of it"
    before = (tmp_path / ANSWERS).read_bytes()
    assert main(words) == 0
    assert (tmp_path / ANSWERS).read_bytes() == before, "nothing is asked twice"
