"""EraConfig: every setting of the method, parsed once, refused early, hashed for every cache.

It reaches the processor and every worker through vLLM's own config (``vllm_plugin``), never through
the environment. What is left out: server settings (``server``) and policy options' meaning
(``policies``), which are only carried here.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Final, Literal, cast, get_args

from era_vllm.errors import ConfigError, UnsupportedError, unknown_name
from era_vllm.presets import SETTING, with_preset

OptionValue = bool | int | float | str
Gamma = float | tuple[float, ...] | tuple[tuple[float, ...], ...] | None
"""Exponents of the mass: one for all, one a layer, or [layer][KV head]; None = 1 everywhere."""
DEFAULT_PRUNING_RATE: Final = 0.778
"""576 -> 128 tokens: the mildest budget of the field's LLaVA-1.5 tables."""
LEVELS: Final = (
    *(("off", 0.0), ("light", 0.5), ("medium", DEFAULT_PRUNING_RATE)),
    *(("strong", 0.889), ("extreme", 0.944)),
)
"""Names of rates: all of 576 tokens, 288, and the three budgets of those tables: 128, 64, 32."""
NEEDED_LEVELS: Final = ("off", "strong")
"""What OpenAI's ``detail`` of an image stands for: high and low."""
DEFAULT_POLICY: Final = "dpp"
"""What measured best on the dev split of those that are served without a pass of their own and
refuse nothing (docs/accuracy.md)."""
BiasStoreName = Literal["key_columns", "value_column"]
"""The stores of ``attention/bias_store.py``, named here so that all settings are checked here."""


