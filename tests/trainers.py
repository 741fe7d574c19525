"""A quiet Trainer on the CPU."""

import lightning as L


def quiet_trainer(folder, callbacks=(), *, max_epochs=3, **options):
    """One that writes nothing but what its callbacks do, to `folder`."""
    return L.Trainer(
        **options,
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )
