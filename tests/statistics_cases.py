"""Networks that read their weights in unlike ways, and dense bases."""

import torch
import torch.nn.functional as F
from small_models import F64, network, normal, seeded
from torch import nn

import llqr_mf as lq

EXACT = 1e-10
"""Sums of some hundred float64 terms in another order."""


class Words(nn.Module):
    """Tokens with a padding row, positions, a convolution over time and a norm; no weight tied."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.conv = nn.Conv1d(4, 3, 2, stride=2, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.gate = nn.Linear(1, 3)
        self.head = nn.Linear(3, 6)

    def forward(self, tokens):
        x = torch.tanh(self.norm(self.conv(self.embed(tokens).mT))).mT
        x = x * torch.tanh(self.gate(x.sum(-1, keepdim=True)))
        return self.head(x).mean(1)


class LengthFirst(nn.Module):
    """Positions come before samples inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1)).mean(0)))


class Similarity(nn.Module):
    """Logits that compare the samples with each other."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x):
        z = torch.tanh(self.inner(x))
        return F.linear(z, z)


class Recurrent(nn.Module):
    """One of several outputs of a call is used."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(2, 2), nn.Linear(3, 3)
        self.cell = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x):
        return self.head(self.cell(self.inner(x))[0].mean(1))


class Untied(nn.Module):
    """`small_models.TiedTransformer` with a matrix of its own for the outputs."""

    def __init__(self, tied):
        super().__init__()
        self.embed, self.norm, self.attention = tied.embed, tied.norm, tied.attention
        self.head = nn.Linear(4, 5, bias=False).double()
        self.head.weight = nn.Parameter(tied.embed.weight.detach().clone())

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(torch.tanh(x))


def grouped():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(2, 3)
    )


LABELS = torch.tensor([0, 2, 1, 1])
MORE = {
    "words": lambda: (
        seeded(Words),
        torch.tensor([[0, 3, 1, 3, 5], [4, 4, 2, 0, 0], [2, 0, 0, 1, 1], [1, 1, 3, 5, 5]]),
        LABELS,
    ),
    "length_first": lambda: (seeded(LengthFirst), normal(4, 3, 2, seed=1), LABELS),
    "similarity": lambda: (seeded(Similarity), normal(4, 3, seed=1), LABELS),
    "recurrent": lambda: (seeded(Recurrent), normal(4, 3, 2, seed=1), LABELS),
    "grouped": lambda: (seeded(grouped), normal(4, 2, 4, 4, seed=1), LABELS),
}


def problem_of(name, metric="gauss_newton", columns=None):
    model, inputs, targets = MORE[name]() if name in MORE else network(name)
    return lq.LQRProblem.from_network(
        lq.split(model),
        inputs,
        targets,
        loss="cross_entropy",
        metric=metric,
        damping=0.0,
        columns=columns,
    )


def turned(structure, problem, seed=3):
    """Random orthogonal bases for a structure, and all of them as one dense V, (P, P)."""
    bases = {
        site.name: [
            None if held is None else torch.linalg.qr(normal(n, n, seed=seed + 7 * i + n))[0]
            for i, (held, n) in enumerate(zip(structure.bases(site), site.sides, strict=True))
        ]
        for site in structure.sites
    }
    structure.set_bases(bases)
    rotated = structure.rotate(structure.split(torch.eye(problem.size, dtype=F64)))
    return torch.cat([rotated[site.name].flatten(1) for site in structure.sites], dim=1)


def flat_sites(structure, squares):
    return torch.cat([squares[site.name].flatten() for site in structure.sites])


def seed(i):
    return torch.Generator().manual_seed(i)
