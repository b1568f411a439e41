"""What tests that ask a server about pictures share: bodies of the three routes, and figures."""

import base64
import io
import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

from era_vllm.lab.samples import load_samples
from era_vllm_server.metrics import FRESH_S

MODEL = "era-sample"
QUESTION = "what shape is red?"
N = 144
"""Tokens of a picture, unpruned."""
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def fresh(sample, mark):
    """A sample picture that no cache knows: its corner is a colour of its own."""
    image = load_samples()[sample].image.convert("RGB").copy()
    image.putpixel((0, 0), (mark % 256, mark // 256, 77))
    return image


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def url_of(image):
    return f"data:image/png;base64,{encoded(image)}"


def picture(image, detail=None, **more):
    """A picture as chat requests hold it."""
    url = {"url": url_of(image)} | ({} if detail is None else {"detail": detail})
    return {"type": "image_url", "image_url": url, **more}


def chat_body(*parts, text=QUESTION, **options):
    content = [*parts, {"type": "text", "text": text}]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
        **options,
    }


def responses_body(image, detail="auto", **options):
    content = [
        {"type": "input_image", "image_url": url_of(image), "detail": detail},
        {"type": "input_text", "text": QUESTION},
    ]
    items = [{"role": "user", "content": content}]
    return {
        "model": MODEL,
        "input": items,
        "max_output_tokens": 8,
        "temperature": 0,
        **options,
    }


def messages_body(image, **options):
    source = {"type": "base64", "media_type": "image/png", "data": encoded(image)}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
        **options,
    }


def post(server, path, body, key=None):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=120)


def chat(server, *parts, key=None, **options):
    """Ask, and return the answer's JSON."""
    reply = post(server, CHAT, chat_body(*parts, **options), key)
    assert reply.status_code == 200, reply.text
    return reply.json()


def rates(answer):
    """What an answer says of each picture: rate, level, source, tokens."""
    return [
        (one["pruning_rate"], one["level"], one["source"], one["tokens_after"])
        for one in answer["era"]["images"]
    ]


def image_tokens(server, answer, key=None, **options):
    """Tokens that the pictures have in the prompt, by vLLM's own count."""
    alone = chat(server, key=key, **options)["usage"]["prompt_tokens"]
    return answer["usage"]["prompt_tokens"] - alone


def figures(server, *names, key=None):
    """Sums of some metrics over their labels; without those that are not told at the moment."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    text = httpx.get(f"{server.url}/metrics", headers=headers, timeout=30).text
    found = {}
    for family in text_string_to_metric_families(text):
        for name in {family.name, f"{family.name}_total"} & set(names):
            found[name] = sum(one.value for one in family.samples if one.name == name)
    return found


def settled(server, *names, key=None):
    """The same, once two fresh readings agree: vLLM counts a little after it has answered.

    Workers' figures are told again for a while, and left out where the workers are late.
    """
    last = {}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        now = figures(server, *names, key=key)
        if now == last and set(now) == set(names):
            return now
        last = now
        time.sleep(1.1 * FRESH_S)
    raise TimeoutError(f"metrics of {server.url} do not settle: got {last}, expected {names}")
