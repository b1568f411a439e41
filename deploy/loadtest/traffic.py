"""What the soak sends, and how each request ended: against an unloaded server's answers.

Leaves out when things are sent (``soak.py``) and the server's processes (``watch.py``).
"""

import asyncio
import base64
import io
import json
import random
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import httpx
from clip import clip_url
from PIL import Image

from era_vllm.lab.synth.dataset import generate

PATH: Final = "/v1/chat/completions"
LEVELS: Final = (None, "off", "light", "medium", "strong", "extreme")
"""None: the request does not say, so the server's default holds."""
_CLIP: Final = (96, 64, 8)
"""Width, height and pictures of a video."""

Ended = Literal["right", "wrong", "shed", "shed late", "refused", "left", "error", "lost"]
"""right or wrong: a complete answer, (not) the unloaded server's; shed: 503 with Retry-After; shed
late: 503 as a stream's first event, where the queue filled up after vLLM had looked; refused: 4xx
to what is broken; left: we went away; error: any other answer; lost: none in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What has to come back the same under load."""

    text: str
    prompt_tokens: int
    margin: float = float("inf")
    """Smallest lead of a chosen token over the next best, in nats."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; ``answer`` None means that it is broken and has to be refused."""

    name: str
    body: Mapping[str, object]
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request's end."""

    name: str
    ended: Ended
    said: str = ""
    """Of an error or a wrong answer: what came."""


def good_asks(
    model: str, count: int, output_tokens: int, modalities: Collection[str] = ("image",)
) -> list[Ask]:
    """Return requests at all levels: one picture, every eighth two with a detail each, every
    fifth none; where the model takes videos every fourth one, half of these beside a picture.

    Args:
        model: Its served name.
        count: How many.
        output_tokens: Of each answer.
        modalities: What the model takes.
    """
    asks: list[Ask] = []
    videos = random.Random(9)
    examples = list(generate(count + 1, seed=9, questions_per_image=1))
    for index, example in enumerate(examples[:-1]):
        level = LEVELS[index % len(LEVELS)]
        era = {} if level is None else {"era": {"level": level}}
        if index % 4 == 3 and "video" in modalities:
            parts = [_part(example.image)] if index % 8 == 3 else []
            parts.append(_video(clip_url(videos, *_CLIP)))
        elif index % 5 == 4:
            parts, era = [], {}
        elif index % 8 == 7:
            parts, era = [_part(example.image, "high"), _part(examples[index + 1].image, "low")], {}
        else:
            parts = [_part(example.image)]
        parts.append({"type": "text", "text": example.questions[0].text})
        body = {
            "model": model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,  # longer answers: more to be wrong in
            **era,
        }
        asks.append(Ask(f"{index} {level or 'default'}", body))
    return asks


