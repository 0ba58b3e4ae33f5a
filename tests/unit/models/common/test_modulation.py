import torch

from torchtitan_mixtures.models.common.modulation import Modulation


def test_vectors_may_be_ones_at_first_and_conditions_of_another_width():
    modulation = Modulation(3, 4, condition_dim=5, ones=(1, 3))
    modulation.init_weights()
    assert modulation.linear.weight.shape == (12, 5)
    vectors = modulation(torch.randn(2, 5))
    assert [vector.shape for vector in vectors] == [(2, 1, 3)] * 4
    assert [vector.unique().tolist() for vector in vectors] == [[0.0], [1.0], [0.0], [1.0]]


def test_each_token_may_have_a_condition():
    modulation = Modulation(3, 2).double()
    condition = torch.randn(2, 4, 3, dtype=torch.float64)
    for vector, of_token in zip(
        modulation(condition), zip(*map(modulation, condition.unbind(1)), strict=True), strict=True
    ):
        torch.testing.assert_close(vector, torch.cat(of_token, dim=1))
