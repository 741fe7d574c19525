"""Where a mixin must stand among the base classes."""

from lightning.pytorch import LightningModule

from lightning_tricks.errors import MisconfigurationError

__all__ = ["require_before_lightning_module"]


def require_before_lightning_module(cls: type, mixin: type) -> None:
    """Refuse a class in which the mixin's hooks would never be called.

    Raises:
        MisconfigurationError: if `cls` names LightningModule before `mixin`, or is a pytorch_lightning module.
    """
    order = cls.__mro__
    if LightningModule in order and order.index(LightningModule) < order.index(mixin):
        raise MisconfigurationError(
            f"{cls.__name__} names LightningModule before {mixin.__name__}, whose hooks would not be called: write "
            f"`class {cls.__name__}({mixin.__name__}, LightningModule)`."
        )
    if any(base.__module__.startswith("pytorch_lightning.") for base in order):
        raise MisconfigurationError(
            f"{cls.__name__} is a pytorch_lightning module; lightning_tricks needs lightning.pytorch: "
            "`from lightning import LightningModule`."
        )
