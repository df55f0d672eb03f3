import itertools
import math
from pathlib import Path

import pytest
import torch

from softgen.models import ClassCondition
from softgen.testing import ToyMaskedModel, ToyTokenizer, count_calls

N, K = 3, 3


def brute_force(model: ToyMaskedModel, tokens: list[int], probs: dict[tuple[int, ...], float]) -> list[list[float]]:
    """p(x_n = k | the other visible sites), by adding up the states that agree with them."""
    rows = []
    for site in range(N):
        mass = [0.0] * K
        for state, p in probs.items():
            others = (m for m in range(N) if m != site)
            if all(tokens[m] in (state[m], model.mask_id) for m in others):
                mass[state[site]] += p
        rows.append([value / sum(mass) for value in mass])
    return rows


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("tokens", [[3, 3, 3], [0, 3, 3], [3, 2, 1], [1, 0, 2]])
def test_the_conditionals_are_exact(tokens: list[int], dropped: bool) -> None:
    table = torch.rand(2, K, K, K) + 0.05
    model = ToyMaskedModel(joint=table)
    condition = ClassCondition.of(torch.tensor([1]))
    weights = table / table.sum(dim=(1, 2, 3), keepdim=True)
    weights = weights.mean(0) if dropped else weights[1]
    states = itertools.product(range(K), repeat=N)
    probs = {state: weights[state].item() for state in states}
    logits = model(model.embed(torch.tensor([tokens])), condition.drop() if dropped else condition)
    assert logits.shape == (1, N, K)
    torch.testing.assert_close(logits.softmax(-1)[0], torch.tensor(brute_force(model, tokens, probs)))


def test_the_joint_is_numbered_as_state_index_says() -> None:
    model = ToyMaskedModel(joint=[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    joint = model.joint(ClassCondition.of(torch.tensor([0, 1])))
    torch.testing.assert_close(joint, torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25] * 4]))
    assert model.state_index(model.states).tolist() == [0, 1, 2, 3]
    assert model.state_index(torch.tensor([[1, 0]])).tolist() == [2]


def test_soft_embeddings_average_over_the_other_sites() -> None:
    model = ToyMaskedModel.random(num_classes=1, num_sites=2, num_codes=K)
    condition = ClassCondition.of(torch.zeros(1, dtype=torch.long))
    seen = torch.tensor([0.5, 0.2, 0.3])
    probs = torch.stack([seen, torch.full((K,), 1 / K)]).unsqueeze(0).requires_grad_()
    logits = model(model.embed_soft(probs), condition)
    expected = seen @ model.joint(condition).view(K, K)
    torch.testing.assert_close(logits[0, 1].softmax(-1), expected / expected.sum())
    (gradient,) = torch.autograd.grad(logits[0, 1, 0], probs)
    assert gradient[0, 0].abs().min() > 0
    assert gradient[0, 1].abs().max() == 0


def test_the_table_is_trained_and_survives_a_round_trip(tmp_path: Path) -> None:
    model = ToyMaskedModel.random(num_classes=2, num_sites=2, num_codes=2)
    model(model.embed(torch.tensor([[2, 2]])), ClassCondition.of(torch.tensor([1])))[0, 0, 0].backward()
    assert model.log_joint.grad is not None
    assert model.log_joint.grad[1].abs().sum() > 0
    assert model.log_joint.grad[0].abs().sum() == 0
    model.save_pretrained(tmp_path / "toy")
    assert torch.equal(ToyMaskedModel.from_pretrained(tmp_path / "toy").log_joint, model.log_joint)


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^joint: expected probabilities above 0, got 0.0$"):
        ToyMaskedModel(joint=[[[0.0, 1.0], [1.0, 1.0]]])
    message = r"^joint: expected shape \(C, K, ..., K\) of at most 4096 states, got \(1, 2, 3\)$"
    with pytest.raises(ValueError, match=message):
        ToyMaskedModel(joint=torch.ones(1, 2, 3))


def test_the_tokenizer_inverts_its_codes() -> None:
    tokenizer = ToyTokenizer(num_codes=3, grid=2, patch=4)
    tokens = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])
    images = tokenizer.decode(tokens)
    assert images.shape == (2, 3, 8, 8)
    assert images[0, :, ::4, ::4].tolist() == [[[0.0, 0.5], [1.0, 0.5]]] * 3
    assert torch.equal(tokenizer.encode(images), tokens)
    noisy = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
    assert torch.equal(tokenizer.encode(noisy), tokens)
    assert torch.equal(tokenizer.decode_embeddings(tokenizer.codebook[tokens]), images)
    assert tokenizer.decode_embeddings(torch.tensor([[[-1.0], [2.0], [0.2], [0.2]]])).aminmax() == (0, 1)


def test_the_tokenizers_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer.num_codes: expected at least 2, got 1$"):
        ToyTokenizer(num_codes=1)


def test_calls_are_counted_with_taps_too_and_only_inside() -> None:
    model = ToyMaskedModel.random(num_classes=1, num_sites=2, num_codes=2)
    embedded, condition = model.embed(torch.full((3, 2), 2)), ClassCondition.of(torch.zeros(3).long())
    with count_calls(model) as count:
        model(embedded, condition)
        model.forward_with_taps(embedded[:2], condition[:2], (0,))
    model(embedded, condition)
    assert (count.calls, count.samples) == (2, [3, 2])
    linear = torch.nn.Linear(2, 2)
    with count_calls(linear) as count:
        linear(torch.zeros(5, 2))
    assert (count.calls, count.samples) == (1, [5])
    assert math.isfinite(linear(torch.zeros(1, 2)).sum().item())
