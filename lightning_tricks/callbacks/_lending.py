"""Let a module hold averaged weights for a while, and give its own back, bit for bit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_tricks.engines import Engine

__all__ = ["Lender"]

Shards = dict[str, Tensor]
Buffers = list[tuple[Tensor, Tensor]]  # pairs of a buffer and what it holds or is to hold


class Lender:
    """Exchanges the weights that are trained and others, and knows which of them the module holds.

    Args:
        engine: the engine that trains.
        offload: whether what is set aside lies in the host's memory.
    """

    def __init__(self, engine: Engine, offload: bool = False) -> None:
        self._engine = engine
        self._offload = offload
        self._own: tuple[Shards, Buffers] | None = None  # while others are in the module

    @property
    def lent(self) -> bool:
        """Whether the module holds other weights than its own."""
        return self._own is not None

    @contextmanager
    def lend(self, values: Callable[[], Shards], buffers: Callable[[], Buffers]) -> Iterator[None]:
        """Let the module hold these within the block. Collective.

        After an exception only what needs no other rank is put back: the others may be waiting elsewhere, and to wait
        for them here would turn a crash into a hang.

        Args:
            values: gives the shards to hold.
            buffers: gives what buffers are to hold; called when the shards are in place.
        """
        try:
            self.hand_over(values, buffers)
            yield
            self.take_back()
        except BaseException:
            self.take_back_alone()
            raise

    @contextmanager
    def own(self) -> Iterator[None]:
        """Let the module hold its own within the block, and afterwards what it held before. Collective."""
        if self._own is None:
            yield
            return
        held = self._copies(), [(buffer, buffer.clone()) for buffer, _ in self._own[1]]
        own = self._own
        self.take_back()
        try:
            yield
            self._put(*held)
            self._own = own
        except BaseException:
            if self._engine.put_shards_alone(held[0]):
                _copy(held[1])
                self._own = own
            raise

    def hand_over(self, values: Callable[[], Shards], buffers: Callable[[], Buffers]) -> None:
        """As `lend`, without an end. Collective."""
        if self._own is not None:
            raise RuntimeError("the module holds other weights already")
        own: Buffers = []
        self._own = self._copies(), own
        self._engine.put_shards(values())
        found = buffers()
        own.extend((buffer, buffer.clone()) for buffer, _ in found)
        _copy(found)

    def take_back(self) -> None:
        """Put the module's own weights back, if it holds others. Collective."""
        if self._own is not None:
            self._put(*self._own)
            self._own = None

    def take_back_alone(self) -> None:
        """As `take_back`, after an exception: communicates nothing, and does what can be done so."""
        if self._own is not None:
            shards, buffers = self._own
            if self._engine.put_shards_alone(shards):
                _copy(buffers)
                self._own = None

    def forget(self) -> None:
        """Let the module keep what it holds."""
        self._own = None

    def _put(self, shards: Mapping[str, Tensor], buffers: Buffers) -> None:
        self._engine.put_shards(shards)
        _copy(buffers)

    def _copies(self) -> Shards:
        shards = {shard.name: shard.values for shard in self._engine.named_shards()}
        return {
            name: values.to("cpu" if self._offload else values.device, copy=True) for name, values in shards.items()
        }


def _copy(buffers: Buffers) -> None:
    with torch.no_grad():
        for buffer, values in buffers:
            buffer.copy_(values)
