"""Small networks of every kind, and dense oracles that know nothing of the library.

The oracles take one backward pass per row and are never vmapped: second derivatives of vmapped
norms are wrong on torch 2.13 (design.md, section 6).
"""

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def seeded(build, *, seed=0, dtype=F64):
    """A model with its own seed, and with norms whose weights are not all one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def mlp(*widths, activation=nn.Tanh, dtype=F64, seed=0):
    """Linear layers with an activation between any two."""

    def build():
        layers = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), activation()]
        return nn.Sequential(*layers[:-1])

    return seeded(build, dtype=dtype, seed=seed)


class ConvNet(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(2)
        self.conv2 = nn.Conv2d(2, 3, 2, stride=2)
        self.norm2 = nn.BatchNorm2d(3)
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        x = torch.tanh(self.norm1(self.conv1(x)))
        x = torch.nn.functional.gelu(self.norm2(self.conv2(x)))
        return self.head(x.flatten(1))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.conv2(torch.tanh(self.norm(self.conv1(x))))


class ResNet(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 2, stride=2)
        self.block1 = Block(2)
        self.block2 = Block(2)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.block2(self.block1(self.stem(x))).flatten(1))


class Transformer(nn.Module):
    """A classifier of sequences: one encoder layer with two heads."""

    def __init__(self, norm_first, classes=3, width=4):
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.encoder = nn.TransformerEncoderLayer(
            width, 2, 5, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class TiedTransformer(nn.Module):
    """A language model: tokens in, logits for every position out, one matrix for both."""

    def __init__(self, vocabulary=5, width=4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return torch.nn.functional.linear(torch.tanh(x), self.embed.weight)


def images(n=4, seed=1, dtype=F64):
    return normal(n, 1, 4, 4, seed=seed, dtype=dtype)


def _warm(model, inputs):
    """Gives evaluation-mode BatchNorm statistics that are neither zero nor one."""
    model.train()
    with torch.no_grad():
        model(inputs)
    return model


def _networks():
    tokens = torch.tensor([[0, 3, 1], [4, 4, 2], [2, 0, 0], [1, 1, 3]])
    labels = torch.tensor([0, 2, 1, 1])
    resnet, evaluated = seeded(ResNet), seeded(ConvNet)
    return {
        "mlp": (mlp(4, 5, 5, 3), normal(4, 4, seed=1), labels),
        "mlp_gelu": (mlp(4, 6, 3, activation=nn.GELU), normal(4, 4, seed=1), labels),
        "conv_train": (seeded(ConvNet).train(), images(), labels),
        "conv_eval": (_warm(evaluated, images(seed=5)).eval(), images(), labels),
        "resnet_train": (resnet.train(), images(), labels),
        "resnet_eval": (_warm(copy.deepcopy(resnet), images(seed=5)).eval(), images(), labels),
        "pre_norm": (seeded(lambda: Transformer(True)), normal(4, 3, 2, seed=1), labels),
        "post_norm": (seeded(lambda: Transformer(False)), normal(4, 3, 2, seed=1), labels),
        "tied": (seeded(TiedTransformer), tokens, (tokens + 1) % 5),
    }


NETWORKS = tuple(_networks())


def network(name):
    """A fresh model of that name, with a batch and class targets."""
    return _networks()[name]


def state_of(model):
    """Everything that a library call must leave as it was."""
    held = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    return held, grads, modes, torch.random.get_rng_state()


def assert_unchanged(model, before):
    held, grads, modes, rng = before
    after = state_of(model)
    assert held.keys() == after[0].keys()
    for name, value in held.items():
        torch.testing.assert_close(after[0][name], value, rtol=0, atol=0, equal_nan=True)
    assert all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(grads.values(), after[1].values(), strict=True)
    )
    assert modes == after[2]
    assert torch.equal(rng, after[3])


# ---- oracles


def _flat(parts) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def rows_of_derivative(vector: Tensor, inputs) -> Tensor:
    """The Jacobian of a flat vector in all inputs, one backward pass per row."""
    rows = []
    for entry in vector:
        if not entry.requires_grad:
            rows.append(torch.zeros(sum(x.numel() for x in inputs), dtype=vector.dtype))
            continue
        grads = torch.autograd.grad(entry, inputs, retain_graph=True, materialize_grads=True)
        rows.append(_flat(grads))
    return torch.stack(rows)


class Oracle:
    """Dense derivatives of a model on a batch, in the order of `named_parameters`."""

    def __init__(self, model, inputs) -> None:
        self.model, self.inputs = copy.deepcopy(model), inputs
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.outputs = self._run().detach()

    def _run(self) -> Tensor:
        held = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        args = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(self.model, held, args)

    def jacobian(self) -> Tensor:
        """J, of the flat outputs."""
        return rows_of_derivative(self._run().flatten(), self.parameters)

    def gradient(self, function) -> Tensor:
        """Of function(outputs)."""
        return _flat(torch.autograd.grad(function(self._run()), self.parameters))

    def hessian(self, function) -> Tensor:
        """Of function(outputs) through the whole model."""
        value = function(self._run())
        grads = torch.autograd.grad(value, self.parameters, create_graph=True)
        return rows_of_derivative(_flat(grads), self.parameters)

    def at(self, step: Tensor, function) -> Tensor:
        """function(outputs) after a flat step; function may also ask for their gradient."""
        offset = 0
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p in self.parameters:
                p += step[offset : offset + p.numel()].reshape(p.shape)
                offset += p.numel()
        try:
            return function(self)
        finally:
            with torch.no_grad():
                for p, old in zip(self.parameters, kept, strict=True):
                    p.copy_(old)


def output_hessian(function, outputs: Tensor) -> Tensor:
    """The dense Hessian of a function of the outputs alone."""
    return torch.func.hessian(function)(outputs).reshape(outputs.numel(), outputs.numel())


def dense_step(H: Tensor, g: Tensor) -> Tensor:
    return torch.linalg.solve(H, -g)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())
