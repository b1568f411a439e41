"""Each peer served over HTTP: a picture is pruned by its name, and the answer says so."""

import httpx
import pytest

from tests.peers import PEERS
from tests.server.asking import CHAT, chat_body, fresh, picture
from tests.server.conftest import ERA_VLLM, LIMITS, started

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("policy", PEERS)
def test_a_picture_is_pruned_by_the_policy_that_is_served(policy, tmp_path):
    command = [ERA_VLLM, "serve", *LIMITS, "--era-policy", policy]
    with started(tmp_path, {policy: (command, {})}) as (server,):
        said = httpx.post(f"{server.url}{CHAT}", json=chat_body(picture(fresh(0, 1))), timeout=60)
    assert said.status_code == 200, said.text
    body = said.json()
    (image,) = body["era"]["images"]
    assert body["era"]["policy"] == policy
    assert (image["tokens_before"], image["tokens_after"]) == (144, 32)
    assert body["choices"][0]["message"]["content"].strip()
