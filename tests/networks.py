"""Small networks, a batch and a loss for each; every other test takes its models from here.

    model, inputs, targets, loss = ZOO["resnet_train"]()

Everything is float64 and seeded, so that a factory called twice gives equal models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, Any, Tensor, str]
"""Model, inputs (a tensor or a tuple), targets, name of the loss."""

ZOO: dict[str, Callable[[], Case]] = {}

N, CLASSES = 4, 3


def net(*, loss: str = "mse", train: bool = False) -> Callable[..., Callable[[], Case]]:
    """Registers a function that returns a model and its inputs; targets fit the model's output."""

    def decorate(make: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], Case]:
        def case() -> Case:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, inputs = make()
                model = model.double().train(train)
                _disturb(model)
                shape = output_shape(model, inputs)
                if loss == "cross_entropy":
                    targets = torch.randint(shape[-1], shape[:-1])
                else:
                    targets = torch.randn(shape, dtype=torch.float64)
            return model, inputs, targets, loss

        ZOO[make.__name__] = case
        return case

    return decorate


def output_shape(model: nn.Module, inputs: Any) -> torch.Size:
    """Shape of the model's output, seen on a model whose buffers may move."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        return torch.func.functional_call(model, buffers, as_tuple(inputs)).shape


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _disturb(model: nn.Module) -> None:
    """Norms' and biases' ones and zeros would hide errors."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.1 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(std=0.3)
            if name.endswith("running_var"):
                b.uniform_(0.5, 1.5)


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class First(nn.Module):
    """The first of a module's outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


# ---- fully connected


@net(loss="cross_entropy")
def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), normal(N, 5)


@net()
def nested():
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sequential(nn.GELU(), nn.Linear(4, 4)))
    return nn.Sequential(nn.Linear(3, 4), nn.Identity(), inner, nn.Sigmoid()), normal(N, 3)


@net()
def inplace_relu():
    layers = [nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(4, 2)), normal(N, 3)


@net()
def frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model, normal(N, 3)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@net()
def unused_parameter():
    return Unused(), normal(N, 3)


class Tied(nn.Module):
    """One weight at two times, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.bias = nn.Linear(4, 3), nn.Parameter(torch.zeros(4))
        self.middle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(torch.tanh(self.encode(x)))
        return F.linear(torch.tanh(h), self.encode.weight.t(), self.bias)


@net()
def tied_transpose():
    return Tied(), normal(N, 4)


@net()
def same_module_twice():
    layer, act = nn.Linear(3, 3), nn.Tanh()
    return nn.Sequential(layer, act, layer, act, nn.Linear(3, 2)), normal(N, 3)


@net(loss="bce_with_logits")
def prelu_bilinear():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.mix = nn.PReLU(3), nn.Bilinear(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(x)
            return self.mix(h, torch.tanh(h))

    model, inputs = Model(), normal(N, 3)
    return model, inputs


# ---- convolutions and norms


@net(loss="cross_entropy")
def convnet():
    return nn.Sequential(
        *[nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(3, 4, 3, padding="same"), nn.Tanh()],
        *[nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular")],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)],
    ), normal(N, 2, 6, 6)


@net()
def conv_transpose():
    return nn.Sequential(
        *[nn.Conv1d(2, 3, 3, stride=2), nn.Tanh(), nn.ConvTranspose1d(3, 2, 3, stride=2)],
        *[nn.AdaptiveMaxPool1d(3), nn.Flatten(), nn.Linear(6, 2)],
    ), normal(N, 2, 7)


class BasicBlock(nn.Module):
    """The ResNet block, written as torchvision does: in-place ReLU and +=."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.relu(out)


def _resnet(norm: Callable[[int], nn.Module]) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        *[nn.Conv2d(2, 3, 3, padding=1), norm(3), nn.ReLU(inplace=True), BasicBlock(3, norm)],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)],
    ), normal(N, 2, 4, 4)


@net(loss="cross_entropy")
def resnet_eval():
    return _resnet(nn.BatchNorm2d)


@net(loss="cross_entropy", train=True)
def resnet_train():
    return _resnet(nn.BatchNorm2d)


@net(train=True)
def batch_norm_1d():
    norms = nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None, affine=False)
    return nn.Sequential(
        *[nn.Linear(3, 4), norms[0], nn.Tanh(), nn.Linear(4, 4), norms[1], nn.Linear(4, 2)]
    ), normal(N, 3)


@net(train=True)
def batch_norm_function():
    """The running statistics are moved by the model's own call."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("variance", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return F.batch_norm(h, self.mean, self.variance, training=self.training).tanh()

    return Model(), normal(N, 3)


@net()
def group_norm():
    return nn.Sequential(
        *[nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)]
    ), normal(N, 2, 4)


@net(train=True)
def instance_norm():
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    return nn.Sequential(
        *[nn.Conv1d(2, 3, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)]
    ), normal(N, 2, 5)


@net()
def layer_and_rms_norm():
    return nn.Sequential(
        *[nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.RMSNorm(4)],
        *[nn.GELU(), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)],
    ), normal(N, 3)


