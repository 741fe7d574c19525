"""DeepSpeed's reader and writer of swapped tensors in Python, for machines without libaio: everything else is real."""

from pathlib import Path
from types import SimpleNamespace

import numpy
import torch

PINNED: set[int] = set()  # storages


class Handle:
    """What DeepSpeed's compiled `aio_handle` offers to its swapping code, each operation done at once."""

    def __init__(self, **options) -> None:
        self._done = 0

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        content = numpy.fromfile(path, dtype=numpy.uint8, count=_bytes(buffer).numel(), offset=offset)
        _bytes(buffer).copy_(torch.from_numpy(content))
        self._done += 1
        return 0

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        assert offset == 0
        Path(path).write_bytes(_bytes(buffer).numpy().tobytes())
        self._done += 1
        return 0

    def wait(self) -> int:
        done, self._done = self._done, 0
        return done

    def new_cpu_locked_tensor(self, elements: int, like: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(elements, dtype=like.dtype)
        PINNED.add(buffer.untyped_storage().data_ptr())
        return buffer

    def free_cpu_locked_tensor(self, buffer: torch.Tensor) -> bool:
        PINNED.discard(buffer.untyped_storage().data_ptr())
        return True

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        return buffer.untyped_storage().data_ptr() in PINNED


def _bytes(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.detach().view(torch.uint8)


def install() -> None:
    """Make it what DeepSpeed loads, in this process."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.builder import OpBuilder

    installed_ops["async_io"] = True
    OpBuilder._loaded_ops |= {"async_io": SimpleNamespace(aio_handle=Handle), "pin_memory": SimpleNamespace()}
