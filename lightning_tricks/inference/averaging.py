"""One checkpoint that is the weighted mean of several."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_tricks.engines import Stored, average_stored, open_checkpoint, write_checkpoint
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.inference._adapters import AdapterMerger
from lightning_tricks.inference._members import checked_paths, open_members
from lightning_tricks.inference._statistics import (
    checked_source,
    running_statistics,
    statistics_names,
    warn_of_averaged_statistics,
)
from lightning_tricks.storage._atomic import partial_name

__all__ = ["Averaged", "average_checkpoints", "average_members", "checked_out"]


@dataclass(frozen=True)
class Averaged:
    """What `average_checkpoints` did.

    Attributes:
        path: the file that it wrote.
        members: the checkpoints that are in the mean, in the order given.
        skipped: those left out by `skip_bad`, and why.
    """

    path: Path
    members: tuple[Path, ...]
    skipped: Mapping[Path, str]


def average_checkpoints(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    skip_bad: bool = False,
    ignore: Collection[str] = (),
    module: nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    batches: int = 100,
) -> Averaged:
    """Average the weights of checkpoints of any engine, of one run or of several, into one file.

    Sums are taken in fp32 (fp64 for more than 64 members) and written in the members' dtype. Integer and boolean
    buffers come from the newest member, the one of most steps, and so do the hyper-parameters. Running statistics of
    normalisations are averaged with a warning, or computed anew with `module` and `loader`. Adapters of LoRAMixin are
    merged into their base first, since the mean of A and of B apart is not the mean of BA: the result loads into the
    same module, with adapters that add nothing. Checkpoints that hold running averages of weights (Lightning's
    WeightAveraging) give those, and do not mix with others.

    Each member is read once, a tensor at a time: memory does not grow with their number. `out` appears when it is
    complete; the members are never written to.

    Args:
        paths: checkpoint files, ZeRO or FSDP2 folders, safetensors files.
        out: the `.ckpt` file, which `load_from_checkpoint` reads, or `.safetensors` file to write.
        weights: one number of 0 or more for each path, not all 0; None weighs all alike. A member of weight 0 is
            checked like the others, and not read.
        skip_bad: leave out members that are damaged or do not match the first good one, instead of refusing them.
        ignore: hyper-parameters, such as `labels` or `tokenizer`, that may differ.
        module: built as the members were trained, on their base: to merge adapters, and for `loader`. It is not
            changed.
        loader: training batches, as the module's `forward` takes them; of tuples and lists, the first entry.
        batches: the most batches to take, 1 or more.

    Returns:
        The members, and what was skipped.

    Raises:
        MisconfigurationError: for an option out of range, or an `out` that is a member or of another suffix.
        CheckpointError: naming the file and its first offending entry, if a member is absent, truncated, or differs
            from the first one in a name, shape, dtype, label set, tokenizer or base; or the disk refuses `out`.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> for value in (1.0, 4.0):
        ...     torch.save({"state_dict": {"w": torch.tensor([value])}}, folder / f"{value:g}.ckpt")
        >>> _ = average_checkpoints([folder / "1.ckpt", folder / "4.ckpt"], folder / "mean.ckpt")
        >>> torch.load(folder / "mean.ckpt", weights_only=True)["state_dict"]
        {'w': tensor([2.5000])}

    References:
        Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models (ICML 2022).
    """
    chosen, out = checked_paths(paths), checked_out(out, paths)
    given = dict(enumerate(_checked_weights(weights, len(chosen))))
    checked_source(module, loader, batches)
    members, skipped = open_members(chosen, AdapterMerger(module), ignore=ignore, skip_bad=skip_bad)
    left = [given[place] for place, path in enumerate(chosen) if path not in skipped]
    if sum(left) <= 0:
        raise MisconfigurationError(f"the `weights` of the members that are left sum to 0: {left}. Raise one.")
    used = [(member, weight) for member, weight in zip(members, left, strict=True) if weight > 0]
    members, shares = [member for member, _ in used], [weight for _, weight in used]
    average_members(members, shares, out, module=module, loader=loader, batches=batches)
    return Averaged(out, tuple(member.path for member in members), skipped)


def average_members(
    members: Sequence[Stored],
    weights: Sequence[float],
    out: Path,
    *,
    module: nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    batches: int = 100,
) -> None:
    """Write the mean of open members that go together. See `average_checkpoints`."""
    names = statistics_names(members[0])
    record = {"average": [{"file": m.path.name, "weight": float(w)} for m, w in zip(members, weights, strict=True)]}
    if not names or loader is None or module is None:
        if names and len(members) > 1:
            warn_of_averaged_statistics(names[0])
        average_stored(members, weights, out, record)
        return
    raw = partial_name(out).with_suffix(f".raw{out.suffix}")
    try:
        average_stored(members, weights, raw, record)
        _with_statistics(open_checkpoint(raw), out, module, loader, batches)
    finally:
        raw.unlink(missing_ok=True)


def _with_statistics(raw: Stored, out: Path, module: nn.Module, loader: Iterable[Any], batches: int) -> None:
    found = running_statistics(module, raw, loader, batches)

    def entries() -> Iterator[tuple[str, Tensor]]:
        for name, (dtype, _) in raw.layout.items():
            yield name, found[name].to(dtype) if name in found else raw.tensor(name)

    write_checkpoint(out, raw.layout, entries(), raw.rest)


def checked_out(out: str | Path, paths: Sequence[str | Path]) -> Path:
    """The path to write to: a new file, or one that may be replaced."""
    out = Path(out)
    if out.suffix not in (".ckpt", ".safetensors") or out.is_dir():
        raise MisconfigurationError(f"`out` must be the name of a .ckpt or .safetensors file, got {str(out)!r}.")
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in paths):
        raise MisconfigurationError(f"`out` is one of the members, {out}: give the new file another name.")
    return out


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    found = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(found) != count:
        raise MisconfigurationError(f"`weights` has {len(found)} entries for {count} checkpoints: one for each.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in found) or sum(found) <= 0:
        raise MisconfigurationError(f"`weights` must be 0 or more, finite, and not all 0, got {found}.")
    return found
