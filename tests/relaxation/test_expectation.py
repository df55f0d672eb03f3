import copy

import pytest
import torch
from torch import nn

from softgen.models import MaskedTransformer
from softgen.relaxation import expected_embedding, probabilities
from softgen.testing import ToyMaskedModel, ToyTokenizer
from softgen.tokenizers import ConvVQTokenizer, ImageTokenizer

B, N, K = 3, 4, 5


def one_hot(tokens: torch.Tensor, num_codes: int) -> torch.Tensor:
    return nn.functional.one_hot(tokens, num_codes).float()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        MaskedTransformer(num_codes=K, num_sites=N, num_classes=2, width=8, depth=1, heads=2),
        ToyMaskedModel.random(num_classes=2, num_sites=N, num_codes=K),
    ],
    ids=["transformer", "toy"],
)
def test_one_hot_probabilities_are_the_hard_path_of_a_model(
    model: MaskedTransformer | ToyMaskedModel, masked: bool
) -> None:
    tokens = torch.randint(K, (B, N))
    mask = torch.rand(B, N) < 0.5 if masked else None
    seen = tokens if mask is None else tokens.masked_fill(mask, model.mask_id)
    soft = model.embed_soft(one_hot(tokens, K), mask)
    assert soft.shape == (B, model.num_tokens, model.embedding_dim)
    assert torch.equal(soft, model.embed(seen))


@pytest.mark.parametrize(
    "tokenizer",
    [ConvVQTokenizer(image_size=8, num_codes=K, code_dim=4, channels=(8, 8, 8)), ToyTokenizer(num_codes=K)],
    ids=["conv_vq", "toy"],
)
def test_one_hot_probabilities_are_the_hard_path_of_a_tokenizer(tokenizer: ImageTokenizer) -> None:
    """In float64: to normalise a unit vector again moves it by a rounding error, which a random decoder enlarges."""
    tokenizer = copy.deepcopy(tokenizer).double()
    tokenizer.on_weights_averaged()
    tokens = torch.randint(K, (B, tokenizer.num_sites))
    soft = tokenizer.decode_embeddings(tokenizer.embed_soft(one_hot(tokens, K).double()))
    torch.testing.assert_close(soft, tokenizer.decode(tokens), rtol=0, atol=1e-10)


def test_a_masked_site_ignores_its_probabilities_and_passes_them_no_gradient() -> None:
    model = MaskedTransformer(num_codes=K, num_sites=N, num_classes=2, width=8, depth=1, heads=2)
    probs = torch.rand(B, N, K).softmax(-1).requires_grad_()
    mask = torch.rand(B, N) < 0.5
    embedded = model.embed_soft(probs, mask)
    assert torch.equal(embedded[mask], model.token_embedding.weight[K].expand(int(mask.sum()), -1))
    (gradient,) = torch.autograd.grad(embedded.square().sum(), probs)
    assert torch.equal(gradient.abs().sum(-1) > 0, ~mask)


def test_the_expectation_is_the_mean_row() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0]])
    mean = expected_embedding(torch.tensor([0.5, 0.25, 0.25]), table)
    assert mean.tolist() == [1.5, 1.5]


def test_the_temperature_divides_the_logits() -> None:
    logits = torch.tensor([0.0, 1.0]).log_softmax(-1) * 3
    warm = probabilities(logits, temperature=3.0)
    torch.testing.assert_close(warm, torch.tensor([0.0, 1.0]).softmax(-1))
    assert torch.equal(probabilities(logits), logits.softmax(-1))
    assert probabilities(logits, temperature=1e-3).tolist() == [0.0, 1.0]


def test_probabilities_are_float32_at_least() -> None:
    logits = torch.randn(2, 7)
    assert torch.equal(probabilities(logits.bfloat16()), logits.bfloat16().float().softmax(-1))
    assert probabilities(logits.double()).dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"^temperature: expected a number above 0, got {temperature}$"):
        probabilities(torch.zeros(2), temperature=temperature)


def test_another_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^probs: expected a last dimension of 5 codes, got 4$"):
        expected_embedding(torch.ones(2, 4) / 4, torch.ones(5, 3))


def test_probabilities_are_not_narrowed_to_a_table_in_half_precision() -> None:
    probs = torch.full((1, 1021), 1 / 1021)  # in bfloat16 2^-10, which sums to 0.997
    table = torch.ones(1021, 2, dtype=torch.bfloat16)
    soft = expected_embedding(probs, table)
    assert soft.dtype == torch.bfloat16
    assert torch.equal(soft, table[:1])
