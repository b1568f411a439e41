"""The real HTTP server with a real client: pruned answers, counted tokens, three ways alike."""

import base64
import io
import json
import os
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import BadRequestError, OpenAI

import era_vllm
from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.oracle import Oracle, segments_of
from era_vllm.lab.samples import load_samples
from era_vllm.lab.synth.dataset import generate
from era_vllm.lab.synth.questions import LEARNED_FAMILIES

POINTS = 0.03


def content(question, *images):
    parts = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "png")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": question}]


def chat(url, question, *images, **options):
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": content(question, *images)}]
    options = {"max_tokens": 8, "temperature": 0, **options}
    return client.chat.completions.create(model="era-sample", messages=messages, **options)


@pytest.fixture(scope="module")
def offline():
    """``LLM(**engine_args(...))`` with the server's own dtype, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    arguments = era_vllm.engine_args(str(CHECKPOINT), policy="era")
    llm = LLM(
        **arguments,
        enforce_eager=True,
        max_model_len=1024,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=16,
    )
    yield llm
    llm.llm_engine.engine_core.engine_core.shutdown()


def offline_answers(llm, pairs, rate=None):
    from vllm import SamplingParams

    prompts = [
        {
            "prompt": f"USER: <image> {question} ASSISTANT:",
            "multi_modal_data": {"image": image},
            **({} if rate is None else {"mm_processor_kwargs": {"era": rate}}),
        }
        for image, question in pairs
    ]
    params = SamplingParams(max_tokens=8, temperature=0)
    return [out.outputs[0].text for out in llm.generate(prompts, params, use_tqdm=False)]


def test_usage_counts_the_retained_tokens(servers):
    sample = load_samples()[0]
    question = sample.questions[0].text
    one = chat(servers[0].url, question, sample.image).usage.prompt_tokens
    two = chat(servers[0].url, question, sample.image, sample.image).usage.prompt_tokens
    none = chat(servers[0].url, question).usage.prompt_tokens
    assert (one - none, two - one) == (32, 32)  # of 144


def test_serve_printed_command_and_offline_give_the_same_answers(servers, offline):
    samples = load_samples()
    pairs = [(sample.image, sample.questions[0].text) for sample in samples]
    ways = [
        [chat(server.url, question, image).choices[0].message.content for image, question in pairs]
        for server in servers
    ]
    ways.append([offline_answers(offline, [pair])[0] for pair in pairs])
    assert ways[0] == ways[1] == ways[2]
    right = [sample.questions[0].answer for sample in samples]
    assert sum(a == b for a, b in zip(ways[0], right, strict=True)) >= len(right) * 2 // 3


def test_streaming_gives_the_same_text(servers):
    sample = load_samples()[3]
    question = sample.questions[0].text
    whole = chat(servers[0].url, question, sample.image).choices[0].message.content
    pieces = chat(servers[0].url, question, sample.image, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole


def test_a_prompt_beyond_the_rope_table_is_a_400_and_harms_nobody(servers):
    pictures = [sample.image for sample in load_samples()]
    pictures += pictures[:3]  # 15 x 144 positions are more than 2,048; 15 x 32 tokens are few
    with pytest.raises(BadRequestError, match="--era-positions compact"):
        chat(servers[0].url, "how many shapes?", *pictures)
    for picture in pictures[:2]:  # also in the refused prompt, so the caches know them
        alone = chat(servers[0].url, "how many shapes?", picture).choices[0].message.content
        assert alone == chat(servers[1].url, "how many shapes?", picture).choices[0].message.content


def test_an_answer_ends_at_the_last_trained_position(servers):
    """Of 2,048: the prompt is 2,0.. tokens long before pruning, and few of 1,024 after."""
    pictures = [sample.image for sample in load_samples()]
    pictures += pictures[:1]
    long = "red " * 150
    how = {"max_tokens": None, "extra_body": {"ignore_eos": True, "era": {"level": "extreme"}}}
    left = set()
    for server in servers:
        for most in ({}, {"max_tokens": 500}, {"max_completion_tokens": 500}):
            answer = chat(server.url, long, *pictures, **{**how, **most})
            before = answer.usage.prompt_tokens + len(pictures) * (144 - 8)
            assert answer.usage.total_tokens < 700
            assert answer.choices[0].finish_reason == "length"
            assert before + answer.usage.completion_tokens == 2048
            left.add(answer.usage.completion_tokens)
        *_, last = chat(server.url, long, *pictures, stream=True, **how)
        assert last.choices[0].finish_reason == "length"
    assert len(left) == 1 and 1 < min(left) < 200


def test_clients_cannot_set_processor_arguments(servers):
    sample = load_samples()[0]
    for value in ({"era": 0.5}, {"era": [0.5]}, {"do_resize": False}):
        with pytest.raises(BadRequestError):
            chat(servers[0].url, "?", sample.image, extra_body={"mm_processor_kwargs": value})
    assert chat(servers[0].url, "how many shapes?", sample.image).choices[0].message.content


def test_every_route_of_vllm_is_there_and_ours_are_few(servers):
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    stock = make_arg_parser(FlexibleArgumentParser()).parse_args([str(CHECKPOINT)])
    expected = build_app(stock, ("generate",)).openapi()["paths"]
    with urllib.request.urlopen(f"{servers[0].url}/openapi.json", timeout=30) as reply:
        served = json.load(reply)["paths"]
    assert {path: set(served.get(path, {})) for path in expected} == {
        path: set(methods) for path, methods in expected.items()
    }
    ours = served.keys() - expected.keys()
    assert all(path in ("/ready", "/metrics") or path.startswith("/v1/era") for path in ours)


@pytest.fixture(scope="module")
def held_out():
    """At least 200 questions over the learned families, about pictures of a seed of their own."""
    examples = list(generate(60, seed=777, families=LEARNED_FAMILIES, questions_per_image=4))
    asked = [(e.image, q.text, q.answer) for e in examples for q in e.questions]
    assert len(asked) >= 200
    return asked


@pytest.fixture(scope="module")
def expected(held_out):
    """Accuracy of the same reduction in plain transformers, float32: a CPU's bf16 may be slow."""
    oracle, accuracies = Oracle(str(CHECKPOINT)), {}

    def accuracy(rate):
        if rate not in accuracies:
            right, reduced = 0, {}
            for image, question, answer in held_out:
                if id(image) not in reduced:
                    reduced[id(image)] = segments_of(
                        oracle.reduce([image], EraConfig(policy="era"), rate)
                    )
                text = f"USER: <image> {question} ASSISTANT:"
                right += oracle.answer(text, reduced[id(image)]) == answer
            accuracies[rate] = right / len(held_out)
        return accuracies[rate]

    return accuracy


@pytest.mark.slow
def test_accuracy_over_http(servers, held_out, expected):
    def ask(item):
        return chat(servers[0].url, item[1], item[0]).choices[0].message.content == item[2]

    with ThreadPoolExecutor(8) as pool:
        found = sum(pool.map(ask, held_out)) / len(held_out)
    print(f"rate .778 over HTTP: {found:.3f}, transformers {expected(0.778):.3f}")
    assert abs(found - expected(0.778)) <= POINTS
