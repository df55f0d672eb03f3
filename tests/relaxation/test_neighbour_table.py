import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd import gradcheck

from softgen.relaxation import (
    Distance,
    Impl,
    NeighbourTable,
    codebook_hash,
    neighbour_cross_entropy,
    neighbour_distribution,
)

DISTANCES: list[Distance] = ["l2", "dot", "cosine"]
N, K, WIDTH, DIM = 37, 101, 6, 4


def draw(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("token_block", [None, 7])
def test_the_rows_are_the_likeliest_codes_of_q(token_block: int | None, distance: Distance) -> None:
    codebook = draw(K, DIM)
    table = NeighbourTable.build(
        codebook, two_tau_squared=0.1, distance=distance, neighbours=9, token_block=token_block
    )
    q = neighbour_distribution(codebook, codebook, two_tau_squared=0.1, distance=distance)
    values, codes = q.sort(dim=-1, descending=True)
    assert torch.equal(table.codes.long(), codes[:, :9])
    kept = values[:, :9].sum(-1)
    torch.testing.assert_close(table.kept_mass.double(), kept, rtol=1e-6, atol=0)
    torch.testing.assert_close(table.weights.double(), values[:, :9] / kept.unsqueeze(-1), rtol=1e-6, atol=1e-12)
    assert (table.two_tau_squared, table.distance) == (0.1, distance)


@pytest.mark.parametrize("impl", ["dense", "fused"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("subtract_entropy", [False, True])
def test_a_table_of_all_codes_is_the_exact_loss(
    subtract_entropy: bool, distance: Distance, reduction: Any, impl: Impl
) -> None:
    codebook, tokens = draw(K, DIM), torch.randint(K, (N,))
    table = NeighbourTable.build(codebook, two_tau_squared=0.7, distance=distance, neighbours=K)
    h, w, bias = draw(N, WIDTH, grad=True), draw(K, WIDTH, grad=True), draw(K)
    bias[3] = bias[20:50] = -math.inf
    bias.requires_grad_()
    options: dict[str, Any] = {
        "bias": bias,
        "token_weights": torch.rand(N, dtype=torch.float64),
        "reduction": reduction,
        "subtract_entropy": subtract_entropy,
    }
    loss = table.cross_entropy(h, w, tokens, **options, impl=impl)
    exact = neighbour_cross_entropy(
        h, w, codebook[tokens], codebook, two_tau_squared=0.7, distance=distance, impl="dense", **options
    )
    upstream = draw(*loss.shape)
    # The table's weights are float32.
    assert error(loss.detach(), exact.detach()) <= 1e-6
    gradients = (torch.autograd.grad(x, (h, w, bias), upstream) for x in (loss, exact))
    for got, expected in zip(*gradients, strict=True):
        assert error(got, expected) <= 1e-6


@pytest.mark.parametrize("impl", ["dense", "fused"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_cut_table_is_cross_entropy_towards_its_rows(reduction: Any, impl: Impl) -> None:
    table = NeighbourTable.build(draw(7, 3), two_tau_squared=0.05, neighbours=3)
    tokens = torch.tensor([0, 6, 6, 2])
    h, w, bias = draw(4, 5, grad=True), draw(7, 5, grad=True), draw(7, grad=True)
    q = torch.zeros(4, 7, dtype=torch.float64)
    for row, token in enumerate(tokens.tolist()):
        q[row, table.codes[token].long()] = table.weights[token].double()
    expected = -(q * (h @ w.T + bias).log_softmax(-1)).sum(-1)

    def loss(h: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        blocks = {"token_block": 3, "code_block": 2}
        return table.cross_entropy(h, w, tokens, bias=bias, reduction=reduction, impl=impl, **blocks)

    torch.testing.assert_close(loss(h, w, bias), expected if reduction == "none" else expected.mean())
    assert gradcheck(loss, (h, w, bias))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bfloat16_inputs_are_summed_in_float32(reduction: Any) -> None:
    codes, width = 1024, 64
    table = NeighbourTable.build(draw(codes, 2), two_tau_squared=0.01)
    tokens = torch.randint(codes, (256,))
    h, w = (3 * draw(256, width)).bfloat16().requires_grad_(), draw(codes, width).bfloat16().requires_grad_()
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    loss = table.cross_entropy(h, w, tokens, reduction=reduction, impl="fused").mean()
    truth = table.cross_entropy(h64, w64, tokens, impl="dense")
    assert loss.dtype == torch.float32
    assert error(loss.detach(), truth.detach()) <= 1e-5
    for got, expected in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(truth, (h64, w64)), strict=True):
        assert error(got, expected) <= 0.01


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_neither_the_matrix_nor_a_neighbourhood_a_token_is_allocated(reduction: Any) -> None:
    tokens, codes, width, neighbours = 300, 5000, 48, 64
    table = NeighbourTable(
        codes=torch.randint(codes, (codes, neighbours), dtype=torch.int32),
        weights=torch.rand(codes, neighbours).softmax(-1),
        kept_mass=torch.ones(codes),
        two_tau_squared=1.0,
        distance="l2",
        codebook_hash="",
    )
    h, w = torch.randn(tokens, width, requires_grad=True), torch.randn(codes, width, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        table.cross_entropy(h, w, torch.randint(codes, (tokens,)), reduction=reduction, impl="fused").sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert codes * width * 4 <= largest <= tokens * codes * 4 / 2
    assert largest < tokens * neighbours * width * 4


def test_little_kept_mass_is_warned_of_when_built_and_when_loaded(tmp_path: Path) -> None:
    codebook = draw(K, DIM)
    message = r"^neighbour table: 8 neighbours keep 0\.\d+ of the mass of q on average \(least 0\.\d+\), under 0\.99"
    with pytest.warns(UserWarning, match=message):
        table = NeighbourTable.build(codebook, two_tau_squared=5.0, neighbours=8)
    assert table.kept_mass.mean().item() < 0.99
    table.save(tmp_path / "table.safetensors")
    with pytest.warns(UserWarning, match=message):
        NeighbourTable.load(tmp_path / "table.safetensors", codebook=codebook)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert NeighbourTable.build(codebook, two_tau_squared=0.01, neighbours=8).kept_mass.mean().item() >= 0.99


def test_a_saved_table_comes_back_the_same(tmp_path: Path) -> None:
    codebook = draw(K, DIM).float()
    table = NeighbourTable.build(codebook, two_tau_squared=0.03, distance="cosine", neighbours=60)
    table.save(tmp_path / "deep" / "table.safetensors")
    back = NeighbourTable.load(tmp_path / "deep" / "table.safetensors", codebook=codebook)
    for name in ("codes", "weights", "kept_mass"):
        got, expected = getattr(back, name), getattr(table, name)
        assert (got.dtype, torch.equal(got, expected)) == (expected.dtype, True)
    assert (back.two_tau_squared, back.distance, back.codebook_hash) == (0.03, "cosine", codebook_hash(codebook))
    assert back.codes.shape == (K, 60)


def test_a_table_of_another_codebook_is_refused_in_one_line(tmp_path: Path) -> None:
    path, codebook = tmp_path / "table.safetensors", draw(K, DIM)
    NeighbourTable.build(codebook, two_tau_squared=0.01).save(path)
    other = codebook.clone()
    other[5, 1] += 1e-12
    wanted, got = codebook_hash(other), codebook_hash(codebook)
    expected = f"data.table: expected a table of the codebook {wanted}, got one of {got}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        NeighbourTable.load(path, codebook=other, key="data.table")
    with pytest.raises(ValueError, match=r"^neighbour_table: expected a table of the codebook"):
        NeighbourTable.load(path, codebook=codebook.view(DIM, K))


def test_a_hash_is_of_shape_and_values() -> None:
    codebook = draw(K, DIM).bfloat16()
    assert codebook_hash(codebook) == codebook_hash(codebook.float()) == codebook_hash(codebook.float().T.clone().T)
    assert codebook_hash(codebook) != codebook_hash(codebook.flip(0))
    assert codebook_hash(codebook) != codebook_hash(codebook.reshape(DIM, K))


@pytest.mark.parametrize("content", [None, b"no safetensors", "other tensors", "other distance"])
def test_another_file_is_refused_in_one_line(content: bytes | str | None, tmp_path: Path) -> None:
    path, codebook = tmp_path / "table.safetensors", draw(K, DIM)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "other tensors":
        save_file({"weight": codebook}, path)
    elif content is not None:
        table = NeighbourTable.build(codebook, two_tau_squared=0.01)
        object.__setattr__(table, "distance", "l1")
        table.save(path)
    with pytest.raises(ValueError, match=r"^neighbour_table: expected a file of a neighbour table, got '[^\n]*$"):
        NeighbourTable.load(path, codebook=codebook)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": 0}, "neighbours: expected at least 1, got 0"),
        ({"two_tau_squared": -1.0}, "two_tau_squared: expected a number above 0, got -1.0"),
        ({"distance": "l1"}, "distance: expected one of l2, dot, cosine, got 'l1'"),
        ({"token_block": 0}, "token_block: expected None or at least 1, got 0"),
    ],
)
def test_a_table_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NeighbourTable.build(draw(K, DIM), **{"two_tau_squared": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(6, 4)}, "weight: expected 7 codes as the table, got 6"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, "tokens: expected shape (3,) as hidden, got (2,)"),
        ({"token_weights": torch.zeros(2)}, "token_weights: expected shape (3,) as hidden, got (2,)"),
        ({"reduction": "max"}, "reduction: expected one of mean, sum, none, got 'max'"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    table = NeighbourTable.build(draw(7, 2), two_tau_squared=0.01)
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "tokens": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        table.cross_entropy(**{**arguments, **changes})
