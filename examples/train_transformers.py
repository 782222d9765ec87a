"""Hugging Face's Trainer: LLQR in `create_optimizer`, and `refresh` before a training step.

A `TrainerCallback` sees no batch, so this takes a subclass with two short methods.

Run `python examples/train_transformers.py`; it needs `pip install transformers accelerate`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import llqr_mf as lq


class LLQRTrainer(Trainer):
    """Trains `model.net`, whose inputs are the batch's "x" and whose outputs are logits."""

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        """AdamW, wrapped. The model is on its device by now."""
        base = torch.optim.AdamW(self.model.parameters(), lr=self.args.learning_rate)
        self.llqr = lq.LLQR(self.model.net, base, loss="cross_entropy", refresh_every=50)
        self.optimizer = self.llqr
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """The usual one, after a refresh where that is due."""
        if self.llqr.refresh_due:
            batch = self._prepare_inputs(inputs)
            self.llqr.refresh(batch["x"], batch["labels"])
        return super().training_step(model, inputs, *args)


class Classifier(nn.Module):
    """A small Transformer over the rows of 8 x 8 images, with the Trainer's interface."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, width),
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and the loss where there are labels."""
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains and prints; returns the losses and the optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--output", default="output/trainer", help="where checkpoints go")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--resume", help="a checkpoint folder to go on from")
    options = parser.parse_args(arguments)

    data = load_digits()
    images = (torch.from_numpy(data.data).float() / 16).reshape(-1, 8, 8)
    examples = [
        {"x": x, "labels": y} for x, y in zip(images, torch.from_numpy(data.target), strict=True)
    ]
    torch.manual_seed(0)
    trainer = LLQRTrainer(
        model=Classifier(options.width),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=3e-3,
            max_grad_norm=1.0,
            logging_steps=max(1, options.steps // 10),
            save_strategy="steps" if options.save_every else "no",
            save_steps=options.save_every or 500,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=examples,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"losses {losses}; {trainer.llqr.counts}")
    return {"losses": [float(loss) for loss in losses], "optimizer": trainer.llqr}


if __name__ == "__main__":
    main()
