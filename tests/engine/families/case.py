"""What the tests of the families share: pictures, requests, an oracle's items, a comparison.

An oracle says how an item looks unpruned: its rows by transformers' own packing, each row's share
of the attention by the same packing of the maps, and where each tile's tokens went by the packing
of their numbers. Nothing of ``era_vllm.models`` is used. (Of the authors' InternVL, which
transformers does not have, vLLM cuts the tiles.)
"""

import itertools
import json
import math
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.oracle import LanguageOracle, Segment
from era_vllm.pixels import pixel_hash
from era_vllm.policies import make_policy
from era_vllm.steps.merge import average
from era_vllm.types import Signal, VisualTokens


@dataclass(frozen=True)
class Item:
    """A picture or video of a request, and its rate."""

    kind: str
    data: Any
    rate: float


@dataclass(frozen=True)
class Ask:
    """A request; ``marks`` is what stands for an item in the prompt."""

    marks: Mapping[str, str]
    text: str
    items: tuple[Item, ...] = ()

    def prompt(self) -> dict[str, object]:
        """Return what ``LLM.generate`` takes."""
        marks = "".join(f"{self.marks[item.kind]} " for item in self.items)
        prompt: dict[str, object] = {"prompt": f"USER: {marks}{self.text} ASSISTANT:"}
        if self.items:
            kinds = dict.fromkeys(item.kind for item in self.items)
            of = {kind: [one for one in self.items if one.kind == kind] for kind in kinds}
            prompt["multi_modal_data"] = {k: [one.data for one in some] for k, some in of.items()}
            rates = {kind: [one.rate for one in some] for kind, some in of.items()}
            prompt["mm_processor_kwargs"] = {"era": rates}
        return prompt


@dataclass(frozen=True)
class Unpruned:
    """An item as the oracle sees it."""

    pixels: Tensor
    """What the tower is given."""
    rows: Tensor
    """[length, d]: in the order of the prompt."""
    maps: Tensor
    """[heads, length]: mean attention that each row received."""
    segments: Sequence[tuple[tuple[int, int], Tensor]]
    """Grid and places of what is pruned alone."""
    separators: Tensor
    """Places that stay."""
    runs: tuple[int, ...] = ()
    """Places of each run; () = one."""
    width: int | None = None
    """Columns that tokens are compared by; the others ride. None = all."""
    offsets: Tensor | None = None
    """[length, 3], with M-RoPE: of each place, from where its run's first stands."""
    spans: tuple[int, ...] = ()
    """With M-RoPE: how far text moves on behind each run."""
    states: Tensor | None = None
    """[length, d] of a scout: what tokens are compared by; None = their rows."""


class FamilyOracle(LanguageOracle, ABC):
    """A family's model in plain transformers."""

    separators = "rows"
    queries: str | None = None
    """Whose attention is averaged ("all", "cls"); None where the tower has no class token."""

    @abstractmethod
    def item(self, kind: str, data: Any) -> Unpruned:
        """Return how an item looks unpruned."""


class Case(Protocol):
    """One family. May also have:

    film(array)  a video as it is sent
    slivers      sizes of pictures that are hardly there
    far          width, height and number of pictures that take more positions than there are
    pictures     of a frame
    shared       True: a video's pixels are shared by its frames
    crowding     rate at which six pictures do not fit into a small KV cache at once
    mrope        True: positions on three axes
    shares_out   True: vLLM's encoder may share out items among ranks
    others       kinds of checkpoint beside its own
    """

    name: str
    """Its architecture."""
    marks: Mapping[str, str]
    """Kind of item -> what stands for it in a prompt."""
    llm: Mapping[str, Any]
    """Further arguments of the engine."""

    def save(self, folder: Path) -> None:
        """Write a small random checkpoint."""
        ...

    def oracle(self, folder: Path) -> FamilyOracle:
        """Load it in transformers."""
        ...


Key = tuple[int, tuple[int, ...]]
"""Hash of an item's pixels, and K of each segment."""
Chosen = Callable[[Key], Sequence[tuple[Any, ...]]]
"""What an engine made of an item: of each segment grid, anchors [a], assignment [n], and, where the
engine is in this process, the attention [c, n] that it read."""


