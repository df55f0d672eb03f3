"""The fused paths of soft embedding, logsumexp, SNCE and SoftVQ's posterior against float64 matrices."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from softgen.relaxation import (
    DENSE_LIMIT,
    Distance,
    Impl,
    expected_code,
    expected_embedding,
    logsumexp_linear,
    neighbour_cross_entropy,
    neighbour_distribution,
    neighbour_entropy,
    perplexity,
    probabilities,
    soft_embedding,
)
from softgen.relaxation.codebook_attention import _flash_attention

Reduction = Literal["mean", "sum", "none"]
DISTANCES: list[Distance] = ["l2", "dot", "cosine"]
# Sizes that the blocks do not divide, blocks that are forbidden as a whole, and the choice of the function.
N, K, WIDTH, DIM, EMBEDDING = 37, 101, 6, 4, 5
BLOCKS: list[dict[str, int]] = [{"token_block": 8, "code_block": 10}, {"token_block": 5}, {"code_block": 7}, {}]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Of the loss towards q, of the distribution q itself.
TWO_TAU_SQUARED = 0.7


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    assert isinstance(request.param, torch.dtype)
    return request.param


def draw(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def draw_bias(dtype: torch.dtype) -> Tensor:
    bias = torch.randn(K, dtype=dtype)
    bias[:12] = bias[40:75] = -math.inf
    return bias.requires_grad_()


def doubled(*tensors: Tensor) -> list[Tensor]:
    """Independent float64 copies that want the same gradients."""
    return [x.detach().double().clone().requires_grad_(x.requires_grad) for x in tensors]


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


def with_gradients(output: Tensor, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


def snce(
    h: Tensor, w: Tensor, z: Tensor, v: Tensor, bias: Tensor, token_weights: Tensor, distance: Distance, kind: str
) -> Tensor:
    """SNCE from the full matrices, distances pair by pair."""
    if distance == "l2":
        d = (z.unsqueeze(1) - v).square().sum(-1)
    else:
        d = -(z.unsqueeze(1) * v).sum(-1)
        if distance == "cosine":
            d = d / z.norm(dim=-1, keepdim=True) / v.norm(dim=-1)
    allowed = bias != -math.inf
    q = (-d / TWO_TAU_SQUARED)[:, allowed].softmax(-1)
    loss = -(q * (h @ w.T + bias)[:, allowed].log_softmax(-1)).sum(-1)
    if kind.startswith("kl"):
        loss = loss + (q * q.log()).sum(-1)
    weighted = loss * token_weights
    if kind.endswith("none"):
        return weighted
    return weighted.sum() if kind == "sum" else weighted.sum() / token_weights.sum()


@pytest.mark.parametrize("impl", ["fused", "dense"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", ["mean", "sum", "none", "kl mean", "kl none"])
def test_snce_is_the_full_matrix(kind: str, distance: Distance, impl: Impl, dtype: torch.dtype) -> None:
    h, w, bias = draw(N, WIDTH, dtype=dtype, grad=True), draw(K, WIDTH, dtype=dtype, grad=True), draw_bias(dtype)
    z, v, token_weights = draw(N, DIM, dtype=dtype), draw(K, DIM, dtype=dtype), torch.rand(N, dtype=dtype)
    upstream = draw(N) if kind.endswith("none") else torch.tensor(-2.5, dtype=torch.float64)
    h64, w64, bias64, z64, v64, weights64 = doubled(h, w, bias, z, v, token_weights)
    truth = snce(h64, w64, z64, v64, bias64, weights64, distance, kind)
    expected = with_gradients(truth, [h64, w64, bias64], upstream)
    reduction: Reduction = "none" if kind.endswith("none") else "sum" if kind == "sum" else "mean"
    for blocks in BLOCKS if impl == "fused" else [{}]:
        loss = neighbour_cross_entropy(
            h,
            w,
            z,
            v,
            two_tau_squared=TWO_TAU_SQUARED,
            distance=distance,
            bias=bias,
            token_weights=token_weights,
            reduction=reduction,
            subtract_entropy=kind.startswith("kl"),
            impl=impl,
            **blocks,
        )
        assert loss.dtype == dtype
        got = with_gradients(loss, [h, w, bias], upstream)
        assert max(errors(got, expected)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", ["fused", "dense"])
@pytest.mark.parametrize("what", ["embedding", "logsumexp"])
def test_a_softmax_over_the_head_is_the_full_matrix(what: str, impl: Impl, dtype: torch.dtype) -> None:
    h, w, bias = draw(N, WIDTH, dtype=dtype, grad=True), draw(K, WIDTH, dtype=dtype, grad=True), draw_bias(dtype)
    table = draw(K, EMBEDDING, dtype=dtype, grad=True)
    h64, w64, bias64, table64 = doubled(h, w, bias, table)
    logits = h64 @ w64.T + bias64
    if what == "embedding":
        upstream, inputs = draw(N, EMBEDDING), [h, w, bias, table]
        expected = with_gradients(logits.softmax(-1) @ table64, [h64, w64, bias64, table64], upstream)
    else:
        upstream, inputs = draw(N), [h, w, bias]
        expected = with_gradients(logits.logsumexp(-1), [h64, w64, bias64], upstream)
    for blocks in BLOCKS if impl == "fused" else [{}]:
        if what == "embedding":
            output = soft_embedding(h, w, table, bias=bias, impl=impl, **blocks)
        else:
            output = logsumexp_linear(h, w, bias=bias, impl=impl, **blocks)
        assert output.dtype == dtype
        assert max(errors(with_gradients(output, inputs, upstream), expected)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", ["fused", "dense"])
@pytest.mark.parametrize("separate", [False, True], ids=["codes", "embedding"])
def test_softvq_is_the_full_matrix(separate: bool, impl: Impl, dtype: torch.dtype) -> None:
    z, codes = draw(N, DIM, dtype=dtype, grad=True), draw(K, DIM, dtype=dtype, grad=True)
    rows = draw(K, EMBEDDING, dtype=dtype, grad=True) if separate else codes
    inputs = [z, codes, rows] if separate else [z, codes]
    copies = doubled(*inputs)
    distances = (copies[0].unsqueeze(1) - copies[1]).square().sum(-1).sqrt()
    truth = (-distances / 0.07).softmax(-1) @ copies[-1]
    upstream = draw(*truth.shape)
    expected = with_gradients(truth, copies, upstream)
    for blocks in BLOCKS if impl == "fused" else [{}]:
        output = expected_code(z, codes, tau=0.07, embedding=rows if separate else None, impl=impl, **blocks)
        assert output.dtype == dtype
        assert max(errors(with_gradients(output, inputs, upstream), expected)) <= TOLERANCE[dtype]


Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def cases(**blocks: Any) -> dict[str, Case]:
    """Every fused function as one of the tensors that it is differentiable in."""
    torch.manual_seed(0)
    h, w, bias, table = draw(5, 4, grad=True), draw(7, 4, grad=True), draw(7, grad=True), draw(7, 3, grad=True)
    z, v, codes = draw(5, 3), draw(7, 3), draw(7, 3, grad=True)

    def loss(reduction: Reduction) -> Callable[..., Tensor]:
        return lambda h, w, bias: neighbour_cross_entropy(
            h, w, z[: len(h)], v, two_tau_squared=0.7, bias=bias, reduction=reduction, impl="fused", **blocks
        )

    return {
        "snce mean": (loss("mean"), (h, w, bias)),
        "snce none": (loss("none"), (h, w, bias)),
        "soft embedding": (lambda *x: soft_embedding(*x[:3], bias=x[3], impl="fused", **blocks), (h, w, table, bias)),
        "logsumexp": (lambda h, w, bias: logsumexp_linear(h, w, bias=bias, impl="fused", **blocks), (h, w, bias)),
        "softvq": (lambda z, c: expected_code(z, c, tau=0.5, impl="fused", **blocks), (z.requires_grad_(), codes)),
    }


@pytest.mark.parametrize("name", cases())
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function, inputs = cases(token_block=2, code_block=3)[name]
    assert gradcheck(function, inputs)
    for frozen in range(len(inputs)):
        some = tuple(x.detach().requires_grad_(i != frozen) for i, x in enumerate(inputs))
        assert gradcheck(function, some, fast_mode=True)


@pytest.mark.parametrize("name", cases())
def test_a_second_derivative_is_refused(name: str) -> None:
    function, inputs = cases()[name]
    (gradient,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", cases())
def test_it_compiles_without_a_break_and_with_any_number_of_tokens(name: str) -> None:
    function, inputs = cases()[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 3):
        some = (inputs[0][:tokens].detach().requires_grad_(), *inputs[1:])
        output = function(*some)
        upstream = draw(*output.shape)
        got = with_gradients(compiled(*some), list(some), upstream)
        assert max(errors(got, with_gradients(output, list(some), upstream))) <= 1e-12


@pytest.mark.parametrize("name", cases())
def test_autocast_changes_nothing(name: str) -> None:
    function, inputs = cases()[name]
    single = [x.detach().float().requires_grad_() for x in inputs]
    output = function(*single)
    expected = with_gradients(output, single, torch.ones_like(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(function(*single), single, torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("deviation", [10, 50])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_bfloat16_inputs_stay_float32(reduction: Reduction, deviation: float) -> None:
    tokens, codes, width, dim = 256, 4096, 64, 16
    h = (deviation * draw(tokens, width) / math.sqrt(width)).bfloat16().requires_grad_()
    w = draw(codes, width).bfloat16().requires_grad_()
    z, v = draw(tokens, dim).bfloat16(), draw(codes, dim).bfloat16()
    h64, w64, z64, v64 = doubled(h, w, z, v)
    logits = h64 @ w64.T
    assert logits.std().item() == pytest.approx(deviation, rel=0.05)
    q = neighbour_distribution(z64, v64, two_tau_squared=2.0)
    truth = -(q * logits.log_softmax(-1)).sum(-1).mean()
    expected = with_gradients(truth, [h64, w64], torch.tensor(1.0))
    loss = neighbour_cross_entropy(h, w, z, v, two_tau_squared=2.0, reduction=reduction, impl="fused").mean()
    got = with_gradients(loss, [h, w], torch.tensor(1.0))
    assert (loss.dtype, got[1].dtype, got[2].dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert errors(got, expected)[0] <= 1e-5
    assert max(errors(got, expected)[1:]) <= 0.01


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_codebook_far_from_zero_has_the_same_q(reduction: Reduction) -> None:
    z, codebook = 0.3 * draw(200, 16, dtype=torch.float32), 0.3 * draw(256, 16, dtype=torch.float32)
    expected = neighbour_distribution(z.double(), codebook.double(), two_tau_squared=0.5)
    # With hidden = 1 and weight = 0, p is uniform and the gradient of the weight is the transpose of p - q.
    weight = torch.zeros(256, 200, requires_grad=True)
    neighbour_cross_entropy(
        torch.eye(200), weight, z + 10, codebook + 10, two_tau_squared=0.5, reduction=reduction, impl="fused"
    ).sum().backward()
    assert weight.grad is not None
    q = 1 / 256 - weight.grad.T.double()
    assert ((q - expected).abs().sum(-1) / 2).mean().item() <= 1e-5


def largest_allocation(function: Callable[[], Tensor]) -> int:
    """Bytes of the largest tensor that the allocator handed out, in the forward and in the backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function().sum().backward()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("name", ["snce mean", "snce none", "soft embedding", "logsumexp", "softvq"])
