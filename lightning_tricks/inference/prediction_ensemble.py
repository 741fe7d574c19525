"""Several checkpoints that predict together."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call

from lightning_tricks.engines import Stored, engine_of
from lightning_tricks.errors import CheckpointError, DataError, MisconfigurationError, UnsupportedError
from lightning_tricks.inference._class_scores import ClassScores
from lightning_tricks.inference._members import checked_paths, open_members

__all__ = ["PredictionEnsemble"]

Forward = Callable[[Any, Any], Tensor]
_TARGETS = ("labels", "label", "targets", "target", "y")


class PredictionEnsemble(LightningModule):
    """Predicts the mean of what several checkpoints predict: of runs, seeds or folds that share their labels.

    Give it to `trainer.predict`, which gets probabilities of shape (batch, classes), or to `trainer.validate` and
    `trainer.test`, which log `<stage>/loss` (negative log-likelihood), `accuracy`, `macro_f1` and `calibration_error`,
    exactly over ranks. It cannot be trained.

    Args:
        members: checkpoints of any engine, of one architecture.
        module: the LightningModule that they are of, built on their base if they hold adapters; or its class, which
            is then built with the first member's hyper-parameters.
        mean: of the members' `probabilities`, or of their `logits` before the softmax.
        loading: `lazy` reads one member after another for every batch and keeps one in memory; `stacked` computes all
            of them at once and keeps in memory, for each, what its checkpoint holds; `auto` takes `stacked` on a GPU
            where that fits into half of the free memory, else `lazy`.
        forward: called with the module and a batch, gives logits of shape (batch, classes). By default the module is
            called with the batch, or the first entry of one that is a tuple or list.
        ignore: hyper-parameters, such as `name`, that may differ.

    Raises:
        CheckpointError: naming the file and what differs, for members with other weights, labels, tokenizer or base.
        MisconfigurationError: for an option out of range.
        UnsupportedError: on engines other than one device and DDP, once it runs.

    Example:
        >>> import tempfile
        >>> import lightning as L
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 3)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> paths = [Path(tempfile.mkdtemp()) / f"{seed}.ckpt" for seed in range(2)]
        >>> for path in paths:
        ...     torch.save({"state_dict": Net().state_dict()}, path)
        >>> PredictionEnsemble(paths, Net)(torch.ones(5, 2)).shape
        torch.Size([5, 3])

    References:
        Lakshminarayanan et al.: Simple and scalable predictive uncertainty estimation using deep ensembles (2017).
    """

    def __init__(
        self,
        members: Sequence[str | Path],
        module: LightningModule | type[LightningModule],
        *,
        mean: Literal["probabilities", "logits"] = "probabilities",
        loading: Literal["auto", "lazy", "stacked"] = "auto",
        forward: Forward | None = None,
        ignore: Collection[str] = (),
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("mean", mean, ("probabilities", "logits")),
            ("loading", loading, ("auto", "lazy", "stacked")),
        ):
            if value not in known:
                raise MisconfigurationError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        self.mean, self.loading = mean, loading
        self.members, _ = open_members(checked_paths(members), lambda member: member, ignore=ignore)
        built = module(**_options(self.members[0])) if isinstance(module, type) else module
        self._caller = _Caller(built, forward or _call)
        self._scores: ClassScores | None = None
        self._held: int | None = None  # the member that the module holds
        self._stack: dict[str, Tensor] = {}
        self._hold(0)  # which also finds out now whether members and module go together
        self.eval()

    def setup(self, stage: str) -> None:
        """Refuse engines that cut the module up."""
        engine = engine_of(self.trainer).name
        if engine not in ("one_device", "ddp"):
            reason, instead = "its members are loaded whole", "predict on one device or with `ddp`"
            raise UnsupportedError("PredictionEnsemble", engine, reason, instead)

    @torch.no_grad()
    def forward(self, batch: Any) -> Tensor:
        """The mean probabilities, fp32, (batch, classes)."""
        logits = self._stacked(batch) if self._stacks() else self._one_by_one(batch)
        return (logits.softmax(-1).mean(0) if self.mean == "probabilities" else logits.mean(0).softmax(-1)).contiguous()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean probabilities, fp32, (batch, classes)."""
        return self(batch)  # type: ignore[no-any-return]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch in."""
        self._measure(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch in."""
        self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log("test")

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        self._log("val")

    # -- members -------------------------------------------------------------------------------------------------------

    def _one_by_one(self, batch: Any) -> Tensor:
        """Logits, (members, batch, classes); from the last member back for every other batch, to read one less."""
        order = list(range(len(self.members)))
        found: dict[int, Tensor] = {}
        for place in reversed(order) if self._held == order[-1] else order:
            self._hold(place)
            found[place] = self._caller(batch).float()
        return torch.stack([found[place] for place in order])

    def _stacked(self, batch: Any) -> Tensor:
        """The same, all at once: what the checkpoints hold differs between members, the rest is shared."""
        if not self._stack:
            self._stack = self._stack_members()

        def one(state: dict[str, Tensor]) -> Tensor:
            return functional_call(self._caller, state, (batch,))  # type: ignore[no-any-return]

        try:
            return torch.vmap(one)(self._stack).float()
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise MisconfigurationError(
                f"{type(self._caller.module).__name__} cannot be computed for all members at once ({error}): pass"
                " loading='lazy'."
            ) from error

    def _stack_members(self) -> dict[str, Tensor]:
        known = {**dict(self._caller.module.named_parameters()), **dict(self._caller.module.named_buffers())}
        return {  # in the module's own dtype, to which a member that is loaded alone is cast as well
            f"module.{name}": torch.stack([member.tensor(name) for member in self.members]).to(
                self.device, known[name].dtype
            )
            for name in self.members[0].weights
            if name in known
        }

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """Let go of what was read: it is read again where, and in which dtype, the module is then."""
        self._stack, self._held = {}, None
        return super()._apply(*arguments, **options)  # type: ignore[no-any-return, no-untyped-call]

    def _stacks(self) -> bool:
        if self.loading != "auto":
            return self.loading == "stacked"
        if self.device.type != "cuda" or self._stack:
            return bool(self._stack)
        needed = sum(whole.nbytes() for member in self.members for whole in member.weights.values())
        return needed < torch.cuda.mem_get_info(self.device)[0] // 2

    def _hold(self, place: int) -> None:
        """Let the module hold a member's weights."""
        if self._held == place:
            return
        member, module = self.members[place], self._caller.module
        state = {name: member.tensor(name) for name in member.weights}
        module.on_load_checkpoint({**member.rest, "state_dict": state})
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{member.path} does not fit {type(module).__name__}: {error}") from error
        self._held = place

    # -- scores --------------------------------------------------------------------------------------------------------

    def _measure(self, batch: Any) -> None:
        probabilities, targets = self(batch), _targets(batch)
        if self._scores is None:
            self._scores = ClassScores(probabilities.shape[-1]).to(self.device)
        self._scores.update(probabilities, targets)

    def _log(self, stage: str) -> None:
        if self._scores is None:
            raise DataError(f"there was no batch to {stage} on: pass a dataloader that has some.")
        for name, value in self._scores.compute().items():  # the same on every rank, and so is their mean
            self.log(f"{stage}/{name}", value, sync_dist=True)
        self._scores = None


class _Caller(nn.Module):
    """The module, called with a batch."""

    module: LightningModule

    def __init__(self, module: LightningModule, forward: Forward) -> None:
        super().__init__()
        self.module = module
        self._forward = forward

    def forward(self, batch: Any) -> Tensor:
        """Logits, (batch, classes)."""
        return self._forward(self.module, batch)


def _call(module: LightningModule, batch: Any) -> Tensor:
    return module(batch[0] if isinstance(batch, tuple | list) else batch)  # type: ignore[no-any-return]


def _targets(batch: Any) -> Tensor:
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[1]  # type: ignore[no-any-return]
    for name in _TARGETS:
        if isinstance(batch, dict) and name in batch:
            return batch[name]  # type: ignore[no-any-return]
    raise DataError(
        f"a batch of type {type(batch).__name__} says no targets to score by: give pairs of inputs and targets, or a"
        f" dictionary with one of {', '.join(_TARGETS)}."
    )


def _options(member: Stored) -> dict[str, Any]:
    """The module's hyper-parameters, without what LightningCLI adds."""
    found = member.rest.get("hyper_parameters") or {}
    return {str(name): value for name, value in found.items() if not str(name).startswith("_")}
