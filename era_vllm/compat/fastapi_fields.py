"""Validation of bodies that stops at the first bad item of a list, instead of naming all of them.

Each item of ``/v1/responses`` is tried as 27 types: one that is none makes 236 errors, and 1,000 of
them 17 s and a gigabyte in which nobody is answered. Pydantic's own ``fail_fast`` ends that; it is
a mark on a list's schema, which vLLM's models do not set, so it is set in the validators of the
routes.

Upstream: fastapi/_compat/v2.py ``ModelField._type_adapter`` (0.136), pydantic's
``TypeAdapter.core_schema`` and ``validator`` (2.14). Remove when vLLM's request models say
``FailFast()`` themselves.
"""

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic_core import SchemaValidator

from era_vllm.compat.starlette_path import flat_routes
from era_vllm.errors import UnsupportedError

_SEQUENCES = frozenset({"list", "tuple", "set", "frozenset"})


def stop_at_first_error(app: FastAPI) -> int:
    """Replace the validators of all routes' bodies; returns how many there were.

    Those of ``/invocations``, which tries one request type after the other, are its endpoint's own.

    Raises:
        AttributeError, UnsupportedError: FastAPI or pydantic keep them elsewhere.

    Mutates: app, its routes' fields.
    """
    routes = [route for route in flat_routes(app.routes) if isinstance(route, APIRoute)]
    fields = (field for route in routes for field in route.dependant.body_params)
    own = (adapter for route in routes for adapter in _adapters(route.endpoint))
    adapters = {id(at): at for at in (*(field._type_adapter for field in fields), *own)}
    if not adapters and any(route.body_field for route in routes):
        raise UnsupportedError("FastAPI's routes have bodies, and no validators where they were")
    for adapter in adapters.values():
        schema = _fail_fast(adapter.core_schema)
        adapter.validator = SchemaValidator(schema, _use_prebuilt=False)
    return len(adapters)


def _adapters(function: Callable[..., Any], seen: frozenset[int] = frozenset()) -> Iterator[Any]:
    """Yield the validators that an endpoint, or one that it wraps, has in a list of its own.

    Upstream: vllm/entrypoints/serve/sagemaker/api_router.py:87 ``INVOCATION_VALIDATORS`` (0.32.0).
    """
    for cell in getattr(function, "__closure__", None) or ():
        value = cell.cell_contents
        if isinstance(value, list):
            firsts = (at[0] for at in value if isinstance(at, tuple) and at)
            yield from (first for first in firsts if isinstance(first, TypeAdapter))
        elif hasattr(value, "__closure__") and id(value) not in seen:
            yield from _adapters(value, seen | {id(function)})


def _fail_fast(schema: Any) -> Any:
    """Return a core schema in which every sequence stops at its first error."""
    if isinstance(schema, dict):
        copy = {key: _fail_fast(value) for key, value in schema.items()}
        if isinstance(kind := schema.get("type"), str) and kind in _SEQUENCES:
            copy["fail_fast"] = True  # no field's: where a field is called "type" it is a schema
        return copy
    if isinstance(schema, list | tuple):
        return type(schema)(map(_fail_fast, schema))
    return schema
