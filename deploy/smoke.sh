#!/usr/bin/env bash
# One real request with a sample picture, at a level: fail unless the server is ready, the answer
# has text, its `era` object says what was pruned, and /metrics counted it. Needs Python alone.
#     deploy/smoke.sh [URL] [IMAGE_TOKENS]
# IMAGE_TOKENS: what one picture costs the served model unpruned; default: the shipped model's.
# Keys: $API_KEY and $METRICS_KEY, or the first ones in deploy/secrets, where keys.sh made them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec python3 - "${1:-http://127.0.0.1:8000}" "${2:-}" <<'PY'
import base64, json, os, pathlib, re, sys, time, urllib.error, urllib.request

LEVEL = "strong"
url = sys.argv[1].rstrip("/")
lab = pathlib.Path("../era_vllm/lab")
checkpoint = json.loads((lab / "checkpoint/config.json").read_text())
image_tokens = int(sys.argv[2] or checkpoint["image_seq_length"])
sample = json.loads((lab / "samples/samples.json").read_text())["samples"][0]
question = sample["questions"][0]
picture = base64.b64encode((lab / "samples" / sample["file"]).read_bytes()).decode()
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fail(why):
    sys.exit(f"smoke: FAILED, {why}")


def key(variable, file):
    path = pathlib.Path("secrets") / file
    lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()] if path.exists() else []
    keys = [line for line in lines if line and line[0] != "#"]
    return os.environ.get(variable) or (keys[0] if keys else None)


def call(path, body=None, key=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        with direct.open(urllib.request.Request(url + path, data, headers), timeout=60) as reply:
            return reply.read().decode()
    except urllib.error.HTTPError as error:
        fail(f"{url}{path} answered {error.code}: {error.read().decode()[:500]}")
    except OSError as error:
        fail(f"{url}{path} does not answer ({error}); is the server up? try {url}/health")


def tokens(which):
    found = re.findall(rf'^era:image_tokens_{which}_total{{.*level="{LEVEL}".*}} (\S+)$',
                       call("/metrics", key=key("METRICS_KEY", "metrics_key")), re.M)
    return sum(map(float, found))


call("/ready")
mine = key("API_KEY", "api_keys")
model = json.loads(call("/v1/models", key=mine))["data"][0]["id"]
before, after = tokens("before"), tokens("after")
started = time.monotonic()
reply = json.loads(call("/v1/chat/completions", {
    "model": model,
    "max_tokens": 16,
    "temperature": 0,
    "era": {"level": LEVEL},
    "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture}},
        {"type": "text", "text": question["text"]},
    ]}],
}, mine))
milliseconds = (time.monotonic() - started) * 1000
answer = (reply["choices"][0]["message"]["content"] or "").strip()
prompt_tokens = reply["usage"]["prompt_tokens"]
print(f"model     {model}")
print(f"picture   {sample['file']} ({image_tokens} tokens unpruned)")
print(f"question  {question['text']}")
print(f"answer    {answer}   (right: {question['answer']})")
print(f"prompt    {prompt_tokens} tokens, picture and text   ({milliseconds:.0f} ms)")
print(f"era       {json.dumps(reply.get('era'))}")
if not answer:
    fail("the answer is empty")
if prompt_tokens >= image_tokens:
    fail("the whole prompt is longer than the unpruned picture: nothing was pruned")
(image,) = (reply.get("era") or {}).get("images") or fail("the answer has no `era` object")
if (image["level"], image["tokens_before"]) != (LEVEL, image_tokens):
    fail(f"asked for level {LEVEL} of {image_tokens} tokens")
counted = tokens("before") - before, tokens("after") - after
print(f"metrics   image tokens before and after, counted: {counted[0]:.0f}, {counted[1]:.0f}")
if counted[0] < image_tokens or not 0 < counted[1] < counted[0]:
    fail("/metrics has not counted the picture's tokens")
print("smoke: passed")
PY