def reduced(
    config: EraConfig, chosen: Chosen, oracle: FamilyOracle, item: Item
) -> tuple[list[Segment], list[Segment]]:
    """Return what stands in each of an item's runs, with the engine's anchors and assignment.

    So that near-ties, which a last bit decides, are no difference; all but some must be the same.

    Returns:
        As it should be, and segment by segment, which is another order where tiles are side by
        side.
    """
    policy = make_policy(config)
    whole = divided(oracle.item(item.kind, item.data), item.kind, config)
    counts = [config.num_anchors(len(places), item.rate) for _, places in whole.segments]
    found = chosen((pixel_hash(whole.pixels), tuple(counts)))
    parts = []
    for (grid, places), count, own in zip(whole.segments, counts, found, strict=True):
        assert grid[0] * grid[1] == len(places) and own[0] == grid
        for read in own[3:]:
            assert torch.allclose(read.float(), whole.maps[:, places], atol=1e-5)
        signals = {Signal.ENCODER_ATTENTION: whole.maps[None, :, places]}
        if whole.states is not None:
            signals[Signal.SCOUT_STATES] = whole.states[places].T[None]
        tokens = VisualTokens(whole.rows[places][None, :, : whole.width], grid, signals).compared
        anchors = own[1][None]
        if count == len(places):
            parts.append((whole.rows[places], torch.zeros(count), places))
            continue
        again = policy.select(tokens, count)
        shared = len(set(again[0].tolist()) & set(anchors[0].tolist()))
        assert shared >= 0.9 * count - 1, "the oracle's own features and maps choose others"
        clusters = policy.assign(tokens, anchors)
        assert int((clusters.assignment[0] != own[2]).sum()) <= 1 + len(places) // 50
        clusters = replace(clusters, assignment=own[2][None])
        embeds = average(whole.rows[places][None], clusters)
        bias = policy.log_bias(tokens, clusters)
        parts.append((embeds[0], bias[0], places[anchors[0]]))
    full = sum(counts) == sum(len(places) for _, places in whole.segments)
    ends = whole.separators if not full else _outside(whole)
    parts.append((whole.rows[ends], torch.zeros(len(ends)), ends))
    rows, bias, places = (torch.cat([part[i] for part in parts]) for i in range(3))
    return (
        _runs(whole, rows, bias, places, places.argsort()),
        _runs(whole, rows, bias, places, torch.arange(len(places))),
    )


