"""The requests of ``smoke.sh``, which says what for and where ``clip`` is. Needs Python alone."""

import base64
import json
import os
import pathlib
import random
import re
import sys
import time
import urllib.error
import urllib.request
from typing import NoReturn

from clip import clip_url

LEVEL = "strong"
KINDS = {"image": "images", "video": "videos"}
WHEN = ("before", "after")
HERE = pathlib.Path(__file__).resolve().parent
SAMPLES = HERE.parent / "era_vllm" / "lab" / "samples"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main(url: str, image_tokens: int | None = None) -> None:
    """Ask, and end the process at the first thing that is wrong.

    Args:
        url: Of the server.
        image_tokens: Of the first picture, unpruned; None = whatever the server says.
    """
    server = Server(url)
    server.call("/ready")
    model = json.loads(server.call("/v1/models", key=server.key))["data"][0]["id"]
    facts = json.loads(server.call("/v1/era", key=server.key))
    print(f"model     {model}, takes {' and '.join(facts['modalities'])}; policy {facts['policy']}")
    first, second = json.loads((SAMPLES / "samples.json").read_text())["samples"][:2]
    question = first["questions"][0]
    one, two = picture(first["file"]), picture(second["file"])

    def ask(level: str, *parts: dict[str, object]) -> dict[str, object]:
        return server.ask(model, question["text"], level, parts)

    print(f"question  {question['text']}   (of {first['file']}: {question['answer']})")
    alone = ask(LEVEL, one)
    check(alone, images=1)
    if image_tokens not in (None, alone["images"][0]["tokens_before"]):
        fail(f"needed a picture of {image_tokens} tokens")
    if "off" in facts["levels"]:
        whole = ask("off", one)
        saved = whole["prompt_tokens"] - alone["prompt_tokens"]
        if saved != sum(item["tokens_before"] - item["tokens_after"] for item in alone["images"]):
            fail(
                f"the prompt is {saved} tokens shorter than at level off, and `era` says otherwise"
            )
    both = ask(LEVEL, one, two)
    check(both, images=2)
    if both["images"][0] != alone["images"][0]:
        fail("a picture beside another one is pruned otherwise than alone")
    if "video" in facts["modalities"]:
        url = clip_url(random.Random(0), 160, 128, frames=8)
        check(ask(LEVEL, {"type": "video_url", "video_url": {"url": url}}), videos=1)
    print("smoke: passed")


class Server:
    """A server, with the keys to it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.key = key("API_KEY", "api_keys")

    def call(self, path: str, body: dict[str, object] | None = None, key: str | None = None) -> str:
        """Return what it answers."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with DIRECT.open(request, timeout=60) as reply:
                return reply.read().decode()
        except urllib.error.HTTPError as error:
            fail(f"{self.url}{path} answered {error.code}: {error.read().decode()[:500]}")
        except OSError as error:
            fail(f"{self.url}{path} does not answer ({error}); is it up? try {self.url}/health")

    def counted(self, level: str) -> dict[str, float]:
        """Return the tokens of a level that its metrics have, by ``image before`` and the like."""
        text = self.call("/metrics", key=key("METRICS_KEY", "metrics_key"))
        found = re.findall(
            rf'^era:(image|video)_tokens_(before|after)_total{{.*level="{level}".*}} (\S+)$',
            text,
            re.M,
        )
        sums = {f"{kind} {when}": 0.0 for kind in KINDS for when in WHEN}
        for kind, when, value in found:
            sums[f"{kind} {when}"] += float(value)
        return sums

    def ask(
        self, model: str, question: str, level: str, parts: tuple[dict[str, object], ...]
    ) -> dict[str, object]:
        """Put a question; print the answer and look that it was counted.

        Returns:
            What its ``era`` says, and ``level``, ``prompt_tokens`` and ``answer``.
        """
        before = self.counted(level)
        started = time.monotonic()
        content = [*parts, {"type": "text", "text": question}]
        body = {
            "model": model,
            "max_tokens": 16,
            "temperature": 0,
            "era": {"level": level},
            "messages": [{"role": "user", "content": content}],
        }
        reply = json.loads(self.call("/v1/chat/completions", body, self.key))
        milliseconds = (time.monotonic() - started) * 1000
        said = {
            **(reply.get("era") or fail("the answer has no `era` object")),
            "level": level,
            "prompt_tokens": reply["usage"]["prompt_tokens"],
            "answer": (reply["choices"][0]["message"]["content"] or "").strip(),
        }
        kinds = " and ".join(part["type"].removesuffix("_url") for part in parts)
        print(f"\n{kinds}, {level}: {said['answer'] or '(nothing)'}")
        print(f"prompt    {said['prompt_tokens']} tokens   ({milliseconds:.0f} ms)")
        print(f"era       {json.dumps(reply['era'])}")
        after = self.counted(level)
        for kind, name in KINDS.items():
            items = said.get(name, ())
            for when in WHEN:
                grown = after[f"{kind} {when}"] - before[f"{kind} {when}"]
                needed = sum(item[f"tokens_{when}"] for item in items)
                if grown < needed:  # others may ask meanwhile
                    fail(f"/metrics has {grown:g} more {kind} tokens {when} pruning, not {needed}")
            if items:
                tokens = [sum(item[f"tokens_{when}"] for item in items) for when in WHEN]
                print(f"metrics   {kind} tokens before and after, counted: {tokens}")
        return said


def check(said: dict[str, object], **numbers: int) -> None:
    """Look that an answer is one, and that so many items were pruned."""
    if not said["answer"]:
        fail("the answer is empty")
    for name in KINDS.values():
        items = said.get(name, [])
        if len(items) != numbers.get(name, 0):
            fail(f"era.{name}: got {len(items)}, needed {numbers.get(name, 0)}")
        for item in items:
            if (
                item["level"] != said["level"]
                or not 0 < item["tokens_after"] < item["tokens_before"]
            ):
                fail(f"era.{name}: asked for level {said['level']}, got {item}: nothing was pruned")


def picture(file: str) -> dict[str, object]:
    """Return one of the samples, as a part of a message."""
    data = base64.b64encode((SAMPLES / file).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}}


def key(variable: str, file: str) -> str | None:
    """Return a key from a variable or else a file, its first line that says something."""
    path = HERE / "secrets" / file
    lines = path.read_text("utf-8-sig").splitlines() if path.exists() else []
    keys = [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
    return os.environ.get(variable) or (keys[0] if keys else None)


def fail(why: str) -> NoReturn:
    """End with what is wrong."""
    sys.exit(f"smoke: FAILED, {why}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
