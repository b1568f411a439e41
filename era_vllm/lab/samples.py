"""A dozen pictures with questions and right answers, shipped with the package.

For the playground, smoke tests and first tries: reading them takes neither scikit-image nor
scikit-learn. They are the first picture of each of the seeds 0 to 11, on held-out photos and
digits: a plain range, chosen before any model answered, and the shipped model gets some wrong.
This command makes them anew:

    python -m era_vllm.lab.samples

Leaves out: how pictures are made (`synth/`), which is imported only to make them anew.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import Image

if TYPE_CHECKING:
    from era_vllm.lab.synth.questions import Question

SEEDS: Final = range(12)
QUESTIONS_PER_SAMPLE: Final = 4
_INDEX: Final = "samples.json"
_ABOUT: Final = (
    "First picture of each of the seeds 0 to 11, on held-out photos and digits (see the model "
    "card, checkpoint/README.md). "
    "A plain range, not picked by what a model answers. "
    "Made by: python -m era_vllm.lab.samples"
)
_CREDITS: Final = {
    "coffee.png": "Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0; from scikit-image",
    "china.jpg": "danielbuechele on Flickr; CC BY 2.0; from scikit-learn; cropped and tinted",
    "motorcycle_right.png": "Middlebury Stereo 2014, Scharstein et al., GCPR 2014; from "
    "scikit-image; cropped and tinted",
    "digits": "Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI; CC BY 4.0; "
    "from scikit-learn",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One shipped picture with its questions; `photo` names the background."""

    file: str
    seed: int
    photo: str
    image: Image.Image
    questions: "tuple[Question, ...]"


def load_samples() -> tuple[Sample, ...]:
    """Read the shipped pictures, in the order of their seeds.

    Source: era_vllm/lab/samples/samples.json.
    """
    from era_vllm.lab.synth.questions import Question

    folder = resources.files("era_vllm.lab").joinpath("samples")
    index = json.loads(folder.joinpath(_INDEX).read_text(encoding="utf-8"))
    return tuple(
        Sample(
            file=entry["file"],
            seed=entry["seed"],
            photo=entry["photo"],
            image=_open(folder.joinpath(entry["file"])),
            questions=tuple(Question(**question) for question in entry["questions"]),
        )
        for entry in index["samples"]
    )


def _open(file: Traversable) -> Image.Image:
    with file.open("rb") as stream, Image.open(stream) as opened:
        return opened.convert("RGB")


def write_samples(folder: Path) -> None:
    """Make the sample pictures anew, with their index.

    Raises:  ConfigError: the lab packages are not installed.
    Mutates: PNG files and samples.json in folder, which is made if need be.
    """
    from era_vllm.lab.synth.dataset import generate

    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, object]] = []
    for seed in SEEDS:
        (example,) = generate(1, seed, questions_per_image=QUESTIONS_PER_SAMPLE)
        file = f"sample_{seed:02d}.png"
        example.image.save(folder / file, optimize=True)
        questions = [asdict(question) for question in example.questions]
        photo = example.scene.backdrop.photo
        entries.append({"file": file, "seed": seed, "photo": photo, "questions": questions})
    index = {"about": _ABOUT, "credits": _CREDITS, "samples": entries}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the sample pictures to a folder."""
    parser = argparse.ArgumentParser(description="Make the sample pictures anew.")
    here, text = Path(__file__).parent / "samples", "(default: the folder in the package)"
    parser.add_argument("--out", type=Path, default=here, help=text)
    write_samples(parser.parse_args().out)


if __name__ == "__main__":
    main()
