"""gamma: an exponent per layer and KV head, exact for both stores, and none is the paper's form."""

import pytest
import torch

from era_vllm.attention.cache_reader import read_bias
from era_vllm.attention.layer import RectifiedAttention, heads_of_rank
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples
from tests.engine.conftest import CONTROL_FACTOR, EAGER, TOLERANCE, python

LAYERS, KV_HEADS = 4, 3
STORES = ("key_columns", "value_column")


def random_gamma(layers, heads):
    """Return exponents between 0 and 2, as JSON holds them."""
    generator = torch.Generator().manual_seed(1)
    return (2 * torch.rand(layers, heads, generator=generator)).tolist()


def differences(live, oracle, request, answer):
    """Return the largest difference of log-probabilities with gamma, and without it."""
    segments = []
    for image in request.images:
        anchors = live.anchors_of(image, live.config.pruning_rate, oracle)
        segments += oracle.recycle([image], live.config, anchors)
    ids = [*answer.prompt_ids, *answer.token_ids][:-1]
    expected = [
        oracle.log_probs(ids, segments, len(answer.token_ids), gamma=gamma)
        for gamma in (live.config.gamma, None)
    ]
    return [(one - answer.log_probs).abs().max().item() for one in expected]


@pytest.mark.parametrize("store", STORES)
def test_random_exponents_are_exact(engine, setup, ask, images, oracle, store):
    live = engine(setup(bias_store=store, gamma=random_gamma(LAYERS, KV_HEADS)))
    requests = [
        ask("what shape is red?", images[0]),
        ask("is there a red circle?"),
        ask("how many shapes?", images[1], images[2]),
    ]
    for request, answer in zip(requests, live.ask(requests), strict=True):
        exact, without = differences(live, oracle, request, answer)
        print(f"gamma, {store}: difference {exact:.1e}, without gamma {without:.1e}")
        assert exact < TOLERANCE
        if request.images:
            assert without > CONTROL_FACTOR * TOLERANCE
    (text,) = live.ask([ask("how many shapes?")])
    assert differences(live, oracle, ask("how many shapes?"), text)[0] < TOLERANCE
    assert (live.model.bias_buffer.columns == live.model.bias_buffer.neutral).all()


def test_slots_hold_each_heads_own_bias(engine, setup, ask, images, oracle):
    gamma = random_gamma(LAYERS, KV_HEADS)
    live = engine(setup(bias_store="key_columns", gamma=gamma))
    (answer,) = live.ask([ask("what shape is red?", images[3])])
    _, result, row = live.pruned[live._key(images[3], 0.778, oracle)]
    size = live.block_size
    table = live.runner.input_batch.block_table[0].get_cpu_tensor()[0]
    visual = torch.tensor(answer.prompt_ids) == oracle.image_token
    position = visual.nonzero().flatten()
    slots = table[position // size].long() * size + position % size
    layers = [m for m in live.model.modules() if isinstance(m, RectifiedAttention)]
    for layer, exponents in zip(layers, torch.tensor(gamma), strict=True):
        held = read_bias(layer, slots, size)
        assert (held - result.log_bias[row][:, None] * exponents).abs().max() < 1e-5


def test_another_models_gamma_is_refused_at_start(engine, setup):
    with pytest.raises(ConfigError, match="got 4 layers of 2 KV heads; .* has 4 of 3"):
        engine(setup(gamma=random_gamma(LAYERS, 2)))


@pytest.mark.parametrize(
    ("total", "size", "expected"),
    [(3, 1, [[0, 1, 2]]), (4, 2, [[0, 1], [2, 3]]), (2, 4, [[0], [0], [1], [1]])],
)
def test_ranks_share_heads_or_hold_copies(total, size, expected):
    heads = [list(range(total))[heads_of_rank(total, size, rank)] for rank in range(size)]
    assert heads == expected


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_tensor_parallel_ranks_take_their_own_heads(apart, tmp_path, store):
    code = "from random_llava import save_random_llava as save; import pathlib, sys; "
    model = str(tmp_path / "model")
    python("-c", code + "save(pathlib.Path(sys.argv[1]))", model)
    era = {"policy": "era", "bias_store": store, "gamma": random_gamma(2, 2)}
    found = apart(
        {"tensor_parallel_size": 2},
        settings=era,
        questions=[["what shape is red?", 0]],
        checkpoint=model,
        **EAGER,
    )
    (answer,), anchors = found["answers"], torch.tensor(found["ranks"][0][0][1])
    oracle, config = Oracle(model), EraConfig.parse(era)
    (image,) = (sample.image for sample in load_samples()[:1])
    segments = oracle.recycle([image], config, anchors)
    swapped = tuple(row[::-1] for row in config.gamma)
    exact, without, wrong = (
        (oracle.log_probs(answer["ids"][:-1], segments, 9, gamma=gamma) - answer["log_probs"])
        .abs()
        .max()
        for gamma in (config.gamma, None, swapped)
    )
    print(f"gamma, TP 2, {store}: {exact:.1e}, none {without:.1e}, other rank's heads {wrong:.1e}")
    assert exact < TOLERANCE
    assert min(without, wrong) > CONTROL_FACTOR * TOLERANCE
