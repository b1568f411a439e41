"""Tasks: held-out material, right answers, a closed vocabulary, seeds."""

import random
from itertools import product

import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from era_vllm.lab.synth.assets import Material, load_material
from era_vllm.lab.synth.filler import SENTENCES, draw_filler
from era_vllm.lab.synth.film import FRAMES
from era_vllm.lab.synth.tasks import (
    KINDS,
    ORDINALS,
    QUOTAS,
    SIDE_STEP,
    SIZES,
    TASK_FAMILIES,
    Kind,
    Task,
    draw_task,
)
from era_vllm.lab.train.labels import KINDS as TOKEN_KINDS
from era_vllm.lab.train.labels import SIZES as CLASSES
from era_vllm.lab.train.labels import label
from era_vllm.lab.train.words import IMAGE, UNKNOWN, tokenizer, vocabulary


@pytest.fixture(scope="module")
def material() -> Material:
    return load_material(split="test")


@pytest.fixture(scope="module")
def tasks(material: Material) -> dict[Kind, list[Task]]:
    return {kind: [draw_task(kind, 5, n, material) for n in range(60)] for kind in KINDS}


def test_training_and_held_out_material_share_nothing(material: Material) -> None:
    train = load_material(split="train")
    assert not set(train.photos) & set(material.photos)
    for seen, held_out in zip(train.digits, material.digits, strict=True):
        bytes_seen = {digit.tobytes() for digit in seen}
        assert sum(digit.tobytes() in bytes_seen for digit in held_out) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_a_function_of_seed_and_number(kind: Kind, material: Material) -> None:
    one, same, other = (draw_task(kind, seed, 3, material) for seed in (1, 1, 2))
    assert one.questions == same.questions and one.questions != other.questions
    assert [f.tobytes() for i in one.items for f in i.frames] == [
        f.tobytes() for i in same.items for f in i.frames
    ]


