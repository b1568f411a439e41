"""Each peer served over HTTP: a picture is pruned by its name, and the answer says so."""

import json

import httpx
import pytest

from tests.peers import ASKING, PEERS
from tests.server.asking import CHAT, chat_body, fresh, picture
from tests.server.conftest import LIMITS, SERVE, started

pytestmark = pytest.mark.slow


ASKED = [f"{policy}, asked" for policy in ASKING]


@pytest.mark.parametrize("served", [*PEERS, *ASKED])
def test_a_picture_is_pruned_by_the_policy_that_is_served(served, tmp_path):
    policy, asked, _ = served.partition(", asked")
    command = [*SERVE, "serve", *LIMITS, "--era-policy", policy]
    if asked:
        command.append("--era-question-aware")
        for name, value in ASKING[policy].get("policy_options", {}).items():
            command += ["--era-option", f"{name}={json.dumps(value)}"]
    with started(tmp_path, {policy: (command, {})}) as (server,):
        said = httpx.post(f"{server.url}{CHAT}", json=chat_body(picture(fresh(0, 1))), timeout=60)
    assert said.status_code == 200, said.text
    body = said.json()
    (image,) = body["era"]["images"]
    assert body["era"]["policy"] == policy
    assert (image["tokens_before"], image["tokens_after"]) == (144, 32)
    assert image.get("question_tokens") == (5 if asked else None), "what shape is red?"
    assert body["choices"][0]["message"]["content"].strip()