@dataclass(frozen=True, slots=True)
class EraConfig:
    """Settings of one engine."""

    pruning_rate: float = DEFAULT_PRUNING_RATE
    """Fraction of visual tokens removed where a request names none, [minimum, maximum]."""
    min_pruning_rate: float = 0
    """Lowest rate served, [0, max_pruning_rate]."""
    max_pruning_rate: float = 0.95
    """Highest rate served, [0, 1); 0 leaves the engine stock."""
    levels: tuple[tuple[str, float], ...] = LEVELS
    """Names that a request may use for rates; those out of bounds are refused when asked for."""
    min_anchors: int = 1
    """Floor of tokens kept a segment, >= 1."""
    max_segment: int = 4096
    """Tokens that are pruned together, at most, >= 16: a larger segment is cut into near-square
    blocks, since pruning costs n^2. Source: docs/segments.md."""
    frames_per_segment: int = 1
    """Frames of a video that are pruned together, >= 1, as many of them as ``max_segment`` allows;
    more than 1 only where a video is one run. Source: frame by frame is the reference."""
    policy: str = DEFAULT_POLICY
    """File name in ``era_vllm/policies``, or ``"package.module:Class"``."""
    policy_options: tuple[tuple[str, OptionValue], ...] = ()
    """Options of the policy (its dataclass fields), sorted by name."""
    merge: bool = True
    """Average pruned tokens into their anchors (BTR); False keeps the anchors' own embeddings."""
    bias: bool = True
    """Add the log-bias to the attention scores (LAR)."""
    attention_layer: int | None = None
    """Encoder layer whose attention is read, counted as the model's ``vision_feature_layer`` is
    (hidden states; -2 = output of the layer before the last); None = the layer the features come
    from. Source: ERA Fig. 6 (layer 22 of 24 in CLIP-L)."""
    attention_queries: Literal["all", "cls"] = "all"
    """Queries that the attention of ``era`` is averaged over; policies that read the class token's
    attention do so in any case. Source: reconstructed (docs/method.md, X1)."""
    positions: Literal["original", "compact"] = "original"
    """``original``: anchors and text keep the positions they have unpruned; ``compact``: K tokens
    take K positions. Source: docs/method.md, X11."""
    separators: Literal["rows", "tile_rows", "none"] = "rows"
    """Newlines of a tiled picture that stay where something is pruned: of each row, of each row of
    tiles, or none. Source: reconstructed (docs/method.md, X13)."""
    allow_extrapolation: bool = False
    """With original positions, generate past those that the model was trained on; else an answer
    ends there, as unpruned."""
    bias_store: BiasStoreName = "key_columns"
    """Where a slot's bias is kept."""
    bias_columns: int | None = None
    """Columns of the store; None = 1 for float32 caches, 2 for bf16 and fp8. value_column has 1."""
    gamma: Gamma = None
    """A layer's KV head adds gamma x log_bias to its scores, >= 0; 1 is the paper's LAR."""
    scout: int = 0
    """Layers of the language model that are run on each picture alone, >= 0: policies compare
    tokens by what comes out of them. 0 = none, by the projector's output (docs/scout.md)."""
    scout_prefix: tuple[int, ...] | None = None
    """Token ids that stand before the picture there; None = what the model's chat template writes
    before a picture, worked out where an engine starts."""
    scout_suffix: tuple[int, ...] | None = None
    """Token ids that stand behind a question there; None = what the template writes behind a user's
    text, up to where the answer begins, likewise. Read with ``question_aware``."""
    scout_injection: bool = False
    """Visual tokens come out of each of the scout's layers with the mean of their cluster's states
    there; needs ``scout`` >= 1."""
    question_aware: bool = False
    """What is asked of an item is part of its identity, and says how relevant each of its tokens
    is to a policy that wants to know. Source: docs/question.md."""
    question_reduction: Literal["largest", "mean"] = "largest"
    """How a token's relevance to a question follows from that to each of its words. Source:
    docs/question.md."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        low, high = self.min_pruning_rate, self.max_pruning_rate
        for name in ("pruning_rate", "min_pruning_rate", "max_pruning_rate"):
            _check(_is_number(getattr(self, name)), name, getattr(self, name), "a number in [0, 1)")
        _check(0 <= high < 1, "max_pruning_rate", high, "[0, 1)")
        _check(
            0 <= low <= high, "min_pruning_rate", low, f"[0, {high:.10g}] (up to max_pruning_rate)"
        )
        allowed = f"{self.bounds} (min_pruning_rate and max_pruning_rate set it)"
        _check(low <= self.pruning_rate <= high, "pruning_rate", self.pruning_rate, allowed)
        _check(
            _is_levels(self.levels),
            "levels",
            self.levels,
            "an object of names and rates in [0, 1), with those that an image's detail stands for: "
            "off, which is 0, and strong",
        )
        for name, least in (("min_anchors", 1), ("max_segment", 16), ("frames_per_segment", 1)):
            value = getattr(self, name)
            _check(_is_int(value) and value >= least, name, value, f"an integer >= {least}")
        for name in ("merge", "bias", "allow_extrapolation", "scout_injection", "question_aware"):
            _check(
                isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false"
            )
        _check(isinstance(cast(object, self.policy), str), "policy", self.policy, "a name")
        layer, columns = self.attention_layer, self.bias_columns
        _check(layer is None or _is_int(layer), "attention_layer", layer, "an integer or null")
        _check(
            self.attention_queries in ("all", "cls"),
            "attention_queries",
            self.attention_queries,
            "'all' or 'cls'",
        )
        _check(
            self.positions in ("original", "compact"),
            "positions",
            self.positions,
            "'original' or 'compact'",
        )
        _check(
            self.separators in ("rows", "tile_rows", "none"),
            "separators",
            self.separators,
            "'rows', 'tile_rows' or 'none'",
        )
        _check(
            self.bias_store in get_args(BiasStoreName),
            "bias_store",
            self.bias_store,
            " or ".join(map(repr, get_args(BiasStoreName))),
        )
        _check(
            columns is None or (_is_int(columns) and 1 <= columns <= 4),
            "bias_columns",
            columns,
            "an integer from 1 to 4, or null",
        )
        _check(
            columns in (None, 1) or self.bias_store != "value_column",
            "bias_columns",
            columns,
            "1 or null for value_column, more for key_columns only",
        )
        _check(_is_int(self.scout) and self.scout >= 0, "scout", self.scout, "an integer >= 0")
        for name in ("scout_prefix", "scout_suffix"):
            ids: object = getattr(self, name)
            _check(_is_ids(ids), name, ids, "a list of token ids, integers >= 0, or null")
        _check(
            self.question_reduction in ("largest", "mean"),
            "question_reduction",
            self.question_reduction,
            "'largest' or 'mean'",
        )
        _check(
            _is_gamma(self.gamma),
            "gamma",
            self.gamma,
            "a finite number >= 0, a list of them (one a layer), a list of lists of one length "
            "([layer][KV head]), or null",
        )

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> "EraConfig":
        """Build a config from plain values (JSON, flags); ``preset`` is a name of ``presets.py``.

        A default rate out of the bounds that were given comes to the nearer one; a rate that was
        asked for does not.

        Raises:
            ConfigError: unknown key (with the nearest name), wrong type, value out of range.
        """
        names = {field.name for field in fields(cls)}
        for key in raw:
            if key not in {SETTING, *names}:
                raise ConfigError(unknown_name("era setting", str(key), names))
        values = with_preset(raw)
        values["policy_options"] = _options(values.get("policy_options"))
        values["gamma"] = _frozen(values.get("gamma"))
        for name in ("scout_prefix", "scout_suffix"):
            if isinstance(ids := values.get(name), list):
                values[name] = tuple(map(_plain, cast(list[object], ids)))
        if "levels" in values:
            values["levels"] = _levels(values["levels"])
        if "pruning_rate" not in values:
            rate = DEFAULT_PRUNING_RATE
            for name, nearer in (("min_pruning_rate", max), ("max_pruning_rate", min)):
                if _is_number(bound := values.get(name)):
                    rate = nearer(rate, float(str(bound)))
            values["pruning_rate"] = rate
        return cls(**values)  # type: ignore[arg-type]  # each value is checked in __post_init__

    def as_dict(self) -> dict[str, object]:
        """Return plain JSON values; ``parse`` gives the same config back."""
        gamma = json.loads(json.dumps(self.gamma))  # lists for tuples
        tables: dict[str, object] = {
            "levels": dict(self.levels),
            "policy_options": dict(self.policy_options),
        }
        for name in ("scout_prefix", "scout_suffix"):
            ids = getattr(self, name)
            tables[name] = None if ids is None else list(ids)
        return {**asdict(self), **tables, "gamma": gamma}

    def exponents(self, layers: int, kv_heads: int) -> tuple[tuple[float, ...], ...] | None:
        """Return gamma as [layers][kv_heads] of a language model; None = 1 everywhere.

        Raises:
            ConfigError: gamma has another number of layers or KV heads.
        """
        gamma = self.gamma
        if gamma is None:
            return None
        rows = gamma if isinstance(gamma, tuple) else (gamma,) * layers
        table = tuple(row if isinstance(row, tuple) else (row,) * kv_heads for row in rows)
        if len(table) != layers or len(table[0]) != kv_heads:
            raise ConfigError(
                f"era setting gamma: got {len(table)} layers of {len(table[0])} KV heads; the "
                f"language model has {layers} of {kv_heads}"
            )
        return table

    def fingerprint(self) -> str:
        """Hash of every setting that changes the numbers, for cache keys.

        The rates and their names are left out: each image's effective rate enters its own key, so
        that a default of .778 and a request for .778 or for medium share caches. So is what only
        ends answers.
        """
        return _fingerprint(self)

    @property
    def bounds(self) -> str:
        """The rates that are served, for messages."""
        return f"[{self.min_pruning_rate:.10g}, {self.max_pruning_rate:.10g}]"

    def serves(self, pruning_rate: object) -> bool:
        """Say whether this is a rate within the bounds."""
        if not _is_number(pruning_rate):
            return False
        return self.min_pruning_rate <= cast(float, pruning_rate) <= self.max_pruning_rate

    def check_rate(self, pruning_rate: float) -> float:
        """Return an effective rate of one image, or raise ConfigError with the allowed range."""
        _check(
            self.serves(pruning_rate), "pruning_rate", pruning_rate, f"a number in {self.bounds}"
        )
        return float(pruning_rate) + 0.0  # no -0.0, which would have a hash of its own

    def level(self, pruning_rate: float) -> str | None:
        """Return the name of a rate, None where it has none."""
        return next((name for name, rate in self.levels if rate == pruning_rate), None)

    def num_anchors(self, n: int, pruning_rate: float) -> int:
        """Return K = min(n, max(min_anchors, round(n (1 - pruning_rate)))), halves upwards.

        A billionth is added so that a half stays one: 15 (1 - .9) is 1.4999999999999996 in floats.
        """
        rounded = math.floor(n * (1 - pruning_rate) + 0.5 + 1e-9)
        return min(n, max(self.min_anchors, rounded))


@lru_cache(maxsize=16)  # asked for with every prompt; a table of gamma takes milliseconds
def _fingerprint(config: EraConfig) -> str:
    values = config.as_dict()
    rates = ("pruning_rate", "min_pruning_rate", "max_pruning_rate", "levels")
    for name in (*rates, "allow_extrapolation"):
        del values[name]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def encoder_layer(asked: int | None, feature_layer: int | Sequence[int], layers: int) -> int:
    """Return which encoder layer's attention is read, counted from 1.

    Args:
        asked: ``EraConfig.attention_layer``; None = where the features come from.
        feature_layer: The model's ``vision_feature_layer``, or several; later ones do not run.
        layers: All layers of the encoder.

    Raises:
        UnsupportedError: the features do not come through that layer.
    """

    def from_1(layer: int) -> int:
        return layer if layer >= 0 else layers + 1 + layer

    several = (feature_layer,) if isinstance(feature_layer, int) else feature_layer
    last = max(map(from_1, several))
    index = last if asked is None else from_1(asked)
    if not 1 <= index <= last:
        raise UnsupportedError(
            f"attention_layer: got {asked}, allowed: 1 to {last} or {-layers} to "
            f"{last - layers - 1} (layers that the features come through)"
        )
    return index


def _options(raw: object) -> tuple[tuple[str, OptionValue], ...]:
    if raw is None:
        return ()
    if not isinstance(raw, Mapping):
        raise ConfigError(_refusal("policy_options", raw, "an object of option names and values"))
    options: list[tuple[str, OptionValue]] = []
    for name, value in cast(Mapping[object, object], raw).items():
        _check(isinstance(name, str), "policy_options", name, "names that are strings")
        if not (isinstance(value, bool | str) or _is_number(value)):
            allowed = "a boolean, finite number or string"
            raise ConfigError(_refusal(f"policy_options.{name}", value, allowed))
        options.append((str(name), cast(OptionValue, _plain(value))))
    return tuple(sorted(options))


def _levels(raw: object) -> object:
    """Return pairs of names and rates, lowest first; what is no object stays, to be refused."""
    if not isinstance(raw, Mapping):
        return raw
    pairs = [(name, _plain(rate)) for name, rate in cast(Mapping[object, object], raw).items()]
    if not all(_is_number(rate) for _, rate in pairs):
        return tuple(pairs)
    return tuple(sorted(pairs, key=lambda pair: (cast(float, pair[1]), str(pair[0]))))


def _is_levels(value: object) -> bool:
    if not isinstance(value, tuple):
        return False
    pairs = cast(tuple[object, ...], value)
    if not all(map(_is_level, pairs)):
        return False
    table = dict(cast(tuple[tuple[str, float], ...], pairs))
    return all(name in table for name in NEEDED_LEVELS) and table["off"] == 0


def _is_level(value: object) -> bool:
    if not isinstance(value, tuple) or len(pair := cast(tuple[object, ...], value)) != 2:
        return False
    name, rate = pair
    return isinstance(name, str) and bool(name) and _is_number(rate) and 0 <= cast(float, rate) < 1


def _frozen(raw: object) -> object:
    """Return nested tuples of floats for lists of numbers; what is neither stays, to be refused."""
    if isinstance(raw, list | tuple):
        return tuple(map(_frozen, cast(list[object] | tuple[object, ...], raw)))
    return float(cast(float, raw)) if _is_number(raw) else raw


def _is_ids(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, tuple):
        return False
    ids = cast(tuple[object, ...], value)
    return all(_is_int(one) and cast(int, one) >= 0 for one in ids)


def _is_gamma(value: object) -> bool:
    if value is None or _is_exponent(value):
        return True
    if not isinstance(value, tuple) or not value:
        return False
    rows = cast(tuple[object, ...], value)
    if all(map(_is_exponent, rows)):
        return True
    heads = {len(cast(tuple[object, ...], row)) for row in rows if isinstance(row, tuple)}
    return len(heads) == 1 and 0 not in heads and all(map(_is_row, rows))


def _is_row(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_exponent, cast(tuple[object, ...], value)))


def _is_exponent(value: object) -> bool:
    return _is_number(value) and cast(float, value) >= 0


def _check(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(_refusal(name, got, allowed))


def _refusal(name: str, got: object, allowed: str) -> str:
    return f"era setting {name}: got {got!r}, allowed: {allowed}"


def _is_number(value: object) -> bool:
    return _is_int(value) or (
        not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    )


def _is_int(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _plain(value: object) -> object:
    """Return an int or float for another library's number, which JSON does not know."""
    if not _is_number(value):
        return value
    return int(cast(int, value)) if _is_int(value) else float(cast(float, value))
