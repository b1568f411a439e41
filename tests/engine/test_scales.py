"""Layers that are not plain: calibrated fp8 scales, attention sinks, a soft cap."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from era_vllm.attention.layer import RectifiedAttention
from era_vllm.lab import CHECKPOINT

STORES = ("key_columns", "value_column")
QUESTIONS = ("what shape is red?", "how many shapes?", "what word is shown?")
KEY_SCALE, VALUE_SCALE, QUERY_SCALE = 0.022, 0.0167, 0.0231  # largest of each / 448


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The sample model as llm-compressor would save it with a calibrated fp8 cache."""
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    keys = [name for name in tensors if name.endswith("self_attn.k_proj.weight")]
    for name in (name for name in keys if name.startswith("language_model.")):
        owner = name.removesuffix("k_proj.weight")
        for tensor, scale in (("k", KEY_SCALE), ("v", VALUE_SCALE), ("q", QUERY_SCALE)):
            tensors[f"{owner}{tensor}_scale"] = torch.tensor([scale])
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


def rectified_layers(live):
    return [m for m in live.model.modules() if isinstance(m, RectifiedAttention)]


def scales(live):
    """Return what each layer divides queries, keys and values by: kernel's and host's."""
    return [
        tuple((getattr(m, f"_{x}_scale").item(), getattr(m, f"_{x}_scale_float")) for x in "qkv")
        for m in rectified_layers(live)
    ]


@pytest.mark.parametrize(
    ("store", "query", "key", "value"),
    [
        ("key_columns", 0.25, 2**-5, VALUE_SCALE),
        ("value_column", QUERY_SCALE, KEY_SCALE, 16.0),
    ],
)
def test_calibrated_scales(
    engine, setup, ask, images, oracle, calibrated, store, query, key, value
):
    live = engine(setup(bias_store=store, llm={"model": calibrated, "dtype": "bfloat16"}))
    assert rectified_layers(live)[0].kv_cache_dtype == "fp8"
    fitted = [(pytest.approx(x), pytest.approx(x)) for x in (query, key, value)]
    assert scales(live) == [tuple(fitted)] * 4
    for layer in rectified_layers(live):  # as when weights are loaded anew
        layer.process_weights_after_loading(torch.bfloat16)
    assert scales(live) == [tuple(fitted)] * 4

    def errors(requests):
        rows = []
        for request, answer in zip(requests, live.ask(requests), strict=True):
            segments = []
            for image in request.images:
                anchors = live.anchors_of(image, live.config.pruning_rate, oracle)
                segments += oracle.recycle([image], live.config, anchors)
            ids, steps = [*answer.prompt_ids, *answer.token_ids][:-1], len(answer.token_ids)
            rows.append(
                [
                    (oracle.log_probs(ids, segments, steps, bias=bias) - answer.log_probs)
                    .abs()
                    .amax(-1)
                    .mean()
                    for bias in (True, False)
                ]
            )
        return torch.tensor(rows).mean(0).tolist()

    ours, without = errors([ask(q, image) for q, image in zip(QUESTIONS, images, strict=False)])
    text, _ = errors([ask(q) for q in QUESTIONS])
    print(f"calibrated {store}: pruned {ours:.3f}, text alone {text:.3f}, no bias {without:.2f}")
    assert ours <= text
    assert without > 3 * text
