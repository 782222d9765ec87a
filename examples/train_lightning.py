"""PyTorch Lightning: LLQR in `configure_optimizers`, and a callback that refreshes M.

Run `python examples/train_lightning.py`; it needs `pip install lightning`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import llqr_mf as lq


class Refresh(L.Callback):
    """Calls `refresh` before the batches for which it is due."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch is (inputs, targets), on the device already."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, lq.LLQR) and optimizer.refresh_due:
                optimizer.refresh(*batch)


class Digits(L.LightningModule):
    """A classifier of 8 x 8 images; Lightning as always, but for the line that wraps AdamW."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))
        self.steps = steps
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, wrapped, with a schedule."""
        base = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        optimizer = lq.LLQR(self.net, base, loss="cross_entropy", refresh_every=50)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains and prints; returns the losses and the optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed")
    parser.add_argument("--resume", help="a Lightning checkpoint to go on from")
    parser.add_argument("--save", help="where to put one at the end")
    options = parser.parse_args(arguments)

    L.seed_everything(0, verbose=False)
    data = load_digits()
    x, y = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)
    loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)
    module = Digits(options.width, options.steps)
    trainer = L.Trainer(
        accelerator="auto",
        precision=options.precision,
        max_steps=options.steps,
        callbacks=[Refresh()],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=options.resume)
    if options.save:
        trainer.save_checkpoint(options.save)
    (optimizer,) = trainer.optimizers
    print(f"loss {module.losses[0]:.4f} to {module.losses[-1]:.4f}; {optimizer.counts}")
    return {"losses": module.losses, "optimizer": optimizer}


if __name__ == "__main__":
    main()