@pytest.mark.parametrize("kind", ["picture", "several", "film"])
def test_sides_are_whole_tokens_and_vary(kind: Kind, tasks: dict[Kind, list[Task]]) -> None:
    frames = [item.frames[0] for task in tasks[kind] for item in task.items]
    sides = {frame.size for frame in frames}
    counts = {width * height // SIDE_STEP**2 for width, height in sides}
    assert len(sides) > 5 and all(side % SIDE_STEP == 0 for size in sides for side in size)
    assert SIZES[kind][0] <= min(counts) and max(counts) <= SIZES[kind][1]


def test_every_family_is_asked(tasks: dict[Kind, list[Task]]) -> None:
    asked = {q.family for some in tasks.values() for task in some for q in task.questions}
    assert asked == set(TASK_FAMILIES)


def test_which_and_indexed_follow_from_the_scenes(tasks: dict[Kind, list[Task]]) -> None:
    checked = 0
    for task in tasks["several"]:
        scenes = [item.scenes[0] for item in task.items]
        for question in task.questions:
            words = question.text.rstrip("?").split()
            if question.text.startswith("which picture shows a ") and len(words) == 6:
                shown = [(s.color, s.kind) for s in scenes[ORDINALS.index(question.answer)].shapes]
                elsewhere = [
                    (s.color, s.kind)
                    for index, scene in enumerate(scenes)
                    if ORDINALS[index] != question.answer
                    for s in scene.shapes
                ]
                wanted = tuple(words[-2:])
                assert wanted in shown and wanted not in elsewhere
                checked += 1
            if question.text.startswith("what color"):
                scene = scenes[ORDINALS.index(words[-2])]
                (shape,) = [s for s in scene.shapes if s.kind == words[4]]
                assert shape.color == question.answer
                checked += 1
    assert checked > 50


def test_motion_and_moment_follow_from_the_frames(tasks: dict[Kind, list[Task]]) -> None:
    moved = turned = 0
    for task in tasks["film"]:
        (item,) = task.items
        assert len(item.frames) == FRAMES * len(item.scenes) == FRAMES * len(item.seconds)
        for question in task.questions:
            words = question.text.rstrip("?").split()
            if question.family == "motion":
                kind = words[-2]
                first, last = (
                    next(s for s in scene.shapes if s.kind == kind).center
                    for scene in (item.scenes[0], item.scenes[-1])
                )
                dx, dy = last[0] - first[0], last[1] - first[1]
                right = ("right" if dx > 0 else "left") if dx else ("down" if dy > 0 else "up")
                assert question.answer == right
                moved += 1
            if question.family == "moment" and "turn" in words:
                colors = [
                    next(s.color for s in scene.shapes if s.kind == words[3])
                    for scene in item.scenes
                ]
                assert colors.index(words[-1]) == ORDINALS.index(question.answer)
                turned += 1
    assert moved > 20 and turned > 10


def test_relation_names_the_larger_offset(tasks: dict[Kind, list[Task]]) -> None:
    axes = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
    checked = 0
    for task in tasks["picture"]:
        shapes = {(s.color, s.kind): s.center for s in task.items[0].scenes[0].shapes}
        for question in task.questions:
            if question.family == "relation":
                words = question.text.rstrip("?").split()
                one, other = shapes[words[3], words[4]], shapes[words[-2], words[-1]]
                offsets = [a - b for a, b in zip(one, other, strict=True)]
                axis, sign = axes[question.answer]
                assert offsets[axis] * sign > abs(offsets[1 - axis])
                checked += 1
    assert checked > 20


def test_quotas_bound_families(material: Material) -> None:
    for number in range(20):
        task = draw_task("picture", 1, number, material)
        families = [question.family for question in task.questions]
        assert all(families.count(family) <= QUOTAS[family] for family in families)


def test_the_vocabulary_spells_all_that_is_asked(tasks: dict[Kind, list[Task]]) -> None:
    words = tokenizer()
    texts = {*SENTENCES}
    for some in tasks.values():
        for question in (question for task in some for question in task.questions):
            texts |= {question.text, question.text.capitalize(), question.answer}
    unknown = [text for text in texts if UNKNOWN in words.encode(text).ids]
    assert not unknown


def test_the_tokenizer_spells_timestamps_and_marks() -> None:
    words = tokenizer()
    for seconds in (0.2, 12.5, 103.0):
        text = f"<{seconds:.1f} seconds>"
        assert "".join(words.encode(text).tokens) == text.replace(" ", "")
    ids = words.encode("<|im_start|>user\n<|image_pad|><|image_pad|>Hi<|im_end|>").ids
    assert ids[2:4] == [IMAGE, IMAGE] and len(set(vocabulary().values())) == len(vocabulary())


def test_answers_decode_as_they_are_compared() -> None:
    words = tokenizer()
    for answer in ("top left", "7 0", "red"):
        ids = words.encode(answer + "<|im_end|>").ids
        assert words.decode(ids, skip_special_tokens=True) == answer
    prompt = words.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n").ids
    before = words.decode(prompt, skip_special_tokens=True)
    whole = words.decode([*prompt, *words.encode("top left").ids], skip_special_tokens=True)
    assert whole == before + "top left"  # as an engine streams it


def test_filler_is_about_as_long_as_asked() -> None:
    lots = random.Random(0)
    assert draw_filler(lots, 0) == ""
    assert 40 <= len(draw_filler(lots, 40).split()) < 60


@pytest.mark.parametrize(("kind", "step"), [*product(["picture", "film"], [16]), ("standard", 14)])
def test_labels_stand_where_things_are(
    kind: Kind, step: int, tasks: dict[Kind, list[Task]]
) -> None:
    for task in tasks[kind][:20]:
        for scene in task.items[0].scenes:
            rows, columns = scene.height // step, scene.width // step
            labels = label(scene, step).reshape(len(CLASSES), rows, columns)
            assert all(
                each.min() >= 0 and each.max() < classes
                for each, classes in zip(labels, CLASSES, strict=True)
            )
            assert CLASSES[0] == TOKEN_KINDS
            for shape in scene.shapes:
                row, column = int(shape.center[1] // step), int(shape.center[0] // step)
                around = labels[0, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
                assert (around > 0).any()