@pytest.mark.parametrize("tokens", [300, 24])
def test_the_matrix_is_never_allocated(name: str, tokens: int) -> None:
    codes, width = 20_000, 8
    h, w = draw(tokens, width, dtype=torch.float32, grad=True), draw(codes, width, dtype=torch.float32, grad=True)
    z, v = draw(tokens, 4, dtype=torch.float32), draw(codes, 4, dtype=torch.float32)

    def run(impl: Impl) -> Tensor:
        if name.startswith("snce"):
            reduction: Reduction = "none" if name == "snce none" else "mean"
            return neighbour_cross_entropy(h, w, z, v, two_tau_squared=1.0, reduction=reduction, impl=impl)
        if name == "softvq":
            return expected_code(h, w, tau=0.5, impl=impl)
        return soft_embedding(h, w, w, impl=impl) if name == "soft embedding" else logsumexp_linear(h, w, impl=impl)

    matrix = tokens * codes * 4
    assert largest_allocation(lambda: run("dense")) >= matrix
    # The head's gradient is the largest of what has to be there.
    assert largest_allocation(lambda: run("fused")) <= max(matrix // 2, codes * width * 4)


def test_auto_is_dense_up_to_the_limit() -> None:
    tokens = DENSE_LIMIT // 65536
    h, w, z, v = draw(tokens + 1, 3), draw(65536, 3), draw(tokens + 1, 2), draw(65536, 2)

    def loss(count: int, impl: Impl) -> Tensor:
        return neighbour_cross_entropy(h[:count], w, z[:count], v, two_tau_squared=1.0, reduction="none", impl=impl)

    chosen = {count: loss(count, "auto") for count in (tokens, tokens + 1)}
    assert torch.equal(chosen[tokens], loss(tokens, "dense"))
    assert torch.equal(chosen[tokens + 1], loss(tokens + 1, "fused"))
    assert not torch.equal(chosen[tokens], loss(tokens, "fused"))


@pytest.mark.parametrize("impl", ["fused", "dense"])
def test_kl_is_the_loss_less_the_entropy_and_zero_at_a_perfect_fit(impl: Impl) -> None:
    z, v = draw(N, DIM), draw(K, DIM)
    h, w, bias = z.clone().requires_grad_(), 2 * v / 0.7, -v.square().sum(-1) / 0.7
    entropy = neighbour_entropy(z, v, two_tau_squared=0.7, impl=impl)
    q = neighbour_distribution(z, v, two_tau_squared=0.7)
    torch.testing.assert_close(entropy.exp(), perplexity(q), rtol=1e-12, atol=0)

    def loss(head: Tensor, *, subtract_entropy: bool) -> Tensor:
        return neighbour_cross_entropy(
            h, head, z, v, two_tau_squared=0.7, bias=bias, subtract_entropy=subtract_entropy, impl=impl
        )

    torch.testing.assert_close(loss(w, subtract_entropy=False), entropy.mean(), rtol=1e-12, atol=0)
    fit = loss(w, subtract_entropy=True)
    (gradient,) = torch.autograd.grad(fit, h)
    assert abs(fit.item()) <= 1e-13
    assert gradient.abs().max().item() <= 1e-13
    assert loss(1.1 * w, subtract_entropy=True).item() > 1e-3


@pytest.mark.parametrize("impl", ["fused", "dense"])
def test_the_l2_of_snce_is_squared_and_that_of_softvq_is_not(impl: Impl) -> None:
    z, codes = torch.zeros(1, 1), torch.tensor([[1.0], [2.0]])
    ratio = math.exp((2 - 1) / 0.5)
    mean = (ratio * 1 + 2) / (ratio + 1)
    assert expected_code(z, codes, tau=0.5, impl=impl).item() == pytest.approx(mean, rel=1e-6)
    share = 1 / (1 + math.exp(-(4 - 1) / 0.5))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    got = neighbour_entropy(z, codes, two_tau_squared=0.5, impl=impl)
    assert got.item() == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_a_latent_on_its_code_has_the_gradient_of_the_other_codes(offset: float, dtype: torch.dtype) -> None:
    codes = draw(K, DIM, dtype=dtype) + offset
    codes[4] = codes.mean(dim=0)
    z = codes[:9].clone().requires_grad_()
    codes.requires_grad_()
    upstream = draw(9, DIM)
    dense, fused = (
        with_gradients(expected_code(z, codes, tau=0.3, impl=impl), [z, codes], upstream) for impl in ("dense", "fused")
    )
    # The fused path takes the distance 0 for 1e-3 (6e-8) of the norms, against tau = 0.3.
    assert max(errors(fused, [x.double() for x in dense])) <= {torch.float64: 1e-6, torch.float32: 2e-2}[dtype]
    for gradient in fused[1:]:
        assert gradient.isfinite().all()


def test_distances_that_are_rounding_pass_no_gradient() -> None:
    near = torch.tensor([1.0, 0.0])
    z = near.unsqueeze(0).clone().requires_grad_()
    codes = torch.stack([near, near + 1e-5, -near])
    rows = torch.tensor([[1.0], [2.0], [5.0]])
    mean = expected_code(z, codes, tau=0.005, embedding=rows, impl="fused")
    mean.backward()
    assert mean.item() == 1.5
    assert torch.equal(z.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("impl", ["fused", "dense"])
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("codes", [1, 3])
def test_no_tokens_and_a_single_code_are_sizes_like_others(codes: int, tokens: int, impl: Impl) -> None:
    h, w = draw(tokens, 4, grad=True), draw(codes, 4, grad=True)
    z, v = draw(tokens, 2), draw(codes, 2)
    none, mean = (
        neighbour_cross_entropy(h, w, z, v, two_tau_squared=1.0, reduction=reduction, impl=impl)
        for reduction in ("none", "mean")
    )
    assert (none.shape, mean.shape) == ((tokens,), ())
    embedded = soft_embedding(h, w, v, impl=impl)
    assert embedded.shape == expected_code(z, v, tau=1.0, impl=impl).shape == (tokens, 2)
    total = logsumexp_linear(h, w, impl=impl)
    gradients = torch.autograd.grad(none.sum() + mean + embedded.sum() + total.sum(), (h, w))
    assert all(x.isfinite().all() for x in gradients)
    if codes == 1:
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-14)
        torch.testing.assert_close(embedded, v.expand(tokens, 2), rtol=1e-14, atol=0)
        torch.testing.assert_close(total, (h @ w.T).squeeze(-1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("impl", ["fused", "dense"])
def test_weights_that_sum_to_zero_give_zero(impl: Impl) -> None:
    h, w, z, v = draw(4, 3, grad=True), draw(K, 3), draw(4, 2), draw(K, 2)
    loss = neighbour_cross_entropy(h, w, z, v, two_tau_squared=1.0, token_weights=torch.zeros(4), impl=impl)
    (gradient,) = torch.autograd.grad(loss, h)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_soft_embedding_is_in_the_dtype_of_the_embedding() -> None:
    h, w, table = draw(N, WIDTH), draw(K, WIDTH), draw(K, EMBEDDING)
    expected = expected_embedding(probabilities(h @ w.T), table)
    for impl in ("dense", "fused"):
        got = soft_embedding(h.bfloat16(), w.bfloat16(), table.bfloat16(), impl=impl)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.03)


def test_the_flash_kernel_is_the_same_soft_embedding() -> None:
    h, w, table = (draw(n, 8, dtype=torch.float32, grad=True) for n in (N, K, K))
    upstream = draw(N, 8)
    expected = with_gradients(soft_embedding(h, w, table, impl="fused"), [h, w, table], upstream)
    got = with_gradients(_flash_attention(h, w, table), [h, w, table], upstream)
    assert max(errors(got, [x.double() for x in expected])) <= 1e-5


def call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "latents": torch.zeros(3, 2),
        "codebook": torch.zeros(7, 2),
        "two_tau_squared": 1.0,
    }
    return neighbour_cross_entropy(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"two_tau_squared": 0.0}, "two_tau_squared: expected a number above 0, got 0.0"),
        ({"two_tau_squared": math.nan}, "two_tau_squared: expected a number above 0, got nan"),
        ({"distance": "l1"}, "distance: expected one of l2, dot, cosine, got 'l1'"),
        ({"latents": torch.full((3, 2), math.nan)}, "latents: expected finite values, got NaN or infinity"),
        ({"latents": torch.zeros(2, 2)}, "latents: expected 3 tokens as hidden, got 2"),
        ({"latents": torch.zeros(3, 5)}, "latents: expected shape (N, 2) as codebook, got (3, 5)"),
        ({"codebook": torch.zeros(6, 2)}, "codebook: expected 7 codes as weight, got 6"),
        ({"codebook": torch.zeros(0, 2)}, "codebook: expected shape (K, D) with at least one code, got (0, 2)"),
        ({"weight": torch.zeros(7)}, "weight: expected shape (K, d) with at least one code, got (7,)"),
        ({"hidden": torch.zeros(3, 5)}, "hidden: expected shape (N, 4) as weight, got (3, 5)"),
        ({"hidden": torch.zeros(1, 3, 4)}, "hidden: expected shape (N, 4) as weight, got (1, 3, 4)"),
        ({"bias": torch.zeros(6)}, "bias: expected shape (7,) as weight, got (6,)"),
        ({"token_weights": torch.zeros(3, 1)}, "token_weights: expected shape (3,) as hidden, got (3, 1)"),
        ({"reduction": "max"}, "reduction: expected one of mean, sum, none, got 'max'"),
        ({"impl": "flash"}, "impl: expected one of auto, dense, fused, got 'flash'"),
        ({"token_block": 0}, "token_block: expected None or at least 1, got 0"),
        ({"code_block": -1}, "code_block: expected None or at least 1, got -1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(**changes)
    assert str(error.value) == message


def test_the_other_functions_refuse_too() -> None:
    h, w, z, v = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, 2), torch.zeros(7, 2)
    with pytest.raises(ValueError, match=r"^embedding: expected shape \(7, e\) for the codes of weight, got \(6, 2\)$"):
        soft_embedding(h, w, torch.zeros(6, 2))
    with pytest.raises(ValueError, match=r"^hidden: expected shape \(N, 4\) as weight, got \(3, 2\)$"):
        logsumexp_linear(z, w)
    with pytest.raises(ValueError, match=r"^tau: expected a number above 0, got -1$"):
        expected_code(z, v, tau=-1)
    with pytest.raises(ValueError, match=r"^embedding: expected shape \(7, e\) as codebook, got \(3, 2\)$"):
        expected_code(z, v, tau=1.0, embedding=z)
    with pytest.raises(ValueError, match=r"^two_tau_squared: expected a number above 0, got -1$"):
        neighbour_entropy(z, v, two_tau_squared=-1)


def test_a_kept_graph_can_be_run_backwards_again() -> None:
    h, w, z, v = draw(N, 3, grad=True), draw(K, 3, grad=True), draw(N, 2), draw(K, 2)
    loss = neighbour_cross_entropy(h, w, z, v, two_tau_squared=1.0, impl="fused")
    first = torch.autograd.grad(3 * loss, (h, w), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (h, w))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_the_gradient_of_the_head_is_held_once() -> None:
    """Where the graph is not kept, the backward pass allocates no second gradient of the head."""
    tokens, codes, width = 40, 30_000, 32
    h, w = draw(tokens, width, dtype=torch.float32, grad=True), draw(codes, width, dtype=torch.float32, grad=True)
    z, v = draw(tokens, 2, dtype=torch.float32), draw(codes, 2, dtype=torch.float32)
    head = codes * width * 4

    def large(*, keep: bool) -> int:
        loss = neighbour_cross_entropy(h, w, z, v, two_tau_squared=1.0, impl="fused")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            torch.autograd.grad(2 * loss, (h, w), retain_graph=keep)
        return sum(event.self_cpu_memory_usage >= head for event in profile.events())

    assert large(keep=True) > 0
    assert large(keep=False) == 0