@net(train=True)
def dropout():
    return nn.Sequential(
        *[nn.Linear(4, 5), nn.Dropout(0.4), nn.Tanh(), nn.AlphaDropout(0.3), nn.Linear(5, 6)],
        *[nn.Unflatten(1, (3, 2)), nn.Dropout1d(0.5), nn.Flatten(), nn.Linear(6, 2)],
    ), normal(N, 4)


# ---- sequences


@net(loss="cross_entropy")
def embedding():
    """Integer inputs: dx_0 is empty. The padding row never learns."""
    tokens = torch.tensor([[0, 1, 2], [3, 0, 0], [4, 4, 1], [2, 3, 0]])
    return nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Tanh(), nn.Linear(3, 5)), tokens


class Attention(nn.Module):
    """Self-attention written out: a causal mask sliced by the length, chunk, softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("causal", torch.ones(8, 8).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        shape = (n, length, self.heads, width // self.heads)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.view(*shape).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        scores = scores.masked_fill(~self.causal[:length, :length], float("-inf"))
        mixed = torch.einsum("nhls,nhsd->nhld", scores.softmax(-1), v)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class LanguageModel(nn.Module):
    """Pre-norm blocks, positions, and the output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(5, 4), nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(
            [
                Residual(nn.Sequential(nn.LayerNorm(4), Attention(4, 2))),
                Residual(nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))),
            ]
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@net(loss="cross_entropy")
def language_model():
    return LanguageModel(), torch.randint(5, (N, 3))


@net()
def sdpa_causal():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Model(), normal(N, 3, 4)


def _encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True, **options)


@net(train=True)
def encoder_post_norm():
    return _encoder_layer(dropout=0.3), normal(N, 3, 4)


@net()
def encoder_pre_norm():
    layer = _encoder_layer(norm_first=True, activation=F.gelu, bias=False)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), normal(N, 3, 4)


@net()
def encoder_masked():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(_encoder_layer(), 1)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3))
            self.register_buffer("padding", torch.arange(3) > torch.tensor([[1], [2], [2], [0]]))

        def forward(self, x: Tensor) -> Tensor:
            mask = self.mask.isinf()
            return self.encoder(x, mask=mask, src_key_padding_mask=self.padding)

    return Model(), normal(N, 3, 4)


@net()
def mha_length_first():
    return First(_SelfAttention(nn.MultiheadAttention(4, 2))), normal(3, N, 4)


@net()
def mha_unbatched():
    return First(_SelfAttention(nn.MultiheadAttention(4, 2, batch_first=True))), normal(3, 4)


class _SelfAttention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.attention(x, x, x)


@net()
def mha_weights_used():
    """The averaged attention weights are part of the output."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mixed, weights = self.attention(x, x, x)
            return mixed + weights.sum(1, keepdim=True).mT

    return Model(), normal(N, 3, 4)


@net()
def cross_attention():
    """Several inputs, a key padding mask, and keys of another width in a second attention."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.MultiheadAttention(4, 2, batch_first=True)
            self.other = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
            keys = torch.cat([memory, memory.new_ones((*memory.shape[:-1], 1))], dim=-1)
            x = self.same(x, keys, keys, key_padding_mask=padding, need_weights=False)[0]
            return self.other(x, memory, memory[..., :2])[0]

    padding = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0]]).bool()
    return Model(), (normal(N, 2, 4), normal(N, 3, 3), padding)


