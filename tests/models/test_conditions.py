import pytest
import torch

from softgen.models import ClassCondition, MaskedTransformer, WordTextEncoder


def test_of_labels_nothing_is_dropped() -> None:
    condition = ClassCondition.of(torch.tensor([3, 1]))
    assert len(condition) == 2
    assert condition.labels.tolist() == [3, 1]
    assert condition.dropped.tolist() == [False, False]
    model = MaskedTransformer(num_codes=2, num_sites=1, num_classes=4, width=2, depth=1, heads=1)
    assert isinstance(model.encode(torch.tensor([3, 1])), ClassCondition)


@pytest.mark.parametrize("labels", [torch.tensor([1.7]), torch.tensor(2), torch.tensor([[1]])])
def test_labels_are_a_row_of_integers(labels: torch.Tensor) -> None:
    model = MaskedTransformer(num_codes=2, num_sites=1, num_classes=4, width=2, depth=1, heads=1)
    with pytest.raises(ValueError, match=r"^labels: expected labels \(B,\) of an integer type, got torch"):
        model.encode(labels)


def test_prompts_are_a_list_of_texts() -> None:
    words = WordTextEncoder(num_words=4, width=2, depth=1, heads=1, length=3, vocabulary=["red"])
    model = MaskedTransformer(num_codes=2, num_sites=1, width=2, depth=1, heads=1, text_encoder=words)
    assert len(model.encode(["red", "red"])) == 2
    with pytest.raises(ValueError, match=r"^conditions: expected a list of prompts, got the text 'a red cat'$"):
        model.encode("a red cat")
    with pytest.raises(ValueError, match=r"^conditions: expected at least one prompt, got none$"):
        model.encode([])


def test_dropping_all_or_some_leaves_the_original() -> None:
    condition = ClassCondition.of(torch.tensor([3, 1, 2]))
    where = torch.tensor([False, True, False])
    assert condition.drop().dropped.tolist() == [True, True, True]
    assert condition.drop(where).dropped.tolist() == [False, True, False]
    assert condition.drop(where).drop(~where).dropped.all()
    assert condition.drop().labels.tolist() == [3, 1, 2]
    assert not condition.dropped.any()


def test_cat_and_index_are_inverse() -> None:
    first = ClassCondition.of(torch.tensor([3, 1]))
    second = ClassCondition.of(torch.tensor([0])).drop()
    both = ClassCondition.cat([first, second])
    assert both.labels.tolist() == [3, 1, 0]
    assert both.dropped.tolist() == [False, False, True]
    assert both[2:].labels.tolist() == [0]
    assert both[torch.tensor([2, 0])].labels.tolist() == [0, 3]
    assert both[torch.tensor([2, 0])].dropped.tolist() == [True, False]
    assert isinstance(both[:1], ClassCondition)


def test_moving_moves_every_field() -> None:
    moved = ClassCondition.of(torch.tensor([1])).to(torch.device("meta"))
    assert {moved.labels.device.type, moved.dropped.device.type} == {"meta"}


def test_what_is_known_not_to_be_dropped_is_said_without_looking() -> None:
    whole = ClassCondition.of(torch.tensor([3, 1]))
    assert whole.nothing_dropped
    assert whole[:1].nothing_dropped
    assert whole.to(torch.device("cpu")).nothing_dropped
    assert ClassCondition.cat([whole, whole]).nothing_dropped
    for maybe in (whole.drop(), whole.drop(torch.tensor([False, False])), ClassCondition(whole.dropped, whole.labels)):
        assert not maybe.nothing_dropped
        assert not ClassCondition.cat([whole, maybe]).nothing_dropped
        assert not ClassCondition.cat([maybe, whole]).nothing_dropped
