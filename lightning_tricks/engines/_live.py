"""What an engine holds and computes in at this moment, read from its tensors: what all engines share."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_tricks.engines._facts import Bytes, Ledger, Memory, Precisions, by_elements, short
from lightning_tricks.engines._weights import WeightsEngine
from lightning_tricks.errors import MisconfigurationError

__all__ = ["Held", "LiveEngine", "elements", "states_of"]

_HOOKS = {"fp16_compress_hook": torch.float16, "bf16_compress_hook": torch.bfloat16}


class Held(NamedTuple):
    """The tensors of one rank, by what they are for; a storage in several counts for the first."""

    parameters: Iterable[Tensor]
    masters: Iterable[Tensor]
    gradients: Iterable[Tensor]
    optimizer: Iterable[Tensor]
    buffers: Iterable[Tensor]
    engine: Mapping[str, Iterable[Tensor]]


class LiveEngine(WeightsEngine):
    """The part of the `Engine` protocol that reports. A subclass says what it holds beyond this, or otherwise."""

    def memory(self) -> Memory:
        """What this rank has allocated."""
        self._refuse_without_a_run()
        held, ledger = self._held(), Ledger(self._device)
        parameters, masters = ledger.count(held.parameters), ledger.count(held.masters)
        gradients, optimizer = ledger.count(held.gradients), ledger.count(held.optimizer)
        buffers = ledger.count(held.buffers)
        engine = {name: ledger.count(tensors) for name, tensors in held.engine.items()} | self._uncounted()
        return Memory(
            parameters,
            masters,
            gradients if gradients.total else None,
            optimizer if optimizer.total else None,
            buffers,
            {name: size for name, size in engine.items() if size.total},
        )

    def precision(self) -> Precisions:
        """The dtypes in force."""
        self._refuse_without_a_run()
        parameters = list(self._module.parameters())
        return Precisions(
            by_elements((parameter.dtype, elements(parameter)) for parameter in parameters),
            by_elements((master.dtype, master.numel()) for master in self._masters()),
            by_elements((self._product(dtype), count) for dtype, count in self._computed()),
            self._reduction() if self.world_size > 1 else (),
            "; ".join([*_casts(self._trainer), *self._input_casts()]) or "left as it is",
        )

    def _refuse_without_a_run(self) -> None:
        strategy = self._trainer.strategy
        ready = strategy.optimizers or self._trainer.state.fn != TrainerFn.FITTING
        if strategy.lightning_module is None or not ready or not self._is_set_up():
            raise MisconfigurationError(
                f"The engine {self.name} does not exist yet, so there is nothing to report: ask in `on_fit_start` or"
                " later, or after `fit`."
            )

    def _product(self, dtype: torch.dtype) -> torch.dtype:
        """What a matrix product comes out as where the module's forward runs."""
        one = torch.ones(1, 1, dtype=dtype, device=self._device)
        with torch.no_grad(), self._trainer.precision_plugin.forward_context():
            return torch.nn.functional.linear(one, one).dtype

    # -- what a subclass says ----------------------------------------------------------------------------------

    def _is_set_up(self) -> bool:
        return True

    def _held(self) -> Held:
        parameters = list(self._module.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = states_of(self._trainer.optimizers)
        return Held(parameters, self._masters(), gradients, states, self._module.buffers(), {})

    def _uncounted(self) -> dict[str, Bytes]:
        """What the engine allocates out of Python's reach: DDP's buckets, unless the gradients are views of them."""
        facts = self._reducer_facts()
        if not facts or facts.get("gradient_as_bucket_view"):
            return {}
        sizes = facts.get("rebuilt_bucket_sizes") or facts["bucket_sizes"]
        return {"buckets": Bytes(sum(int(each) for each in sizes.split(",")))}

    def _masters(self) -> list[Tensor]:
        return []

    def _computed(self) -> Iterator[tuple[torch.dtype, int]]:
        """The dtype of each parameter when the forward pass uses it, and its elements."""
        mixed = getattr(self._trainer.strategy.model, "mixed_precision", None)
        low = getattr(mixed, "param_dtype", None)
        for parameter in self._module.parameters():
            yield low or parameter.dtype, parameter.numel()

    def _reduction(self) -> tuple[torch.dtype, ...] | None:
        facts = self._reducer_facts()
        if not facts:
            return ()
        if (hook := facts.get("comm_hook", "allreduce_hook")) not in ("allreduce_hook", *_HOOKS):
            return None
        trained = by_elements((p.dtype, p.numel()) for p in self._module.parameters() if p.requires_grad)
        mixed = getattr(self._trainer.strategy.model, "mixed_precision", None)
        low = _HOOKS.get(hook) or getattr(mixed, "reduce_dtype", None)
        return trained if low is None else (low,)

    def _input_casts(self) -> list[str]:
        return []

    def _reducer_facts(self) -> dict[str, Any]:
        read = getattr(self._trainer.strategy.model, "_get_ddp_logging_data", None)
        facts: dict[str, Any] = read() if read is not None else {}
        return facts


def states_of(optimizers: Iterable[Any]) -> list[Tensor]:
    """The tensors of the optimizers' states."""
    entries = [entry for optimizer in optimizers for entry in optimizer.state.values()]
    return [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]


def elements(parameter: Any) -> int:
    """How many elements the whole parameter has, where ZeRO-3 has cut it as well."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _casts(trainer: Trainer) -> list[str]:
    """What Lightning does with a batch before a step: the precision plugin is given one, and tells."""
    given = [torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    got = [tensor.dtype for tensor in trainer.precision_plugin.convert_input(given)]
    changed = {old.dtype: new for old, new in zip(given, got, strict=True) if old.dtype != new}
    if len(changed) == 2:
        return [f"its float tensors become {short(got[0])}, targets included"]
    return [f"its {short(old)} tensors become {short(new)}, targets included" for old, new in changed.items()]
