"""A dozen pictures with questions and right answers, and a dozen tasks, shipped with the package.

For the playground, smoke tests and first tries: reading them takes neither scikit-image nor
scikit-learn. The pictures are the first of each of the seeds 0 to 11, on held-out photos and
digits; the tasks (a picture of any size, several, a video) are the first four of each kind. Plain
ranges, chosen before any model answered, and the shipped models get some wrong. This command makes
them anew:

    python -m era_vllm.lab.samples

Leaves out: how pictures are made (`synth/`), which is imported only to make them anew.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import Image

from era_vllm.lab.media import Medium

if TYPE_CHECKING:
    from era_vllm.lab.synth.questions import Question

SEEDS: Final = range(12)
QUESTIONS_PER_SAMPLE: Final = 4
TASKS: Final = {"picture": 4, "several": 4, "film": 4}
_TASK_SEED: Final = 1
_ABOUT: Final = {
    "samples": "First picture of each of the seeds 0 to 11, on held-out photos and digits (see the "
    "model card, checkpoint/README.md).",
    "tasks": f"Tasks 0 to 3 of each kind, seed {_TASK_SEED}, on held-out photos and digits.",
}
"""Name of an index, and of what is in it."""
_PLAIN: Final = (
    "A plain range, not picked by what a model answers. Made by: python -m era_vllm.lab.samples"
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
    """A shipped picture, several, or a video; questions about all of it."""

    kind: str
    files: tuple[str, ...]
    media: tuple[Medium, ...]
    questions: "tuple[Question, ...]"
    seed: int | None = None
    """Of a picture of the first kind, as ``photo``."""
    photo: str | None = None
    """Names the background."""

    @property
    def image(self) -> Image.Image:
        """Return the first picture, RGB."""
        return self.media[0].picture()


def load_samples() -> tuple[Sample, ...]:
    """Read the shipped pictures, in the order of their seeds.

    Source: era_vllm/lab/samples/samples.json.
    """
    return _loaded("samples")


def load_task_samples() -> tuple[Sample, ...]:
    """Read the shipped tasks: pictures first, then several, then videos.

    Source: era_vllm/lab/samples/tasks.json.
    """
    return _loaded("tasks")


def _loaded(name: str) -> tuple[Sample, ...]:
    from era_vllm.lab.synth.questions import Question

    folder = resources.files("era_vllm.lab").joinpath("samples")
    found: list[Sample] = []
    for entry in json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8"))[name]:
        files = tuple(entry.get("files") or [entry["file"]])
        kinds = ("video" if file.endswith(".mp4") else "image" for file in files)
        data = (folder.joinpath(file).read_bytes() for file in files)
        media = tuple(map(Medium, kinds, data))
        questions = tuple(Question(**question) for question in entry["questions"])
        of_picture = entry.get("seed"), entry.get("photo")
        found.append(Sample(entry.get("kind", "picture"), files, media, questions, *of_picture))
    return tuple(found)


def write_samples(folder: Path) -> None:
    """Make the sample pictures and tasks anew, with their indexes.

    Raises:  ConfigError: the lab packages are not installed.
    Mutates: PNG, MP4 and JSON files in folder, which is made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in {"samples": _pictures(folder), "tasks": _tasks(folder)}.items():
        index = {"about": f"{_ABOUT[name]} {_PLAIN}", "credits": _CREDITS, name: [*entries]}
        (folder / f"{name}.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _pictures(folder: Path) -> Iterator[dict[str, object]]:
    """Write the pictures; yield what the index says of each."""
    from era_vllm.lab.synth.dataset import generate

    for seed in SEEDS:
        (example,) = generate(1, seed, questions_per_image=QUESTIONS_PER_SAMPLE)
        file = f"sample_{seed:02d}.png"
        example.image.save(folder / file, optimize=True)
        questions = [asdict(question) for question in example.questions]
        photo = example.scene.backdrop.photo
        yield {"file": file, "seed": seed, "photo": photo, "questions": questions}


def _tasks(folder: Path) -> Iterator[dict[str, object]]:
    from era_vllm.lab.synth.assets import load_material
    from era_vllm.lab.synth.tasks import KINDS, draw_task

    material = load_material(split="test")
    for kind in KINDS:
        for number in range(TASKS.get(kind, 0)):
            task = draw_task(kind, _TASK_SEED, number, material)
            files: list[str] = []
            for place, medium in enumerate(task.media):
                ending = "png" if medium.kind == "image" else "mp4"
                files.append(f"{kind}_{number}_{place}.{ending}")
                (folder / files[-1]).write_bytes(medium.data)
            questions = [asdict(question) for question in task.questions[:QUESTIONS_PER_SAMPLE]]
            yield {"kind": kind, "files": files, "questions": questions}


def main() -> None:
    """Write the sample pictures and tasks to a folder."""
    parser = argparse.ArgumentParser(description="Make the sample pictures and tasks anew.")
    here, text = Path(__file__).parent / "samples", "(default: the folder in the package)"
    parser.add_argument("--out", type=Path, default=here, help=text)
    write_samples(parser.parse_args().out)


if __name__ == "__main__":
    main()
