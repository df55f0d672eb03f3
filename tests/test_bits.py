import pytest
import torch

from softgen.bits import check_groups, code_bits, combine_ids, ids_of_bits, split_ids


def test_bits_are_the_digits_of_a_code_from_the_lowest_up() -> None:
    assert code_bits(2).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]
    digits = [[2 * int(digit) - 1 for digit in reversed(f"{code:05b}")] for code in range(32)]
    assert code_bits(5).tolist() == digits


@pytest.mark.parametrize("bits", [1, 6, 18])
def test_ids_and_bits_round_trip(bits: int) -> None:
    ids = torch.arange(2**bits)
    assert torch.equal(ids_of_bits(code_bits(bits)), ids)


def test_exactly_zero_is_not_set() -> None:
    assert ids_of_bits(torch.tensor([[0.0, 1e-30, -0.0], [0.1, -0.1, 0.1]])).tolist() == [2, 5]


@pytest.mark.parametrize(("bits", "groups"), [(6, 1), (6, 2), (6, 3), (6, 6), (18, 2)])
def test_groups_are_slices_of_the_bits(bits: int, groups: int) -> None:
    ids = torch.randint(2**bits, (3, 4))
    codes = split_ids(ids, bits=bits, groups=groups)
    assert codes.shape == (3, 4, groups)
    assert torch.equal(combine_ids(codes, bits=bits), ids)
    assert combine_ids(codes.int(), bits=bits).dtype == torch.int64
    of_groups = code_bits(bits // groups)[codes].flatten(-2)
    assert torch.equal(of_groups, code_bits(bits)[ids])


def test_the_second_group_holds_the_high_bits() -> None:
    assert split_ids(torch.tensor([0b101_011]), bits=6, groups=2).tolist() == [[0b011, 0b101]]


@pytest.mark.parametrize(("bits", "groups"), [(6, 4), (6, 0), (0, 1)])
def test_groups_must_divide_the_bits(bits: int, groups: int) -> None:
    message = rf"^model.codebook_splits: expected a divisor of the {bits} bits, got {groups}$"
    with pytest.raises(ValueError, match=message):
        check_groups(bits, groups, key="model")