def divided(whole: Unpruned, kind: str, config: EraConfig) -> Unpruned:
    """Join a video's frames and cut what is too large, as the settings' words say it.

    By trying every number of rows and columns of blocks: nothing of ``era_vllm.layout`` is used.
    """
    together, most = config.frames_per_segment if kind == "video" else 1, config.max_segment
    segments = list(whole.segments)
    if together > 1 and not whole.runs:
        at_once = max(1, min(together, most // len(segments[0][1])))
        groups = [segments[i : i + at_once] for i in range(0, len(segments), at_once)]
        segments = [
            ((len(group) * group[0][0][0], group[0][0][1]), torch.cat([one[1] for one in group]))
            for group in groups
        ]
    return replace(whole, segments=[block for one in segments for block in _blocks(*one, most)])


Grid = tuple[int, int]


def _blocks(grid: Grid, places: Tensor, most: int) -> list[tuple[Grid, Tensor]]:
    if len(places) <= most:
        return [(grid, places)]
    least, ways = math.ceil(len(places) / most), []
    for counts in itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1)):
        ends = [[i * side // n for i in range(n + 1)] for side, n in zip(grid, counts, strict=True)]
        sizes = [{b - a for a, b in itertools.pairwise(of_axis)} for of_axis in ends]
        pairs = list(itertools.product(*sizes))
        number, aspect = math.prod(counts), max(max(h / w, w / h) for h, w in pairs)
        if max(h * w for h, w in pairs) <= most:
            ways.append((aspect > 2 or number > 2 * least, number, aspect, counts[0], ends))
    rows, columns = min(ways)[-1]
    table = places.view(grid)
    return [
        ((bottom - top, right - left), table[top:bottom, left:right].flatten())
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]


def engine_runs(item: Any, whole: Unpruned) -> list[Segment]:
    """Return what an engine put into an item's runs, with its own embeddings and bias.

    Args:
        item: ``PrunedItem``.
        whole: The oracle's, for places and separators.
    """
    parts = []
    for (_, places), own in zip(whole.segments, item.segments, strict=True):
        result, row = own.result, own.row
        embeds = result.embeds[row]
        if result.riders is not None:
            embeds = torch.cat([embeds, result.riders[row]], -1)
        kept = embeds.float(), result.log_bias[row].float(), result.anchors[row]
        parts.append((*(one.cpu() for one in kept[:2]), places[kept[2].cpu()]))
    ends = whole.separators
    parts.append((whole.rows[ends], torch.zeros(len(ends)), ends))
    rows, bias, places = (torch.cat([part[i] for part in parts]) for i in range(3))
    return _runs(whole, rows, bias, places, places.argsort())


def _outside(whole: Unpruned) -> Tensor:
    inside = torch.cat([places for _, places in whole.segments]).tolist()
    return torch.tensor(sorted(set(range(len(whole.rows))) - set(inside)), dtype=torch.int64)


def _runs(
    whole: Unpruned, rows: Tensor, bias: Tensor, places: Tensor, order: Tensor
) -> list[Segment]:
    rows, bias, places = rows[order], bias[order], places[order]
    found, start = [], 0
    for number, length in enumerate(whole.runs or (len(whole.rows),)):
        own = (places >= start) & (places < start + length)
        mrope = ()
        if whole.offsets is not None:
            mrope = (whole.offsets[places[own]], whole.spans[number])
        found.append(Segment(rows[own], bias[own], places[own] - start, length, *mrope))
        start += length
    return found


@dataclass(frozen=True)
class Compared:
    """Largest differences of a log-probability of an answer: from the oracle, and from controls."""

    exact: float
    no_bias: float
    compact: float
    tile_major: float | None
    """None where the order is the same."""


def compared(
    config: EraConfig,
    chosen: Chosen,
    oracle: FamilyOracle,
    ask: Ask,
    answer: tuple[list[int], list[int], Tensor],
) -> Compared:
    """Compare an answer with the oracle's.

    Args:
        config: The engine's settings.
        chosen: What it made of the request's items.
        oracle: The family's.
        ask: The request.
        answer: Token ids of the prompt, of the answer, log-probabilities [steps, vocabulary].
    """
    prompt_ids, token_ids, log_probs = answer
    pairs = [reduced(config, chosen, oracle, item) for item in ask.items]
    right, tiles = ([run for pair in pairs for run in pair[i]] for i in range(2))
    ids = [*prompt_ids, *token_ids][:-1]
    positions = config.positions

    def difference(segments: list[Segment], **how: Any) -> float:
        how = {"positions": positions, **how}
        expected = oracle.log_probs(ids, segments, len(log_probs), **how)
        return float((expected - log_probs).abs().max())

    other = "compact" if positions == "original" else "original"
    same = all(torch.equal(a.anchors, b.anchors) for a, b in zip(right, tiles, strict=True))
    return Compared(
        difference(right),
        difference(right, bias=False),
        difference(right, positions=other),
        None if same else difference(tiles),
    )


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Return rectangles of many colours."""
    rng = random.Random(seed)
    image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y = rng.randrange(width), rng.randrange(height)
        w, h = rng.randrange(1, max(2, width // 3)), rng.randrange(1, max(2, height // 3))
        draw.rectangle([x, y, x + w, y + h], fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


WIDE, TALL, SQUARE, ODD = (
    picture(*size, seed)
    for seed, size in enumerate([(640, 200), (100, 500), (300, 320), (500, 333)])
)
TEXT: Final = "what shape is red?"


CLIPS: Final = [
    np.stack([np.asarray(picture(120, 90, 50 + 10 * clip + frame)) for frame in range(frames)])
    for clip, frames in enumerate((4, 7))
]
"""Two videos, [frames, height, width, 3]."""


def about(case: Case, text: str, *items: tuple[str, Any, float]) -> Ask:
    """Return a request about items, each (kind, data, rate)."""
    film = getattr(case, "film", lambda array: array)
    given = ((kind, film(data) if kind == "video" else data, rate) for kind, data, rate in items)
    return Ask(case.marks, text, tuple(Item(*item) for item in given))


def images(case: Case, text: str, *pairs: tuple[Image.Image, float]) -> Ask:
    """Return a request about pictures, each with its rate."""
    return about(case, text, *(("image", data, rate) for data, rate in pairs))


def asks_apart(case: Case) -> list[Ask]:
    """Return what an engine in a process of its own is asked."""
    films = [about(case, TEXT, ("video", CLIPS[0], 0.778), ("image", SQUARE, 0.9))]
    return [
        images(case, TEXT, (ODD, 0.778)),
        images(case, "how many shapes?"),
        images(case, TEXT, (TALL, 0.5), (WIDE, 0.9)),
        *(films if "video" in case.marks else ()),
    ]


def language(kind: type, vocabulary: int, **more: Any) -> Any:
    """Return the config of a small language model; its heads divide over two ranks."""
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return kind(**{**settings, **more})


def save(
    folder: Path,
    model: nn.Module,
    architecture: str,
    visual: Sequence[int],
    published: Callable[[str], str] = lambda name: name,
) -> None:
    """Write a random model whose language model never says a placeholder.

    Args:
        visual: Ids of the placeholders.
        published: Name of a weight in the published checkpoints.
    """
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight[list(visual)] = 0
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name and parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.5)
            if name.endswith("image_newline"):
                nn.init.normal_(parameter, std=1.0)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [architecture]
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    weights = {published(name): value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(folder: Path, more: Mapping[str, int] | None = None, **settings: Any) -> None:
    """Write the sample's tokenizer, with further tokens of these ids and settings."""
    for file in CHECKPOINT.iterdir():
        if file.name.startswith(("tokenizer", "generation")):
            shutil.copy(file, folder)
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    for token, number in (more or {}).items():
        table["model"]["vocab"][token] = number
        table["added_tokens"].append({**table["added_tokens"][-1], "id": number, "content": token})
    path.write_text(json.dumps(table))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


LONGER: Mapping[str, str] = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}


def longer(name: str) -> str:
    """Return a weight's name in the published LLaVA checkpoints."""
    for short, published in LONGER.items():
        if name.startswith(short):
            return published + name.removeprefix(short)
    return name
