"""What the router matches of a path: without the root path, by the router's own rule.

Upstream: starlette/_utils.py ``get_route_path`` (1.10). Remove when it is public.
"""

from starlette._utils import get_route_path

__all__ = ["get_route_path"]
