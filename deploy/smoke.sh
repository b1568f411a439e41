#!/usr/bin/env bash
# Send one real chat request with a sample picture; fail unless the answer has text and the prompt
# was pruned. Needs Python alone.
#     deploy/smoke.sh [URL] [IMAGE_TOKENS]
# IMAGE_TOKENS: what one picture costs the served model unpruned; default: the shipped model's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../era_vllm/lab"
exec python3 - "${1:-http://127.0.0.1:8000}" "${2:-}" <<'PY'
import base64, json, sys, time, urllib.error, urllib.request

url = sys.argv[1].rstrip("/")
image_tokens = int(sys.argv[2] or json.load(open("checkpoint/config.json"))["image_seq_length"])
sample = json.load(open("samples/samples.json"))["samples"][0]
question = sample["questions"][0]
picture = base64.b64encode(open("samples/" + sample["file"], "rb").read()).decode()


def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        sys.exit(f"smoke: {url}{path} answered {error.code}: {error.read().decode()[:500]}")
    except OSError as error:
        sys.exit(f"smoke: {url}{path} does not answer ({error}); is the server up? try {url}/health")


model = call("/v1/models")["data"][0]["id"]
started = time.monotonic()
reply = call("/v1/chat/completions", {
    "model": model,
    "max_tokens": 16,
    "temperature": 0,
    "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture}},
        {"type": "text", "text": question["text"]},
    ]}],
})
milliseconds = (time.monotonic() - started) * 1000
answer = (reply["choices"][0]["message"]["content"] or "").strip()
prompt_tokens = reply["usage"]["prompt_tokens"]
print(f"model     {model}")
print(f"picture   {sample['file']} ({image_tokens} tokens unpruned)")
print(f"question  {question['text']}")
print(f"answer    {answer}   (right: {question['answer']})")
print(f"prompt    {prompt_tokens} tokens, picture and text   ({milliseconds:.0f} ms)")
if not answer:
    sys.exit("smoke: FAILED, the answer is empty")
if prompt_tokens >= image_tokens:
    sys.exit("smoke: FAILED, the whole prompt is longer than the unpruned picture: nothing was pruned")
print("smoke: passed")
PY
