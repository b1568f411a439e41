"""What ``era-vllm bench segments`` measures with: errors, pairs, photos, memory. Times nothing."""

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from era_vllm.bench.block_cost import (
    QWEN3_VL,
    TowerShape,
    cases,
    cost,
    named,
    peak_bytes,
    shares,
    tower,
)
from era_vllm.bench.block_fidelity import merge_error, of_all_queries, shared
from era_vllm.bench.clock import Samples
from era_vllm.bench.options import SegmentsOptions
from era_vllm.bench.photo_tokens import PhotoTokens, photo_tokens
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples
from era_vllm.pipeline import prune
from era_vllm.policies import era
from era_vllm.types import Signal, VisualTokens

OPTIONS = SegmentsOptions(
    **{"rounds": 1, "warm_ups": 0, "shape": "tiny", "dtype": "float32", "policies": ["era", "dpp"]},
    **{"tokens": [64, 256], "segments": [128, 64], "rate": 0.9, "answer_rate": 0.889},
    **{"patches": 256, "tower_layers": 1, "slow_s": 60.0, "photos": 1, "pictures": 1},
)


def test_merge_error_is_that_of_each_tokens_row() -> None:
    embeds = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
    tokens = VisualTokens(embeds, (1, 3), {Signal.ENCODER_ATTENTION: torch.rand(1, 2, 3)})
    pruned = prune(tokens, 2, era.Policy())
    found = merge_error(tokens, pruned)
    rows = pruned.embeds[0][pruned.assignment[0]]
    assert found == pytest.approx(
        {
            "one_minus_cos": 1 - float(cosine_similarity(embeds[0], rows).mean()),
            "relative_mse": float((embeds[0] - rows).square().sum()) / 11,
            "kept": 2,
        }
    )
    nothing = merge_error(tokens, prune(tokens, 3, era.Policy()))
    assert nothing["one_minus_cos"] == pytest.approx(0, abs=1e-6) and nothing["relative_mse"] == 0
    assert shared(torch.tensor([[1, 5, 9, 11]]), torch.tensor([[5, 9, 12]])) == 0.5


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(str(CHECKPOINT), language=False)


def test_a_photos_tokens_are_its_tiles(oracle: Oracle) -> None:
    photo = Image.effect_noise((336, 336), 90).convert("RGB")
    found = photo_tokens(oracle, photo, 20)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        left, upper = column * 168, row * 168
        own = oracle.tokens([photo.crop((left, upper, left + 168, upper + 168))])
        at = (
            slice(12 * row, min(12 * row + 12, 20)),
            slice(12 * column, min(12 * column + 12, 20)),
        )
        inside = tuple(slice(0, s.stop - s.start) for s in at)
        for ours, theirs in (
            (found.tokens.embeds, own.embeds),
            *(
                (found.tokens.signals[s].transpose(1, 2), own.signals[s].transpose(1, 2))
                for s in (Signal.ENCODER_ATTENTION, Signal.ENCODER_SCORES)
            ),
        ):
            expected = theirs.unflatten(1, (12, 12))[(0, *inside)]
            torch.testing.assert_close(
                ours.unflatten(1, (20, 20))[(0, *at)], expected, atol=1e-5, rtol=1e-4
            )


def test_queries_and_keys_of_a_photo_are_those_of_the_layer_that_is_read(oracle: Oracle) -> None:
    photo = load_samples()[0].image.resize((168, 168))
    found = photo_tokens(oracle, photo, 12)
    scores = torch.einsum("qhd,khd->hqk", found.query[0], found.key[0]) * found.scale
    mean = found.tokens.signal(Signal.ENCODER_SCORES)[0]
    centred = [x - x.mean(-1, keepdim=True) for x in (scores.mean(1), mean)]
    assert float(cosine_similarity(*centred).min()) > 0.98, "but for the query of the CLS token"


def test_attention_of_all_queries_is_not_sampled() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2500, 2, 8, generator=generator) for _ in range(2))
    found = of_all_queries(PhotoTokens(VisualTokens(key[:, :, 0], (50, 50)), query, key, 0.3))
    scores = torch.einsum("qhd,khd->hqk", query[0].double(), key[0].double()) * 0.3
    torch.testing.assert_close(found[0].double(), scores.softmax(-1).mean(1), atol=1e-8, rtol=1e-5)


def test_memory_is_what_a_call_holds_at_most() -> None:
    def hold() -> None:
        for _ in range(3):
            torch.ones(16 << 20)  # 64 MiB, one after another

    hold()
    found = peak_bytes(hold)
    if found is None:
        pytest.skip("the system does not tell")
    assert 60 << 20 < found < 160 << 20


def test_every_bound_that_cuts_is_a_case_and_the_whole_is_last() -> None:
    names = [named(case) for case in cases(OPTIONS, OPTIONS.tokens)]
    assert names == [
        *("64 whole era", "64 whole dpp"),
        *("256 64 era", "256 64 dpp", "256 128 era", "256 128 dpp"),
        *("256 whole era", "256 whole dpp"),
    ]


def test_only_who_reads_attention_pays_for_it() -> None:
    values = {"tower": {"tower": (10.0,)}, "signal": {"signal": (1.0,)}}
    values |= {named(case): {"prune": (2.0,)} for case in cases(OPTIONS, [64])}
    assert shares(Samples(values), OPTIONS) == pytest.approx({"era whole": 0.3, "dpp whole": 0.2})


def test_cost_times_every_case_beside_the_tower() -> None:
    samples, memory = cost(OPTIONS, "cpu")
    expected = {named(case) for case in cases(OPTIONS, OPTIONS.tokens)}
    assert set(memory) == expected and set(samples.values) == expected | {"tower", "signal"}
    layers = samples.of("tower", "timed_layers")[0]
    assert samples.of("tower", "tower")[0] == pytest.approx(layers * QWEN3_VL.layers)


def test_a_towers_layer_attends_from_every_patch_to_every_patch() -> None:
    torch.manual_seed(0)
    layer = tower(TowerShape(width=16, heads=2, mlp=32), layers=1)
    x = torch.randn(9, 16)
    moved = x.clone()
    moved[8] = torch.randn(16)
    with torch.inference_mode():
        before, after, turned = (
            layer(given[None]).last_hidden_state[0] for given in (x, moved, x.flip(0))
        )
    turned = turned.flip(0)
    assert ((before - after).abs().amax(1) > 1e-6).all()
    torch.testing.assert_close(turned, before)
