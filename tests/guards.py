"""Watch what a function does to tensors: read values on the host, or launch more operations."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS: Final = {
    *("item", "tolist", "numpy", "cpu", "is_nonzero", "__bool__", "__int__", "__float__"),
    *("__index__", "__contains__", "__array__", "nonzero", "argwhere", "equal", "allclose"),
    *("unique", "unique_consecutive", "masked_select", "bincount"),
}
"""Python calls on a tensor whose answer waits for the device."""
DATA_DEPENDENT: Final = {
    *("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"),
    *("unique_dim", "unique_consecutive", "bincount"),
}
"""Operations inside torch whose answer waits for the device."""


class HostRead(AssertionError):
    """A tensor's value was needed on the host."""


class _NoHostCalls(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in HOST_READS:
            raise HostRead(name)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, refuse: bool) -> None:
        super().__init__()
        self.refuse, self.count = refuse, 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.count += 1
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        if self.refuse and (name in DATA_DEPENDENT or masks or counted):
            raise HostRead(name)
        return func(*args, **(kwargs or {}))


def without_host_reads(run: Callable[[], object]) -> None:
    """Run; raise HostRead where a value of a tensor is needed on the host."""
    with _NoHostCalls(), _Operations(refuse=True):
        run()


def operations(run: Callable[[], object]) -> int:
    """Run and return how many torch operations were launched."""
    with _Operations(refuse=False) as mode:
        run()
    return mode.count
