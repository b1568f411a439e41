"""InternVL, its authors' layout: the same model under other names, with queries and keys normed."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig, Qwen3Config
from vllm.transformers_utils.processors import internvl

from tests.engine.families import internvl_hf
from tests.engine.families.case import save, save_tokenizer
from tests.engine.families.internvl_hf import TILE, random_model

SETTINGS: Final = {"min_dynamic_patch": 1, "max_dynamic_patch": 6, "use_thumbnail": True}
TOKENS: Final = {"<img>": 140, "</img>": 141, "<IMG_CONTEXT>": 142, "<|video_pad|>": 143}
WORDS: Final = {"<": 144, ">": 145, "image": 146, "video": 147}
"""Marks are plain text: three tokens each."""


class ChatConfig(PretrainedConfig):
    """Stands in for the checkpoints' own code."""

    model_type = "internvl_chat"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = Qwen3Config(**(llm_config or {}))
        super().__init__(**kwargs)


AutoConfig.register("internvl_chat", ChatConfig, exist_ok=True)

NAMES: Final = (
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.language_model", "language_model.model"),
    (r"^model\.multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^model\.multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^model\.multi_modal_projector\.linear_2", "mlp1.3"),
    (r"^model\.vision_tower", "vision_model"),
    (r"cls_token$", "class_embedding"),
    (r"position_embeddings$", "position_embedding"),
    (r"patch_embeddings\.projection", "patch_embedding"),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"lambda_", "ls"),
    (r"attention\.projection_layer", "attn.proj"),
    (r"attention\.([qk])_norm", r"attn.\1_norm"),
)


def authors_name(name: str) -> str:
    """Return a weight's name in the authors' checkpoints."""
    for pattern, theirs in NAMES:
        name = re.sub(pattern, theirs, name)
    return name


def authors_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a transformers model's weights as the authors have them: q, k and v in one."""
    found = {}
    for name, value in weights.items():
        if "attention.q_proj" in name:
            parts = [weights[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            found[authors_name(name).replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif not re.search(r"vision_tower.*attention\.[kv]_proj", name):
            found[authors_name(name)] = value.contiguous()
    return found


class Oracle(internvl_hf.Oracle):
    """The transformers model that the weights are of, given the authors' pixels."""

    ps_version = "v2"

    def pixels(self, kind: str, data: Any) -> torch.Tensor:
        """Return what the tower is given: tiles, or frames."""
        if kind == "video":
            return internvl.video_to_pixel_values_internvl(
                np.asarray(data), input_size=TILE, min_num=1, max_num=1, use_thumbnail=False
            )
        return internvl.image_to_pixel_values_internvl(
            data, input_size=TILE, min_num=1, max_num=6, use_thumbnail=True
        )

    def shuffled(self, patches: torch.Tensor) -> torch.Tensor:
        """Column by column in the first checkpoints."""
        found = super().shuffled(patches)
        if self.ps_version == "v2":
            return found
        side = int(found.shape[1] ** 0.5)
        return found.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)


@dataclass(frozen=True)
class InternVLChat:
    """The case."""

    ps_version: str = "v2"
    others: Sequence["InternVLChat"] = ()
    """Further checkpoints."""
    name = "InternVLChatModel"
    marks = {"image": "<image>", "video": "<video>"}  # noqa: RUF012
    llm = internvl_hf.InternVL.llm

    def save(self, folder: Path) -> None:
        """The weights as transformers and as the authors have them, in two folders."""
        model = random_model(Qwen3Config, norm=True, head_dim=64)
        save(folder / "theirs", model, internvl_hf.InternVL.name, [*TOKENS.values()])
        weights = authors_weights(model.state_dict())
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        vision = model.config.vision_config
        kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config = ChatConfig(
            vision_config={
                **{name: getattr(vision, name) for name in kept},
                "image_size": TILE,
                "patch_size": 14,
                "qkv_bias": True,
                "qk_normalization": True,
                "layer_norm_eps": vision.layer_norm_eps,
                "norm_type": "layer_norm",
                "hidden_act": "gelu",
                "initializer_factor": 1.0,
            },
            llm_config=model.config.text_config.to_dict(),
            architectures=[self.name],
            dtype="float32",
            downsample_ratio=0.5,
            dynamic_image_size=True,
            force_image_size=TILE,
            ps_version=self.ps_version,
            select_layer=-1,
            **SETTINGS,
        )
        module, head = "configuration_internvl_chat", "from typing import Any\n\n"
        head += "from transformers import PretrainedConfig, Qwen3Config\n\n\n"
        config.auto_map = {"AutoConfig": f"{module}.ChatConfig"}  # for --trust-remote-code
        config.save_pretrained(folder)
        (folder / f"{module}.py").write_text(head + inspect.getsource(ChatConfig))
        tokens = {**TOKENS}
        if self.ps_version == "v1":  # such a tokenizer has no token of videos, and vLLM takes none
            del tokens["<|video_pad|>"]
        save_tokenizer(folder, tokens, extra_special_tokens={}, processor_class=None)
        path = folder / "tokenizer.json"
        table = json.loads(path.read_text())
        table["model"]["vocab"] |= WORDS
        table["added_tokens"] = [x for x in table["added_tokens"] if x["content"] != "<image>"]
        path.write_text(json.dumps(table))

    def oracle(self, folder: Path) -> Oracle:
        """Load it."""
        oracle = Oracle(folder / "theirs")
        oracle.ps_version = self.ps_version
        return oracle


CASE: Final = InternVLChat(others=[InternVLChat("v1")])
