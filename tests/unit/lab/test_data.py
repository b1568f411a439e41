"""The picture generator: the same everywhere, and every answer is the one that the scene has."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from era_vllm.errors import ConfigError
from era_vllm.lab import samples
from era_vllm.lab.synth.assets import SHAPES, WORDS
from era_vllm.lab.synth.dataset import Example, generate
from era_vllm.lab.synth.questions import FAMILIES, LEARNED_FAMILIES, plural
from era_vllm.lab.synth.scene import COLORS, PICTURE_SIZE, Scene

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

SINGULAR = {plural(kind): kind for kind in SHAPES}


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(generate(150, seed=3, families=FAMILIES, questions_per_image=12))


def test_same_seed_same_pictures(examples: list[Example]) -> None:
    again = list(generate(5, seed=3, families=FAMILIES, questions_per_image=12))
    for first, second in zip(examples, again, strict=False):
        assert first.scene == second.scene
        assert first.questions == second.questions
        assert first.image.tobytes() == second.image.tobytes()


def test_other_seed_other_pictures(examples: list[Example]) -> None:
    (other,) = generate(1, seed=4, families=FAMILIES)
    assert other.scene != examples[0].scene


def test_pictures_do_not_depend_on_how_much_is_asked(examples: list[Example]) -> None:
    few = list(generate(5, seed=3, families=("exist",), questions_per_image=1))
    assert [each.scene for each in few] == [each.scene for each in examples[:5]]


def test_lots_fall_the_same_on_every_machine() -> None:
    (example,) = generate(1, seed=0)
    assert [(each.text, each.answer) for each in example.questions] == [
        ("is there a purple cross?", "no"),
        ("what is the value of the yellow bar?", "1"),
        ("what number is shown?", "9 8 6"),
        ("what shape is blue?", "circle"),
    ]


def test_pictures_are_small_rgb(examples: list[Example]) -> None:
    assert {each.image.size for each in examples} == {(PICTURE_SIZE, PICTURE_SIZE)}
    assert {each.image.mode for each in examples} == {"RGB"}


def test_objects_lie_inside_and_apart(examples: list[Example]) -> None:
    for example in examples:
        scene = example.scene
        objects = [scene.chart, scene.number, scene.word, *scene.shapes]
        boxes = [each.box for each in objects if each is not None]
        covered = np.zeros((PICTURE_SIZE, PICTURE_SIZE), int)
        for box in boxes:
            covered[box.top : box.top + box.height, box.left : box.left + box.width] += 1
        assert covered.sum() == sum(box.width * box.height for box in boxes)
        assert covered.max(initial=0) <= 1


def test_shapes_have_their_color(examples: list[Example]) -> None:
    """The middle pixel of every shape but a ring is of the named colour."""
    rgb = {"red": (225, 30, 35), "white": (250, 250, 250), "blue": (30, 60, 230)}
    seen = 0
    for example in examples:
        for shape in example.scene.shapes:
            if shape.color in rgb and shape.kind != "ring":
                middle = (int(shape.center[0]), int(shape.center[1]))
                assert example.image.getpixel(middle) == rgb[shape.color]
                seen += 1
    assert seen > 100


def test_answers_follow_from_the_scene(examples: list[Example]) -> None:
    seen: Counter[str] = Counter()
    for example in examples:
        for question in example.questions:
            assert question.answer == derive(example.scene, question.text), question
            seen[question.family] += 1
    assert set(seen) == set(FAMILIES)
    assert min(seen.values()) >= 20


def derive(scene: Scene, text: str) -> str:
    """Answer a question from its text and the scene, written apart from the generator."""
    kinds, colors = "|".join(SHAPES), "|".join(COLORS)
    pairs = re.findall(f"({colors}) ({kinds})", text)
    named = [
        next(shape for shape in scene.shapes if (shape.color, shape.kind) == pair)
        for pair in pairs
        if not text.startswith("is there")
    ]
    assert text.endswith("?")
    if text.startswith("is there"):
        return yes_no(pairs[0] in {(shape.color, shape.kind) for shape in scene.shapes})
    if match := re.fullmatch(rf"how many (?:({colors}) )?(\w+)\?", text):
        color, noun = match.groups()
        kind = None if noun == "shapes" else SINGULAR[noun]
        return str(
            len(
                [
                    shape
                    for shape in scene.shapes
                    if shape.color == (color or shape.color) and shape.kind == (kind or shape.kind)
                ]
            )
        )
    if match := re.fullmatch(r"what color is the (\w+)\?", text):
        return only([shape.color for shape in scene.shapes if shape.kind == match[1]])
    if match := re.fullmatch(r"what shape is (\w+)\?", text):
        return only([shape.kind for shape in scene.shapes if shape.color == match[1]])
    if text.startswith("where is"):
        x, y = named[0].center
        return f"{third(y, 'top', 'middle', 'bottom')} {third(x, 'left', 'center', 'right')}"
    if match := re.search("left of|right of|above|below", text):
        (x, y), (other_x, other_y) = named[0].center, named[1].center
        holds = {
            "left of": x < other_x,
            "right of": x > other_x,
            "above": y < other_y,
            "below": y > other_y,
        }
        return yes_no(holds[match[0]])
    if text == "what number is shown?":
        assert scene.number is not None
        return " ".join(map(str, scene.number.digits))
    if text == "what word is shown?":
        assert scene.word is not None
        return scene.word.text
    assert scene.chart is not None
    heights = {bar.color: bar.value for bar in scene.chart.bars}
    if text == "which bar is tallest?":
        return only([color for color, value in heights.items() if value == max(heights.values())])
    match = re.fullmatch(r"what is the value of the (\w+) bar\?", text)
    assert match is not None, text
    return next(str(value) for color, value in heights.items() if color == match[1])


def yes_no(holds: bool) -> str:
    return "yes" if holds else "no"


def only(names: list[str]) -> str:
    assert len(names) == 1, f"the question has {len(names)} answers"
    return names[0]


def third(place: float, first: str, second: str, last: str) -> str:
    return first if place < 56 else second if place < 112 else last


def test_asks_only_the_families_named() -> None:
    asked = [each for each in generate(20, seed=1, families=("chart", "word"))]
    families = [question.family for each in asked for question in each.questions]
    assert len(asked) == 20
    assert all(each.questions for each in asked)
    assert set(families) == {"chart", "word"}


def test_learned_families_are_the_default() -> None:
    asked = generate(60, seed=1, questions_per_image=8)
    families = {question.family for each in asked for question in each.questions}
    assert families == set(LEARNED_FAMILIES)


def test_backgrounds_of_your_own(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), (10, 200, 10)).save(tmp_path / "meadow.png")
    (example,) = generate(1, seed=0, backgrounds=tmp_path)
    assert example.scene.backdrop.photo == "meadow.png"


def test_missing_backgrounds_folder_is_refused_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist.*pip install 'era-vllm\[lab\]'"):
        generate(1, seed=0, backgrounds=tmp_path / "nowhere")


def test_empty_backgrounds_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no photo"):
        generate(1, seed=0, backgrounds=tmp_path)


@pytest.mark.parametrize("module", ["sklearn.datasets", "skimage.data"])
def test_missing_lab_packages_are_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'era-vllm\[lab\]'"):
        generate(1, seed=0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'color'"):
        generate(1, seed=0, families=("colour",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="collection of names"):
        generate(1, seed=0, families=())
    with pytest.raises(ConfigError, match="questions_per_image"):
        generate(1, seed=0, questions_per_image=0)


def test_samples_are_what_the_generator_makes() -> None:
    loaded = samples.load_samples()
    assert [sample.seed for sample in loaded] == list(samples.SEEDS)
    for sample in loaded:
        (made,) = generate(1, sample.seed, questions_per_image=samples.QUESTIONS_PER_SAMPLE)
        assert sample.questions == made.questions
        assert sample.photo == made.scene.backdrop.photo
        difference = np.asarray(sample.image, float) - np.asarray(made.image, float)
        assert np.abs(difference).mean() < 1.0  # edges differ between releases of Pillow


def test_sample_files_match_their_index(tmp_path: Path) -> None:
    folder = Path(samples.__file__).parent / "samples"
    index = json.loads((folder / "samples.json").read_text())
    tasks = json.loads((folder / "tasks.json").read_text())
    files = [entry["file"] for entry in index["samples"]]
    files += [file for entry in tasks["tasks"] for file in entry["files"]]
    kept = (file.name for file in folder.iterdir() if file.suffix in (".png", ".mp4"))
    assert sorted(kept) == sorted(files)
    assert {entry["photo"] for entry in index["samples"]} <= set(index["credits"])
    samples.write_samples(tmp_path)
    assert json.loads((tmp_path / "samples.json").read_text()) == index
    assert json.loads((tmp_path / "tasks.json").read_text()) == tasks
    for file in folder.glob("*_[0-9]_[0-9].png"):
        with Image.open(file) as one, Image.open(tmp_path / file.name) as other:
            assert np.abs(np.asarray(one, float) - np.asarray(other, float)).mean() < 1


def test_samples_cover_every_learned_family() -> None:
    asked = {question.family for each in samples.load_samples() for question in each.questions}
    assert asked == set(LEARNED_FAMILIES)


def test_every_word_fits_its_sign() -> None:
    from era_vllm.lab.synth.assets import FONT_SIZES, word_mask

    for text in WORDS:
        for font_size in FONT_SIZES:
            mask = np.asarray(word_mask(text, font_size))
            margin = np.concatenate([mask[:2].ravel(), mask[-2:].ravel(), mask[:, :2].ravel()])
            assert mask.max() > 200
            assert margin.max() == 0, (text, font_size)
