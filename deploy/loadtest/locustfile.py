"""Mixed users for locust: pictures at every level, text, clients that leave, bad pictures; videos
where GET /v1/era says that the model takes them.

    python3 -m venv /tmp/locust && /tmp/locust/bin/pip install -r deploy/loadtest/requirements.txt
    /tmp/locust/bin/locust -f deploy/loadtest/locustfile.py --headless -u 16 -t 2m --host http://127.0.0.1:8000

In an environment of its own: locust and vLLM do not agree on packages. $API_KEY is the key. What
counts as a failure: an answer that its request should not get. A 503 is load that was shed, counted
under a name of its own; late: as a stream's first event. TTFT stands beside as type "TTFT".
"""

import base64
import io
import json
import os
import random
import time
from typing import Any, Final

from clip import clip_url
from locust import HttpUser, between, task
from PIL import Image

LEVELS: Final = ("off", "light", "medium", "strong", "extreme")
_SIDE: Final = int(os.environ.get("PICTURE_SIDE", "168"))
_TOKENS: Final = int(os.environ.get("OUTPUT_TOKENS", "16"))


def picture() -> str:
    """Return a picture that no cache has seen, as a data URL."""
    noise = Image.frombytes("RGB", (24, 24), random.randbytes(24 * 24 * 3))
    buffer = io.BytesIO()
    noise.resize((_SIDE, _SIDE), Image.Resampling.NEAREST).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def bad_picture() -> str:
    """Return what a server must refuse, in one of five ways."""
    whole = picture()
    return random.choice(
        [
            whole[: len(whole) // 2],
            "data:image/png;base64," + base64.b64encode(b"no picture").decode(),
            "data:image/png;base64,%%%",
            "http://127.0.0.1:1/picture.png",
            "file:///etc/passwd",
        ]
    )


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


class Client(HttpUser):
    """One user: asks, waits a little, asks again."""

    wait_time = between(0.1, 1.0)

    def on_start(self) -> None:
        """Log in and learn the model's name."""
        if key := os.environ.get("API_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"
        reply = self.client.get("/v1/models")
        reply.raise_for_status()
        self.model = reply.json()["data"][0]["id"]
        reply = self.client.get("/v1/era")
        reply.raise_for_status()
        self.videos = "video" in reply.json()["modalities"]

    @task(8)
    def look(self) -> None:
        """Ask about a picture at one of the levels, streamed."""
        level = random.choice(LEVELS)
        self._ask(f"picture {level}", _image(picture()), era={"level": level})

    @task(2)
    def watch(self) -> None:
        """Ask about a video; about a picture where the model takes none."""
        if not self.videos:
            return self.look()
        level = random.choice(LEVELS)
        url = clip_url(random.Random(), 128, 96, frames=8)
        video = {"type": "video_url", "video_url": {"url": url}}
        self._ask(f"video {level}", video, era={"level": level})

    @task(2)
    def read(self) -> None:
        """Ask without a picture."""
        self._ask("text")

    @task(1)
    def leave(self) -> None:
        """Go away after the first chunk."""
        endless = {"max_tokens": 400, "ignore_eos": True}
        self._ask("picture, client leaves", _image(picture()), leave=True, **endless)

    @task(1)
    def break_it(self) -> None:
        """Send a bad picture; the right answer is a 4xx."""
        self._ask("bad picture", _image(bad_picture()), allowed=range(400, 500))

    def _ask(
        self,
        name: str,
        item: dict[str, Any] | None = None,
        leave: bool = False,
        allowed: range = range(200, 201),
        **body: Any,
    ) -> None:
        parts: list[dict[str, Any]] = [{"type": "text", "text": "what color is the circle?"}]
        if item is not None:
            parts.insert(0, item)
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": _TOKENS,
            "temperature": 0,
            "stream": True,
            **body,
        }
        started = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=asked, stream=True, catch_response=True, name=name
        ) as reply:
            if reply.status_code == 503 and "Retry-After" in reply.headers:
                reply.request_meta["name"] = f"{name} (shed)"
                reply.success()
            elif reply.status_code not in allowed:
                reply.failure(f"{reply.status_code}: {reply.text[:200]}")
            elif reply.status_code == 200:
                self._read(name, reply, started, leave)
            else:
                reply.success()

    def _read(self, name: str, reply: Any, started: float, leave: bool) -> None:
        ended = False
        for number, line in enumerate(line for line in reply.iter_lines() if line):
            if number == 0:
                milliseconds = (time.perf_counter() - started) * 1000
                self.environment.events.request.fire(
                    request_type="TTFT",
                    name=name,
                    response_time=milliseconds,
                    response_length=0,
                    exception=None,
                    context={},
                )
                if leave:
                    reply.close()
                    reply.success()
                    return
            if line == b"data: [DONE]":
                ended = True
            elif line.startswith(b"data: ") and (error := json.loads(line[6:]).get("error")):
                if number == 0 and error.get("code") == 503:  # the queue was full after all
                    reply.request_meta["name"] = f"{name} (shed late)"
                    reply.success()
                else:
                    reply.failure(str(error)[:200])
                return
        if ended:
            reply.success()
        else:
            reply.failure("the stream ended without [DONE]")
