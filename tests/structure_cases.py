"""Structures in random states on small layouts, and their dense matrices from first principles."""

import itertools
from functools import reduce, singledispatch

import torch
from small_models import ConvNet, TiedTransformer, mlp, seeded
from torch import nn

from llqr_mf.preconditioners import (
    Diagonal,
    DirectSum,
    EKronecker,
    Identity,
    Kronecker,
    LowRank,
    Scalar,
    Scaled,
    Sum,
    structure,
)


class Mixed(nn.Module):
    """A parameter of every awkward shape, one of them frozen."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(2, 3, 2)
        self.depthwise = nn.Conv2d(3, 3, (1, 2), groups=3, bias=False)
        self.conv3 = nn.Conv3d(2, 2, (1, 2, 1))
        self.row = nn.Linear(4, 1)
        self.frozen = nn.Linear(3, 3)
        self.frozen.weight.requires_grad_(False)
        self.embed = nn.Embedding(4, 2)
        self.norm = nn.LayerNorm(3)
        self.number = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.empty(0))


LAYOUTS = {
    "mlp": lambda: mlp(3, 4, 4, 2),
    "conv": lambda: seeded(ConvNet),
    "transformer": lambda: seeded(TiedTransformer),
    "mixed": lambda: seeded(Mixed),
}

MAKERS = {
    "identity": Identity,
    "scalar": Scalar,
    "diagonal": Diagonal,
    "kronecker": Kronecker,
    "kronecker_tensor": lambda like: Kronecker(like, biases="diagonal", kernels="tensor"),
    "kronecker_narrow": lambda like: Kronecker(like, kernels="matrix", max_side=4),
    "ekronecker": EKronecker,
    "ekronecker_tensor": lambda like: EKronecker(like, biases="diagonal", kernels="tensor"),
    "ekronecker_lean": lambda like: EKronecker(like, max_state=3),
    "low_rank": lambda like: LowRank(like, rank=4),
    "direct_sum": lambda like: structure(like, _one_of_each(like), rank=4),
    "sum": lambda like: Sum([Diagonal(like), Kronecker(like)], weights=[0.5, 2]),
    "scaled": lambda like: Scaled(Diagonal(like), EKronecker(like)),
}


def _one_of_each(like):
    names = [name for name, p in like.named_parameters() if p.requires_grad]
    kinds = ("low_rank", "ekron", "kronecker", "scalar", "diagonal")
    return list(zip(names, itertools.cycle(kinds)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal_like(tensor, generator):
    return torch.randn(tensor.shape, dtype=torch.float64, generator=generator).to(tensor)


def positive_like(tensor, generator):
    return 0.5 + torch.rand(tensor.shape, dtype=torch.float64, generator=generator).to(tensor)


def spd_like(matrix, generator):
    half = normal_like(matrix, generator)
    square = half @ half.mT / len(matrix) + 0.3 * torch.eye(len(matrix)).to(matrix)
    return (square + square.mT) / 2  # to the last bit


def randomise(structure, generator):
    """A random positive-definite state, in place."""
    if isinstance(structure, Sum | Scaled | DirectSum):
        for part in structure.structures:
            randomise(part, generator)
        return structure
    if isinstance(structure, LowRank):
        structure.set_diagonal(positive_like(structure.flat(), generator))
        structure.set_basis(normal_like(structure.basis(), generator)[: structure.rank - 1])
        (chart,) = structure.charts()
        chart.put(spd_like(structure.core, generator).flatten())
        return structure
    for name, tensor in structure.tensors.items():
        if ".basis" in name:
            tensor.copy_(torch.linalg.qr(normal_like(tensor, generator))[0])
        elif ".factor" in name and tensor.ndim == 2:
            tensor.copy_(spd_like(tensor, generator))
        else:
            tensor.copy_(positive_like(tensor, generator))
    return structure


def case(structure, layout, seed=0):
    """A structure of that name in a random state on that layout."""
    return randomise(MAKERS[structure](LAYOUTS[layout]()), generator(seed))


def places(structure):
    """For every parameter, its places in the flat vector, in its shape."""
    sizes, shapes = structure.layout.sizes, structure.layout.shapes
    flat = torch.arange(sum(sizes)).split(sizes)
    return {n: f.reshape(s) for n, f, s in zip(structure.layout.names, flat, shapes, strict=True)}


def site_places(structure, site):
    """The flat places of a site's entries, in row-major order of its sides."""
    weight = places(structure)[site.name]
    if site.bias is not None:
        bias = places(structure)[site.bias].unsqueeze(1)
        weight = torch.cat([weight.reshape(len(weight), -1), bias], dim=1)
    return weight.flatten()


def kron(matrices):
    return reduce(torch.kron, [m if m.ndim == 2 else m.diag() for m in matrices])


def place_blocks(structure, blocks):
    """The dense matrix of (flat places, block) pairs."""
    dense = torch.zeros(structure.shape, dtype=structure.dtype)
    for at, block in blocks:
        dense[at.unsqueeze(1), at] = block
    return dense


@singledispatch
def dense(structure):
    """The matrix that a structure stands for, from its tensors alone."""
    raise NotImplementedError(type(structure))


@dense.register
def _(structure: Identity):
    return torch.eye(structure.shape[0], dtype=structure.dtype)


@dense.register
def _(structure: Scalar):
    at = {n: p for n, p in places(structure).items() if p.numel()}
    scales = {n: structure.tensors[".".join([*n.split(".")[:-1], "scale"])] for n in at}
    return place_blocks(
        structure,
        [(p.flatten(), scales[n] * torch.eye(p.numel()).double()) for n, p in at.items()],
    )


@dense.register
def _(structure: Diagonal):
    return torch.cat(
        [structure.tensors[f"{n}.diagonal"].flatten() for n in places(structure)]
    ).diag()


@dense.register
def _(structure: Kronecker):
    return place_blocks(
        structure,
        [(site_places(structure, s), kron(structure.factors(s))) for s in structure.sites],
    )


@dense.register
def _(structure: EKronecker):
    blocks = []
    for site in structure.sites:
        bases = zip(structure.bases(site), site.sides, strict=True)
        turn = kron([torch.eye(n).to(structure._proto) if b is None else b for b, n in bases])
        block = turn @ structure.spectrum(site).flatten().diag() @ turn.mT
        blocks.append((site_places(structure, site), block))
    return place_blocks(structure, blocks)


@dense.register
def _(structure: LowRank):
    root, rows = structure.flat().sqrt(), structure.basis()
    eye = torch.eye(len(root)).to(root)
    middle = eye + rows.mT @ (structure.core - torch.eye(len(rows)).to(root)) @ rows
    return root.diag() @ middle @ root.diag()


@dense.register
def _(structure: DirectSum):
    at = places(structure)
    return place_blocks(
        structure,
        [
            (torch.cat([at[n].flatten() for n in part.layout.names]), dense(part))
            for part in structure.structures
        ],
    )


@dense.register
def _(structure: Sum):
    return sum(c * dense(s) for c, s in zip(structure.weights, structure.structures, strict=True))


@dense.register
def _(structure: Scaled):
    root = dense(structure.diagonal_part).sqrt()
    return root @ dense(structure.inner) @ root
