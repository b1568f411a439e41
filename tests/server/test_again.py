"""A request that fails at its start is asked once more; the fault is forced, no server runs."""

import asyncio
from functools import partial

import pytest
from fastapi.responses import JSONResponse, StreamingResponse
from vllm.exceptions import GenerationError, QueueOverflowError

from era_vllm_server.again import answered

FIRST, TEXT, DONE = 'data: {"choices":[]}\n\n', 'data: {"choices":[{}]}\n\n', "data: [DONE]\n\n"
FAILED = 'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'
SHED = 'data: {"error": {"message": "The engine is currently busy", "code": 503}}\n\n'
CREATED = "event: response.created\ndata: {}\n\n"
GOING = "event: response.in_progress\ndata: {}\n\n"


def stream(*events):
    async def flow():
        for event in events:
            yield event

    return StreamingResponse(flow())


def outcome(*answers):
    """What the client gets, and how often vLLM is asked, where it answers so one after another."""
    asked = []

    async def ask():
        asked.append(1)
        answer = answers[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run():
        response = await answered(ask)
        if not isinstance(response, StreamingResponse):
            return response
        return [event async for event in response.body_iterator]

    return asyncio.run(run()), len(asked)


def test_a_failure_is_asked_again_and_what_works_is_not():
    right = JSONResponse({})
    assert outcome(GenerationError("Internal server error"), right) == (right, 2)
    assert outcome(right) == (right, 1)
    assert outcome(stream(FIRST, TEXT, DONE)) == ([FIRST, TEXT, DONE], 1)
    assert outcome(stream(FIRST)) == ([FIRST], 1)


def test_three_times_is_all():
    failures = [GenerationError(str(attempt)) for attempt in range(4)]
    right = JSONResponse({})
    assert outcome(*failures[:2], right) == (right, 3)
    with pytest.raises(GenerationError):
        outcome(*failures[:3], right)
    failed = partial(stream, FAILED, DONE)
    assert outcome(failed(), failed(), stream(FIRST, TEXT)) == ([FIRST, TEXT], 3)
    assert outcome(*(failed() for _ in range(4))) == ([FAILED, DONE], 3)


@pytest.mark.parametrize("opening", [[], [FIRST], [CREATED, GOING]], ids=len)
def test_a_stream_that_fails_at_its_start_is_replaced(opening):
    got = outcome(stream(*opening, FAILED, DONE), stream(FIRST, TEXT, DONE))
    assert got == ([FIRST, TEXT, DONE], 2)


def test_what_was_said_is_not_said_again():
    events = [FIRST, TEXT, FAILED, DONE]
    assert outcome(stream(*events)) == (events, 1)


def test_a_shed_request_is_not_asked_again():
    assert outcome(stream(SHED, DONE)) == ([SHED, DONE], 1)


def test_a_request_that_is_shed_when_asked_again_is_told_so():
    """A 503, upon which clients come back, and not the 500 of the first time."""
    with pytest.raises(QueueOverflowError):
        outcome(GenerationError(), QueueOverflowError())
    (said,), asked = outcome(stream(FIRST, FAILED, DONE), QueueOverflowError())
    assert (asked, said.count('"code":503')) == (2, 1)
    assert said.startswith("event: error\ndata: {") and said.endswith(DONE)
