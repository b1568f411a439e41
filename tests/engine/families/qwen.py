"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: towers for any size, M-RoPE, videos by time, feature maps."""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import get_vision_window_index

from tests.engine.families.case import FamilyOracle, Unpruned, language, save, save_tokenizer

TOKENS: Final = {
    "<|vision_start|>": 140,
    "<|vision_end|>": 141,
    "<|image_pad|>": 142,
    "<|video_pad|>": 143,
}
VOCABULARY: Final = 160
FPS: Final = 3.0
"""Of the videos, which are sampled by taking every second picture."""


class Oracle(FamilyOracle):
    """Tokens by transformers' own tower; each frame's attention as its eager attention gives it."""

    dtype = torch.float32
    visual_tokens = (142, 143)

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.deep = hasattr(self.model.config.vision_config, "deepstack_visual_indexes")

    @torch.inference_mode()
    def item(self, kind: str, data: Any) -> Unpruned:
        """A picture's or video's."""
        pixels, grid, times = self.processed(kind, data, normed=True)
        frames, rows, columns = (
            int(size) // unit for size, unit in zip(grid[0], (1, 2, 2), strict=True)
        )
        maps, read = list[Tensor](), self.read_by()
        there = sys.modules[type(self.model).__module__]
        eager = there.eager_attention_forward

        def kept(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            out, probabilities = eager(module, *args, **kwargs)
            if module is read:
                maps.append(probabilities[0].mean(1))
            return out, probabilities

        with mock.patch.object(there, "eager_attention_forward", kept):
            features = getattr(self.model.model, f"get_{kind}_features")(pixels, grid)
        tokens = features.pooler_output[0]
        if self.deep:
            tokens = torch.cat([tokens, *(level[0] for level in features.deepstack_features)], -1)
        attention = self.unwindowed(torch.cat(maps, -1).unflatten(-1, (-1, 4)).mean(-1), grid)
        n = rows * columns
        places = [torch.arange(n) + frame * n for frame in range(frames)]
        apart = kind == "video" and self.deep
        offsets = [
            [0 if apart else times[frame], row, column]
            for frame in range(frames)
            for row in range(rows)
            for column in range(columns)
        ]
        span = max(rows, columns) if apart else max(rows, columns, times[-1] + 1)
        return Unpruned(
            self.processed(kind, data, normed=False)[0],
            tokens,
            attention,
            [((rows, columns), of_frame) for of_frame in places],
            torch.zeros(0, dtype=torch.int64),
            (n,) * frames if apart else (),
            self.model.config.get_text_config().hidden_size,
            torch.tensor(offsets),
            (span,) * (frames if apart else 1),
        )

    def processed(self, kind: str, data: Any, *, normed: bool) -> tuple[Tensor, Tensor, list[int]]:
        """Return pixels, grid, and each frame's place on the time axis.

        Args:
            normed: False = as they are sent to the tower, which norms them itself.
        """
        raw = {} if normed else {"do_rescale": False, "do_normalize": False}
        if kind == "image":
            out = self.processor.image_processor(images=[data], return_tensors="pt", **raw)
            return out["pixel_values"], out["image_grid_thw"], [0]
        array, about = data if isinstance(data, tuple) else (data, {})
        frames = torch.from_numpy(array).permute(0, 3, 1, 2)
        known = {key: value for key, value in about.items() if key != "do_sample_frames"}
        out = self.processor.video_processor(
            videos=[frames],
            video_metadata=[VideoMetadata(**known)] if known else None,
            do_sample_frames=False,
            return_tensors="pt",
            **raw,
        )
        times = list(range(int(out["video_grid_thw"][0, 0])))
        if per_second := getattr(self.model.config.vision_config, "tokens_per_second", None):
            seconds = 2 / (FPS / 2)  # two pictures, of every second one
            times = [int(frame * seconds * per_second) for frame in times]
        return out["pixel_values_videos"], out["video_grid_thw"], times

    def read_by(self) -> nn.Module:
        """Return the attention of the last block, of those that see whole frames."""
        vision = self.model.config.vision_config
        whole = getattr(vision, "fullatt_block_indexes", [vision.depth - 1])
        return self.model.model.visual.blocks[max(whole)].attn

    def unwindowed(self, maps: Tensor, grid: Tensor) -> Tensor:
        """Return maps [heads, n] in raster order."""
        vision = self.model.config.vision_config
        if not getattr(vision, "window_size", None):
            return maps
        index, *_ = get_vision_window_index(
            grid,
            spatial_merge_size=2,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return maps[:, index.argsort()]


class Qwen(ABC):
    """What the cases share."""

    name: str
    marks: Mapping[str, str] = {
        kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")
    }
    llm: Mapping[str, Any] = {}
    slivers = ((1, 1), (2000, 10), (10, 2000))
    far = (28, 2800, 50)
    pictures = 2
    crowding = 0.5
    mrope = True
    shares_out = True
    patch = 14
    videos = "Qwen2VLVideoProcessor"
    frames = 1
    """Pictures that bounds of a video's pixels are for."""

    def film(self, array: np.ndarray) -> Any:
        """With what a loader says of it: every second picture of a longer one."""
        frames = len(array)
        return array, {
            "fps": FPS,
            "duration": 2 * frames / FPS,
            "total_num_frames": 2 * frames,
            "frames_indices": list(range(0, 2 * frames, 2)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a model with random weights."""

    def save(self, folder: Path) -> None:
        """Pictures of 4 to 128 tokens, frames of some 30."""
        save(folder, spread(self.model()), self.name, [*TOKENS.values()])
        tokens = {name.strip("<|>").replace("pad", "token"): name for name in TOKENS}
        save_tokenizer(folder, TOKENS, processor_class=self.processor, extra_special_tokens=tokens)
        area = (2 * self.patch) ** 2
        both = {
            "patch_size": self.patch,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.45] * 3,
            "image_std": [0.25] * 3,
        }
        images = {
            **both,
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 4 * area, "longest_edge": 128 * area},
        }
        videos = {
            **both,
            "video_processor_type": self.videos,
            "size": {
                "shortest_edge": self.frames * 24 * area,
                "longest_edge": self.frames * 40 * area,
            },
        }
        parts = {"image_processor": images, "video_processor": videos}
        for file, value in {
            "processor_config": {**parts, "processor_class": self.processor},
            "preprocessor_config": images,
            "video_preprocessor_config": videos,
        }.items():
            (folder / f"{file}.json").write_text(json.dumps(value))

    def oracle(self, folder: Path) -> Oracle:
        """Load it."""
        return Oracle(folder)


class Qwen2VL(Qwen):
    """Whole pictures in every block; its videos come without times."""

    name = "Qwen2VLForConditionalGeneration"
    processor = "Qwen2VLProcessor"

    def film(self, array: np.ndarray) -> Any:
        """As it is."""
        return array

    def model(self) -> nn.Module:
        vision = transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
            depth=3, embed_dim=64, hidden_size=128, num_heads=4, mlp_ratio=2, patch_size=14
        )
        text = language(transformers.Qwen2VLTextConfig, VOCABULARY, **rope([4, 6, 6]))
        return joined("Qwen2VL", vision, text)


class Qwen2_5VL(Qwen):
    """Windows of 4 x 4 tokens but in the second block of three; seconds times two."""

    name = "Qwen2_5_VLForConditionalGeneration"
    processor = "Qwen2_5_VLProcessor"

    def model(self) -> nn.Module:
        vision = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
            depth=3,
            hidden_size=64,
            intermediate_size=96,
            num_heads=4,
            patch_size=14,
            out_hidden_size=128,
            window_size=112,
            fullatt_block_indexes=[0, 1],
            tokens_per_second=2,
        )
        text = language(transformers.Qwen2_5_VLTextConfig, VOCABULARY, **rope([4, 6, 6]))
        return joined("Qwen2_5_VL", vision, text)


class Qwen3VL(Qwen):
    """Feature maps of two blocks; a video's pixels are shared by its frames."""

    name = "Qwen3VLForConditionalGeneration"
    processor = "Qwen3VLProcessor"
    patch = 16
    videos = "Qwen3VLVideoProcessor"
    frames = 4
    shared = True
    rope: Mapping[str, Any] = {"mrope_interleaved": True}

    def model(self) -> nn.Module:
        vision = transformers.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig(
            depth=3,
            hidden_size=64,
            intermediate_size=96,
            num_heads=4,
            patch_size=16,
            out_hidden_size=128,
            num_position_embeddings=144,
            deepstack_visual_indexes=[0, 1],
        )
        more = {"rope_parameters": {**rope([6, 5, 5])["rope_parameters"], **self.rope}}
        text = language(
            transformers.Qwen3VLTextConfig, VOCABULARY, head_dim=32, num_hidden_layers=3, **more
        )
        return joined("Qwen3VL", vision, text)


class Yarn(Qwen3VL):
    """Positions scaled by yarn, whose table vLLM makes as long as they are and no longer."""

    rope: Mapping[str, Any] = {
        "mrope_interleaved": True,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    }


class Experts(Qwen3VL):
    """Four experts, two a token."""

    name = "Qwen3VLMoeForConditionalGeneration"

    def model(self) -> nn.Module:
        dense = super().model().config.to_dict()
        text = dense["text_config"] | {
            "model_type": "qwen3_vl_moe_text",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,  # twice that is no other size, or both layouts would fit
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        }
        vision = dense["vision_config"] | {"model_type": "qwen3_vl_moe_vision"}
        return joined("Qwen3VLMoe", vision, text)

    def save(self, folder: Path) -> None:
        """Write experts as the published checkpoints have them: rows and columns exchanged."""
        super().save(folder)
        file = folder / "model.safetensors"
        weights = {
            name: value.mT.contiguous() if "experts." in name else value
            for name, value in load_file(file).items()
        }
        save_file(weights, file, metadata={"format": "pt"})


Qwen3VL.others = (Yarn(),)


def joined(family: str, vision: Any, text: Any) -> nn.Module:
    """Return a model of these parts."""
    config = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForConditionalGeneration")
    return model(config(vision_config=vision, text_config=text, **ids()))


def rope(section: list[int]) -> dict[str, Any]:
    """Return the fields of M-RoPE."""
    settings = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": section}
    return {"rope_parameters": settings}


def ids() -> dict[str, Any]:
    """Return the ids of the tokens of pictures and videos."""
    start, end, image, video = TOKENS.values()
    return {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
        "tie_word_embeddings": False,
    }


def spread(model: nn.Module) -> nn.Module:
    """Give the tower weights with which heads differ and feature maps count."""
    torch.manual_seed(0)
    for name, parameter in model.model.visual.named_parameters():
        if parameter.ndim > 1:
            gain = 1.5 if "merger" in name or "qkv" in name else 1.0
            nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
    return model


QWEN2_5: Final = Qwen2_5VL()
QWEN3: Final = Qwen3VL()
EXPERTS: Final = Experts()
"""Not among the cases: vLLM starts a model with experts in a process of its own only."""
CASES: Final = (Qwen2VL(), QWEN2_5, QWEN3)
