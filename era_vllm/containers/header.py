"""What the header of a video says, in whatever container it stands."""

from dataclasses import dataclass, field
from typing import Final

from era_vllm.decoder_process import RefusedError

_PARTS: Final = 2**18
"""Of a header: ten minutes of 60 frames and 50 sounds a second, each in a group of its own, are
130,000. A second of reading at most."""


@dataclass(slots=True)
class Track:
    """A stream of pictures in a file."""

    codec: str = "none"
    width: int = 0
    height: int = 0
    frames: int = 0
    """0 = the header does not say."""
    seconds: float = 0.0
    number: int = 0
    shows: bool = False
    """It is no sound."""


@dataclass(slots=True)
class Header:
    """What a file says of itself."""

    container: str
    tracks: list[Track] = field(default_factory=list)
    seconds: float = 0.0
    parts: int = 0

    def count(self) -> None:
        """Count a part.

        Raises:
            RefusedError: there are too many.
        """
        self.parts += 1
        if self.parts > _PARTS:
            raise RefusedError(f"its {self.container} has more parts than the {_PARTS} allowed")
