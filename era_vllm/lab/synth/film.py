"""Make a short video: still things, one shape that moves, one that turns or appears, and questions.

A video is two frames a moment, because Qwen3-VL reads two frames as one row of tokens; what changes
changes between moments. Leaves out files (frames are pictures) and the sampling of frames.
"""

import random
from dataclasses import dataclass, replace
from typing import Final

from PIL import Image

from era_vllm.lab.synth.assets import SHAPES, TURNS, Material
from era_vllm.lab.synth.questions import Question, ask_about
from era_vllm.lab.synth.render import paint, paint_shape
from era_vllm.lab.synth.scene import COLORS, Box, Plan, Room, Scene, Shape, draw_scene

MOMENTS: Final = (3, 4)
"""Fewest and most of a video."""
FRAMES: Final = 2
"""Of a moment."""
_DIRECTIONS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_SIZES: Final = range(15, 24)
ORDINALS: Final = ("first", "second", "third", "fourth")
_PER_SECOND: Final = (1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class Item:
    """A picture (one frame, one scene), or a video: two frames and one scene a moment.

    `seconds`: of each moment, as Qwen3-VL's processor counts them; none of a picture.
    """

    frames: tuple[Image.Image, ...]
    scenes: tuple[Scene, ...]
    seconds: tuple[float, ...]


def draw_film(
    lots: random.Random, material: Material, width: int, height: int
) -> tuple[Item, tuple[Question, ...]]:
    """Draw a video of 3 or 4 moments, and questions about it.

    Mutates: lots.
    """
    moments = lots.randint(*MOMENTS)
    room = Room(Plan(width, height))
    kinds, colors = lots.sample(SHAPES, len(SHAPES)), lots.sample(COLORS, len(COLORS))
    questions: list[Question] = []
    moving: list[list[Shape]] = [[] for _ in range(moments * FRAMES)]
    if lots.random() < 0.85:
        name = lots.choice(tuple(_DIRECTIONS))
        path = _path(lots, room, name, len(moving))
        if path:
            turn, kind, color = lots.randrange(TURNS), kinds.pop(), colors.pop()
            for frame, box in zip(moving, path, strict=True):
                frame.append(Shape(kind, color, turn, box))
            questions += [
                Question("motion", f"which way does the {kind} move?", name),
                Question("motion", f"which way does the {color} {kind} move?", name),
            ]
    if lots.random() < 0.85:
        side = lots.choice(_SIZES)
        box = room.find(lots, side, side)
        if box is not None:
            old = Shape(kinds.pop(), colors.pop(), lots.randrange(TURNS), box)
            change = lots.choice(("turn", "turn", "appear", "disappear"))
            start = lots.randint(1, moments - 1)
            new = replace(old, color=colors.pop())
            for index, frame in enumerate(moving):
                after = index // FRAMES >= start
                if change == "turn":
                    frame.append(new if after else old)
                elif after == (change == "appear"):
                    frame.append(old)
            about = f"the {old.kind} turn {new.color}" if change == "turn" else None
            text = f"when does {about or f'the {old.color} {old.kind} {change}'}?"
            questions.append(Question("moment", text, ORDINALS[start]))
    still = Plan(width, height, 0.0, 0.3, 0.3, (0, 0), (1, 3))
    scene = draw_scene(lots, material, still, room, tuple(kinds), tuple(colors))
    asked = ask_about(scene, lots, ("color", "shape", "word", "number"), 2)
    backdrop = paint(scene, material)
    frames = tuple(backdrop.copy() for _ in moving)
    for frame, shapes in zip(frames, moving, strict=True):
        for shape in shapes:
            paint_shape(frame, shape)
    scenes = tuple(replace(scene, shapes=(*scene.shapes, *shapes)) for shapes in moving[1::FRAMES])
    seconds = _seconds(moments, lots.choice(_PER_SECOND))
    return Item(frames, scenes, seconds), (*questions, *asked)


def _path(lots: random.Random, room: Room, name: str, frames: int) -> list[Box]:
    """Return the boxes of a shape that moves, a frame each; none where there is no room."""
    (right, down), side = _DIRECTIONS[name], lots.choice(_SIZES)
    step = lots.choice((3, 4, 5))
    swept = step * (frames - 1)
    box = room.find(lots, side + swept * abs(right), side + swept * abs(down))
    if box is None:
        return []
    left = box.left + (swept if right < 0 else 0)
    top = box.top + (swept if down < 0 else 0)
    return [
        Box(left + step * right * frame, top + step * down * frame, side, side)
        for frame in range(frames)
    ]


def _seconds(moments: int, per_second: float) -> tuple[float, ...]:
    """Return the middle of each moment's frames, as Qwen3-VL's processor works it out."""
    times = [frame / per_second for frame in range(moments * FRAMES)]
    return tuple((times[2 * moment] + times[2 * moment + 1]) / 2 for moment in range(moments))
