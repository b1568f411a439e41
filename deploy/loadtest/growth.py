"""Bodies that grow: for each list, string and object of each route's schema, of several sizes.

Made from the server's own OpenAPI description, so that a route or field that is new is tried too.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

_DEPTH: Final = 5
"""Levels of a schema that are walked."""
_ELEMENTS: Final[tuple[object, ...]] = (0, "", {}, [], {"type": "x"}, {"x": 1}, int("9" * 600))
"""What lists hold beside what their schema names."""
_LINES: Final = ("A" * 76 + "\n", "A" * 4090 + "\n")
_STRINGS: Final = ("a", " a", "\\", "\u00e9", "[{,", '"', *_LINES)
_PART: Final = {"type": "text", "text": "a"}
_PICTURE: Final = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
_CHAT: Final = {"role": "user", "content": "a"}
_INPUT: Final = {"type": "message", "role": "user", "content": "a"}
_TOOL: Final = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_GOOD: Final[Mapping[str, tuple[object, ...]]] = {
    "messages": (_CHAT, {"role": "user", "content": [_PART]}, {"role": "user", "content": []}),
    "content": (_PART, _PICTURE),
    "input": (_INPUT, {"role": "user", "content": "a"}, {"type": "x", "content": [_PART] * 9}),
    "prompt": ([1], "a", 1),
    "tools": (_TOOL, {"type": "function", "name": "f", "parameters": {}}),
}
"""Elements that the named field really takes, which goes further than what is refused at once."""
_BASE: Final[Mapping[str, object]] = {
    "model": "m",
    "max_tokens": 1,
    "messages": [_CHAT],
    "input": "a",
    "prompt": "a",
}
_INVOKED: Final = ("/v1/chat/completions", "/v1/completions")
_Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Body:
    """One body, by what grows in it."""

    path: str
    place: _Path
    kind: str
    unit: object
    size: int
    base: Mapping[str, object]

    @property
    def field(self) -> str:
        """Where it grows."""
        return ".".join(map(str, self.place))

    @property
    def element(self) -> str:
        """What it grows by."""
        text = json.dumps(self.unit)
        return f"{self.kind} of {text if len(text) < 50 else text[:47] + '...'}"

    def encode(self) -> bytes:
        """Return its bytes."""
        unit = json.dumps(self.unit, separators=(",", ":"))
        if self.kind == "string":
            unit = unit[1:-1]
            grown = '"' + unit * (self.size // len(unit)) + '"'
        elif self.kind == "object":
            count = self.size // (len(unit) + 10)
            grown = "{" + ",".join(f'"{i:06d}":{unit}' for i in range(count)) + "}"
        else:
            grown = "[" + ",".join([unit] * (self.size // (len(unit) + 1))) + "]"
        marked = json.dumps(_with(self.base, self.place, "\0grown"))
        return marked.replace('"\\u0000grown"', grown).encode()


def bodies(openapi: dict[str, Any], sizes: Iterable[int]) -> Iterator[Body]:
    """Yield the bodies for every route that takes JSON; nesting is one more of each route."""
    for path, schema in _schemas(openapi["paths"]):
        fields = dict(_fields(schema, openapi, (), _DEPTH))
        base = {
            name: value for name, value in _BASE.items() if (name,) in fields or name == "model"
        }
        for place, kinds in fields.items():
            for kind, units in sorted(kinds.items()):
                named = _GOOD.get(str(place[-1]), ()) if kind == "list" else ()
                for unit in (*units, *named):
                    yield from (Body(path, place, kind, unit, size, base) for size in sizes)
        for unit in (0, "", {}, []):
            yield from (Body(path, ("unknown",), "list", unit, size, base) for size in sizes)
            yield from (Body(path, ("unknown",), "object", unit, size, base) for size in sizes)


def _schemas(paths: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the routes that take JSON; /invocations takes two others' bodies and says of none."""
    found: dict[str, dict[str, Any]] = {}
    for path, methods in paths.items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if "{" not in path and (schema := content.get("application/json", {}).get("schema")):
            found[path] = schema
    yield from found.items()
    yield from (("/invocations", found[path]) for path in _INVOKED if path in found)


def _fields(
    schema: dict[str, Any], openapi: dict[str, Any], place: _Path, depth: int
) -> Iterator[tuple[_Path, dict[str, tuple[object, ...]]]]:
    """Yield each place of a schema with the kinds it can grow as."""
    found: dict[_Path, dict[str, tuple[object, ...]]] = {}

    def walk(schema: dict[str, Any], place: _Path, depth: int) -> None:
        if "$ref" in schema:
            schema = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        for choice in (
            *schema.get("anyOf", ()),
            *schema.get("oneOf", ()),
            *schema.get("allOf", ()),
        ):
            walk(choice, place, depth)
        kinds = found.setdefault(place, {}) if place else {}
        kind = schema.get("type")
        if kind == "string" and "enum" not in schema and "const" not in schema:
            kinds["string"] = _STRINGS
        elif kind == "array":
            kinds["list"] = _ELEMENTS
            if depth:
                walk(schema.get("items", {}), (*place, 0), depth - 1)
        elif kind == "object":
            if schema.get("additionalProperties"):
                kinds["object"] = (0, "", {}, [])
            if depth:
                for name, inner in schema.get("properties", {}).items():
                    walk(inner, (*place, name), depth - 1)

    walk(schema, place, depth)
    yield from found.items()


def _with(base: object, place: _Path, value: object) -> Any:
    """Return a body with a value at a place, and what has to stand around it."""
    if not place:
        return value
    name, rest = place[0], place[1:]
    if isinstance(name, int):
        return [_with(None, rest, value)]
    fields = dict(base) if isinstance(base, Mapping) else dict(_AROUND.get(name, {}))
    return {**fields, name: _with(None, rest, value)}


_AROUND: Final[Mapping[str | int, dict[str, object]]] = {
    "content": {"role": "user"},
    "text": {"type": "text"},
    "image_url": {"type": "image_url"},
    "url": {},
}
"""What an object must hold beside a field to be taken for what it is."""
