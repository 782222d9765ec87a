"""A plain training loop with a schedule and clipping: AdamW on handwritten digits, with M.

What LLQR changes is marked. `--structure identity` is AdamW itself, bit for bit.

Run `python examples/train_plain.py --steps 300`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR

import llqr_mf as lq


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 64) and labels of scikit-learn: 1,500 to train on and 297 to test with."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1500], y[:1500], x[1500:], y[1500:]


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and prints; returns the last training loss and the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--structure", default="ekronecker")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model = nn.Sequential(
        *(nn.Linear(64, options.width), nn.GELU()),
        *(nn.Linear(options.width, options.width), nn.GELU()),
        nn.Linear(options.width, 10),
    )
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    # LLQR, the first line: the base optimizer is wrapped, and what follows sees no difference.
    optimizer = lq.LLQR(model, optimizer, loss="cross_entropy", structure=options.structure)
    print(optimizer.coverage)
    schedule = OneCycleLR(optimizer, max_lr=options.lr, total_steps=options.steps)
    loss = torch.tensor(float("nan"))
    for step in range(options.steps):
        rows = torch.randint(len(x), (options.batch,))
        # LLQR, the second line: M is learned anew when that is due.
        if optimizer.refresh_due:
            optimizer.refresh(x[rows], y[rows])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(f"test accuracy {accuracy:.3f}; {optimizer.counts}")
    return {"loss": loss.item(), "accuracy": accuracy}


if __name__ == "__main__":
    main()