def broken_asks(model: str, modalities: Collection[str] = ("image",)) -> list[Ask]:
    """Return requests that a server has to refuse, and may not stumble over."""
    image = Image.new("RGB", (168, 168), "red")
    whole = _url(image)
    bomb = bytearray(base64.b64decode(whole.split(",")[1]))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height in the PNG's header
    urls = {
        "cut": whole[: len(whole) // 2],
        "text": "data:image/png;base64," + base64.b64encode(b"no picture").decode(),
        "no base64": "data:image/png;base64,%%%",
        "empty": "data:image/png;base64,",
        "bomb": "data:image/png;base64," + base64.b64encode(bytes(bomb)).decode(),
        "loopback": "http://127.0.0.1:1/picture.png",
        "file": "file:///etc/passwd",
    }
    asks = [
        Ask(f"broken: {name}", _body(model, {"type": "image_url", "image_url": {"url": url}}))
        for name, url in urls.items()
    ]
    level = {**_body(model, _part(image)), "era": {"level": "most"}}
    video = clip_url(random.Random(8), *_CLIP)
    if "video" in modalities:
        video = video[: len(video) // 2 // 4 * 4]  # whole base64, and the index is at the end
    return [
        *asks,
        Ask("broken: level", level),
        Ask("broken: video", _body(model, _video(video))),
    ]


async def reference(client: httpx.AsyncClient, ask: Ask) -> Ask:
    """Return the request with its answer from a server that has nothing else to do."""
    reply = await client.post(PATH, json={**ask.body, "logprobs": True, "top_logprobs": 2})
    reply.raise_for_status()
    said = reply.json()
    choice = said["choices"][0]
    best = [step["top_logprobs"] for step in choice["logprobs"]["content"]]
    margin = min(abs(two[0]["logprob"] - two[1]["logprob"]) for two in best if len(two) > 1)
    text = choice["message"]["content"]
    return replace(ask, answer=Answer(text, said["usage"]["prompt_tokens"], margin))


async def send(
    client: httpx.AsyncClient, ask: Ask, stream: bool, leave_after_s: float | None, limit_s: float
) -> Outcome:
    """Send one request and judge what comes back.

    Args:
        client: Of the server.
        ask: With the answer that is expected.
        stream: Whether as server-sent events.
        leave_after_s: Go away after so long, if it is not over by then.
        limit_s: When a request counts as lost.
    """
    limit = limit_s if leave_after_s is None else leave_after_s
    try:
        async with asyncio.timeout(limit):
            return await (_stream if stream else _whole)(client, ask)
    except TimeoutError:
        return Outcome(
            ask.name, "lost" if leave_after_s is None else "left", f"after {limit:.0f} s"
        )
    except httpx.HTTPError as error:
        return Outcome(ask.name, "lost", repr(error))


async def _whole(client: httpx.AsyncClient, ask: Ask) -> Outcome:
    reply = await client.post(PATH, json=ask.body)
    if reply.status_code != 200:
        return _refused(ask, reply)
    said = reply.json()
    choice, tokens = said["choices"][0], said["usage"]["prompt_tokens"]
    return _judged(ask, choice["message"]["content"], tokens)


async def _stream(client: httpx.AsyncClient, ask: Ask) -> Outcome:
    body = {**ask.body, "stream": True, "stream_options": {"include_usage": True}}
    text, tokens = "", 0
    async with client.stream("POST", PATH, json=body) as reply:
        if reply.status_code != 200:
            await reply.aread()
            return _refused(ask, reply)
        async for data in events(reply):
            if "error" in data:
                late = data["error"].get("code") == 503 and not text
                said = json.dumps(data["error"])[:300]
                return Outcome(ask.name, "shed late" if late else "error", said)
            for choice in data["choices"]:
                text += choice["delta"].get("content") or ""
            if data.get("usage"):
                tokens = data["usage"]["prompt_tokens"]
    if not tokens:
        return Outcome(ask.name, "lost", "the stream ended before its usage")
    return _judged(ask, text, tokens)


async def events(reply: httpx.Response) -> AsyncIterator[dict[str, object]]:
    """Yield the JSON of a stream's events."""
    async for line in reply.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def _judged(ask: Ask, text: str, prompt_tokens: int) -> Outcome:
    if ask.answer is None:
        return Outcome(ask.name, "error", f"answered 200 to what is broken: {text[:100]!r}")
    if (text, prompt_tokens) == (ask.answer.text, ask.answer.prompt_tokens):
        return Outcome(ask.name, "right")
    said = f"{text!r} of {prompt_tokens} tokens, not {ask.answer.text!r} of "
    return Outcome(ask.name, "wrong", f"{said}{ask.answer.prompt_tokens}")


def _refused(ask: Ask, reply: httpx.Response) -> Outcome:
    if reply.status_code == 503 and "retry-after" in reply.headers:
        return Outcome(ask.name, "shed")
    if ask.answer is None and 400 <= reply.status_code < 500:
        return Outcome(ask.name, "refused")
    return Outcome(ask.name, "error", f"{reply.status_code}: {reply.text[:300]}")


def draw(lots: random.Random, good: Sequence[Ask], broken: Sequence[Ask], share: float) -> Ask:
    """Return the next request; ``share`` of them are broken."""
    return lots.choice(broken if lots.random() < share else good)


def _body(model: str, part: Mapping[str, object]) -> dict[str, object]:
    parts = [part, {"type": "text", "text": "what color is the circle?"}]
    messages = [{"role": "user", "content": parts}]
    return {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0}


def _part(image: Image.Image, detail: str | None = None) -> dict[str, object]:
    named = {} if detail is None else {"detail": detail}
    return {"type": "image_url", "image_url": {"url": _url(image), **named}}


def _video(url: str) -> dict[str, object]:
    return {"type": "video_url", "video_url": {"url": url}}


def _url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