@net()
def lstm():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out, (h, _) = self.lstm(x)
            return self.head(torch.cat([out[:, -2], h[-1]], dim=-1))

    return Model(), normal(N, 3, 2)


@net()
def gru():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(2, 3, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0].mean(1)

    return Model(), normal(N, 3, 2)


# ---- code that is hard to read


class Functional(nn.Module):
    """Reshapes, splits, stacks, constants in a concatenation, products, powers, quotients."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(1, 2), requires_grad=False)
        self.linear = nn.Linear(8, 2)
        self.register_buffer("offset", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.frozen.expand(x.shape[0], -1)], dim=1)
        a, b = (x @ self.w).split(2, dim=1)
        c = torch.stack([a.relu() * b, self.scale * a - b, torch.ones_like(b)], dim=1)
        c = c / (1 + b.square().sum(-1, keepdim=True).unsqueeze(1)) + self.offset[:, None]
        flat = c.permute(0, 2, 1).reshape(c.size(0), -1)
        flat = torch.where(flat > 2, flat**3 / 9, F.softplus(flat))
        return self.linear(F.pad(flat, (1, 1), value=0.5)).log_softmax(-1)


@net()
def functional():
    return Functional(), normal(N, 4)


class InPlace(nn.Module):
    """Every kind of overwriting; the last one through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x.tanh_()
        self.seen.copy_(x.detach().mean(0))
        y = self.second(x)
        y += x
        y *= 0.5
        y **= 2
        return self.third(F.leaky_relu_(y - 0.1))


@net()
def in_place():
    return InPlace(), normal(N, 3)


@net()
def in_place_through_view():
    """Not a chain of new values: one layer."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y[:, :2].mul_(2).add_(1)
            return self.second(torch.tanh(y))

    return Model(), normal(N, 3)


@net()
def view_of_overwritten():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Linear(3, 4), nn.ReLU(True), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            part = y[:, :2]
            self.act(y)
            return self.second(part) + y.sum()

    return Model(), normal(N, 3)


@net()
def item_assignment():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y[:, 0] = 2 * y[:, 1]
            return self.second(torch.tanh(y))

    return Model(), normal(N, 3)


class Branch(nn.Module):
    """Python control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if h.sum() > -1e9:
            h = h.tanh_()
        return self.second(h)


@net()
def control_flow():
    return Branch(), normal(N, 3)


@net()
def control_flow_inside():
    """Only the branching block is one layer, and it overwrites its input."""

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x += self.by**2
            return x if x.sum() > 1e9 else x.exp()

    return nn.Sequential(nn.Linear(3, 4), Shift(), nn.Linear(4, 2)), normal(N, 3)


@net()
def optional_argument():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
            h = self.linear(x) * scale
            return torch.tanh(h if mask is None else h * mask)

    return Model(), normal(N, 3)


@net()
def mutating():
    """The forward keeps a counter, a list and the last activation."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.calls, self.seen, self.last = 0, [], None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(self.calls)
            self.last = torch.tanh(self.first(x))
            return self.second(self.last)

    return Model(), normal(N, 3)


@net(train=True)
def random_features():
    """Random numbers that the model draws itself, and stochastic depth."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = h + 0.1 * torch.randn_like(h)
            keep = h.new_empty((h.shape[0],) + (1,) * (h.ndim - 1)).bernoulli_(0.8).div_(0.8)
            return self.second(torch.tanh(h) * keep)

    return Model(), normal(N, 3)


@net()
def weight_norm():
    norm = torch.nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 2))), normal(N, 3)


@net()
def spectral_norm():
    norm = torch.nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)), normal(N, 3)


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


@net()
def hooked():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].register_forward_hook(_double)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    return model, normal(N, 3)


@net()
def fourier():
    """Complex values inside."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3, 2))
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(self.first(x), norm="ortho")
            mixed = spectrum * torch.view_as_complex(self.w)[0]
            return self.head(torch.fft.irfft(mixed, n=4, norm="ortho").tanh())

    return Model(), normal(N, 4)
