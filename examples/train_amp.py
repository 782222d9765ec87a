"""Mixed precision: autocast and a gradient scaler around a model that LLQR trains.

M is learned from the model in its own precision (`refresh` turns autocast off); the gradients that
it multiplies are those of the mixed-precision backward pass, unscaled.

Run `python examples/train_amp.py --dtype float16`; on a GPU add `--device cuda`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import clip_grad_norm_

import llqr_mf as lq


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and prints; returns the last loss, the training accuracy and the scale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device, dtype = options.device, getattr(torch, options.dtype)
    data = load_digits()
    x = (torch.from_numpy(data.data).float() / 16).reshape(-1, 1, 8, 8).to(device)
    y = torch.from_numpy(data.target).to(device)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    ).to(device)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    optimizer = lq.LLQR(model, base, loss="cross_entropy", refresh_every=50)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.steps)
    scaler = torch.amp.GradScaler(device)
    loss = torch.tensor(float("nan"))
    for _ in range(options.steps):
        rows = torch.randint(len(x), (options.batch,), device=device)
        if optimizer.refresh_due:
            optimizer.refresh(x[rows], y[rows])
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    scale = scaler.get_scale()
    print(f"loss {loss.item():.4f}, accuracy {accuracy:.3f}, scale {scale:g}; {optimizer.counts}")
    return {"loss": loss.item(), "accuracy": accuracy, "scale": scale}


if __name__ == "__main__":
    main()
