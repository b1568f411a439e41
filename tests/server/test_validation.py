"""Validation of bodies stops at the first bad item of a list, at every route.

Counts of errors, not seconds: each bad item of ``/v1/responses`` makes 236 errors.
"""

import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.sagemaker import api_router as sagemaker

from era_vllm.compat.fastapi_fields import _adapters, stop_at_first_error

BAD = {"model": "m", "input": [{"type": "x"}] * 50}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}], "documents": [0] * 3000}


@pytest.fixture
def app():
    app = FastAPI()

    @app.post("/v1/responses")
    def responses(request: ResponsesRequest) -> None:
        pass

    sagemaker._attach_router(app, ("generate",), None)
    return app


def route(app, path):
    return next(at for at in app.routes if getattr(at, "path", None) == path)


def errors(validate, body):
    with pytest.raises(ValidationError) as raised:
        validate(body)
    return raised.value.error_count()


def test_the_first_bad_item_ends_it(app):
    (field,) = route(app, "/v1/responses").dependant.body_params
    before = errors(field._type_adapter.validate_python, BAD)
    assert stop_at_first_error(app) > 1
    after = errors(field._type_adapter.validate_python, BAD)
    assert before > 40 * after and after < 300
    good = {"model": "m", "input": [{"role": "user", "content": "a"}] * 3}
    assert len(field._type_adapter.validate_python(good).input) == 3


def test_invocations_own_validators_too(app):
    adapters = list(_adapters(route(app, "/invocations").endpoint))
    assert len(adapters) >= 2
    chat = next(at for at in adapters if "Chat" in at._type.__name__)
    before = errors(chat.validate_python, CHAT)
    stop_at_first_error(app)
    assert before >= 3000 and errors(chat.validate_python, CHAT) < 100
