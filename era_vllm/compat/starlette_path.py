"""Routes and their paths, by the router's own rules.

Upstream: starlette/_utils.py ``get_route_path`` (1.10), what the router matches of a path: without
the root path. From FastAPI 0.137 on a router that was included stands among the routes itself,
without a path; its own routes, with the prefixes of all routers around them, are its
``effective_candidates``. Remove when both are public.
"""

from collections.abc import Iterable, Iterator

from starlette._utils import get_route_path
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

__all__ = ["flat_routes", "get_route_path", "matched_path"]


def flat_routes(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    """Yield all routes, those of included routers among them."""
    for route in routes:
        inner = getattr(route, "effective_candidates", None)
        yield from [route] if inner is None else flat_routes(inner())


def matched_path(routes: Iterable[BaseRoute], scope: Scope) -> str | None:
    """Return the path of the first route that takes a request, as the route spells it."""
    for route in flat_routes(routes):
        if route.matches(scope)[0] != Match.NONE:
            return getattr(route, "path", None)
    return None
