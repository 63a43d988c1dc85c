import pytest
import torch

from hf_vqlogits.gaussian_moe.data import check_data, check_finite, columns


def test_vectors_are_one_column():
    assert columns(torch.zeros(5), 1, "x").shape == (5, 1)
    assert columns(torch.zeros(2, 5, 3), 3, "x").shape == (2, 5, 3)
    for shape, width in (((5,), 2), ((5, 3), 2), ((), 1)):
        with pytest.raises(ValueError, match=rf"`x` must have the shape \(N, {width}\) .* got"):
            columns(torch.zeros(shape), width, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted_and_placed(value):
    values = torch.zeros(6, 2)
    check_finite(values, "x")
    values[4, 1] = values[5, 0] = value
    with pytest.raises(ValueError, match="`x` holds 2 values .* first in row 4; remove or replace"):
        check_finite(values, "x")


def test_data_that_cannot_be_fitted():
    with pytest.raises(ValueError, match=r"`x` has \(5,\) rows and `y` \(4,\)"):
        check_data(torch.zeros(5, 1), torch.zeros(4, 1), 2)
    with pytest.raises(ValueError, match="2 observations cannot tell 3 components apart; give at"):
        check_data(torch.zeros(2, 1), torch.zeros(2, 1), 3)
    with pytest.raises(ValueError, match="`y` holds 1 values"):
        check_data(torch.zeros(2, 1), torch.tensor([[0.0], [torch.nan]]), 2)
    check_data(torch.zeros(3, 1), torch.zeros(3, 1), 3)
