"""A small LLaVA-1.5 with random weights and grouped queries, for what the sample model cannot show.

The sample's language model has three heads, which do not divide over two ranks.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from era_vllm.lab import CHECKPOINT

LONGER_NAMES = (  # as vLLM and the published checkpoints call them
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


def save_random_llava(folder: Path) -> None:
    """Write a checkpoint that vLLM and transformers load, with the sample's tokenizer."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=168,
        patch_size=14,
        projection_dim=64,
        # at 1 all heads look alike, 1 - entropy is 1e-3 of rounding's making, and so are biases
        initializer_factor=4.0,
    )
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=144,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight[config.image_token_index] = 0  # in no answer: never the likeliest
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "float32"
    config.save_pretrained(folder)
    weights = {longer(name): value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in CHECKPOINT.iterdir():
        if file.name.startswith(("tokenizer", "processor", "chat_template", "generation")):
            shutil.copy(file, folder)


def longer(name: str) -> str:
    """Return a weight's published name."""
    for short, published in LONGER_NAMES:
        if name.startswith(short):
            return published + name.removeprefix(short)
    return name
