"""Layers that are not plain: calibrated fp8 scales, attention sinks, a soft cap."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.v1.attention.backends import cpu_attn

from era_vllm.attention.layer import RectifiedAttention, swap
from era_vllm.compat import attention_impl
from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.lab import CHECKPOINT
from tests.engine.conftest import STOCK_FACTOR

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


@pytest.mark.situation("fp8 KV cache")
@pytest.mark.parametrize(
    ("store", "query", "key", "value"),
    [
        ("key_columns", 2**-5, 2**-4, VALUE_SCALE),
        ("value_column", QUERY_SCALE, KEY_SCALE, 16.0),
    ],
)
def test_calibrated_scales(needs_fp8, as_close_as_stock, calibrated, store, query, key, value):
    needs_fp8(store)
    live = as_close_as_stock({"model": calibrated, "dtype": "bfloat16"}, bias_store=store)
    assert rectified_layers(live)[0].kv_cache_dtype == "fp8"
    fitted = [(pytest.approx(x), pytest.approx(x)) for x in (query, key, value)]
    assert scales(live) == [tuple(fitted)] * 4
    for layer in rectified_layers(live):  # as when weights are loaded anew
        layer.process_weights_after_loading(torch.bfloat16)
    assert scales(live) == [tuple(fitted)] * 4


@pytest.mark.parametrize("scaled", [True, False])
def test_what_the_amx_kernel_flushes_is_refused_at_start(
    engine, setup, calibrated, monkeypatch, scaled
):
    """Whether the cache's number format comes from the arguments or from the checkpoint."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    llm = {"model": calibrated} if scaled else {"kv_cache_dtype": "fp8"}
    with pytest.raises(Exception, match="AMX.*key_columns, or a cache that is not fp8"):
        engine(setup(bias_store="value_column", llm={"dtype": "bfloat16", **llm}))


HEADS, KV_HEADS, SIZE, TOKENS, BLOCK = 4, 2, 64, 40, 32
CAP = 3.0


@pytest.fixture(scope="module")
def layer():
    """``layer(store, **how)``: a layer of its own, the buffer of its biases; None = stock's."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention

    config = EngineArgs(str(CHECKPOINT), dtype="float32").create_engine_config()
    names = (f"model.layers.{index}.self_attn.attn" for index in itertools.count())

    def build(store, **how):
        owner = torch.nn.Module()
        with set_current_vllm_config(config):
            owner.attn = Attention(
                HEADS,
                SIZE,
                SIZE**-0.5,
                num_kv_heads=KV_HEADS,
                cache_config=config.cache_config,
                prefix=next(names),
                **how,
            )
            buffer = store and swap(owner, config, EraConfig(bias_store=store))
        return owner.attn, buffer, config

    return build


def attend(layer, buffer, config, query, key, value, bias):
    """Return the layer's output for one prompt, through a real cache."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.v1.attention.backend import CommonAttentionMetadata

    blocks = -(-TOKENS // BLOCK)
    layer.kv_cache = torch.zeros(blocks, KV_HEADS, BLOCK, 2 * layer.head_size)
    config.cache_config.block_size = BLOCK
    ends, slots = torch.tensor([0, TOKENS], dtype=torch.int32), torch.arange(TOKENS)
    common = CommonAttentionMetadata(
        query_start_loc=ends,
        query_start_loc_cpu=ends,
        seq_lens=ends[1:],
        num_reqs=1,
        num_actual_tokens=TOKENS,
        max_query_len=TOKENS,
        max_seq_len=TOKENS,
        block_table_tensor=torch.arange(blocks, dtype=torch.int32)[None],
        slot_mapping=slots,
    )
    name = layer.layer_name
    with set_current_vllm_config(config):
        spec = layer.get_kv_cache_spec(config)
        build = layer.attn_backend.get_builder_cls()(spec, [name], config, torch.device("cpu"))
        metadata = {name: build.build(0, common)}
    if buffer is not None:
        buffer.write(bias != 0, bias[bias != 0])
    with set_forward_context(metadata, config, slot_mapping={name: slots}):
        return layer(query.flatten(1), key.flatten(1), value.flatten(1))


def expected(query, key, value, bias, cap=None, sinks=None):
    """Return softmax([cap(scale q.k) + bias, sink]) v: the cap before the bias, no value for it."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = torch.einsum("thd,shd->hts", query, key) * SIZE**-0.5
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    scores = (scores + bias).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, TOKENS, 1)], -1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., :TOKENS], value).flatten(1)


@pytest.mark.parametrize(
    ("right", "wrong", "how", "why"),
    [
        ("value_column", "key_columns", {"logits_soft_cap": CAP}, "soft-capped.*value_column"),
        ("key_columns", "value_column", {"sinks": torch.ones(HEADS)}, "sinks.*key_columns"),
        ("key_columns", None, {}, ""),
        ("value_column", None, {}, ""),
    ],
)
def test_layers_with_a_cap_or_sinks(layer, right, wrong, how, why, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        3 * torch.randn(TOKENS, heads, SIZE, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    bias = torch.zeros(TOKENS)
    bias[5:20] = torch.rand(15, generator=generator) + 1
    rectified, *rest = layer(right, **how)
    found = attend(rectified, *rest, query, key, value, bias)
    cap, sinks = how.get("logits_soft_cap"), how.get("sinks")
    exact = expected(query, key, value, bias, cap, sinks)
    unbiased = expected(query, key, value, torch.zeros(TOKENS), cap, sinks)
    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *_: rectified.isa)
    stock = attend(*layer(None, **how), query, key, value, bias)
    assert (found - exact).abs().mean() <= STOCK_FACTOR * (stock - unbiased).abs().mean()
    assert (found - exact).abs().max() < 1e-4
    for other in (
        unbiased,
        expected(query, key, value, bias) if how else exact + 1,
    ):
        assert (found - other).abs().max() > 1e-2
    if wrong is not None:
        with pytest.raises(UnsupportedError, match=why):
            layer(wrong, **how)


def test_one_scale_a_head_is_refused(layer):
    one, _, _ = layer("key_columns")
    one._k_scale = torch.ones(KV_HEADS)
    with pytest.raises(UnsupportedError, match="2 fp8 scales of 'k', one a head"):
        attention_impl.cache_scale(one, "k")
