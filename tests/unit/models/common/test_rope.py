import torch
from torchtitan.models.llama3.model.model import apply_rotary_emb, precompute_freqs_cis

from torchtitan_mixtures.models.common.rope import RoPEScaling, rope_table, rotate, rotation_at


def test_rotation_equals_llama3():
    table = rope_table(64, 9000, 500000.0, RoPEScaling())
    reference = precompute_freqs_cis(64, 9000, 500000.0)
    torch.testing.assert_close(table, torch.view_as_real(reference), rtol=1e-6, atol=1e-6)
    positions = torch.randint(9000, (2, 5))
    for x in (torch.randn(2, 5, 3, 64), torch.randn(2, 5, 3, 64).bfloat16()):
        expected, _ = apply_rotary_emb(x, x, reference, positions)
        actual = rotate(x, rotation_at(table, 5, positions))
        assert actual.dtype == x.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_positions_count_from_zero_by_default():
    table = rope_table(8, 16, 10000.0, RoPEScaling(factor=1.0))
    x = torch.randn(2, 6, 1, 8)
    counted = rotate(x, rotation_at(table, 6, torch.arange(6).expand(2, 6)))
    assert torch.equal(rotate(x, rotation_at(table, 6)), counted)
    assert torch.equal(counted[:, 0], x[:, 0])
    torch.testing.assert_close(counted.norm(dim=-1), x.norm(dim=-1))


def test_factor_one_switches_scaling_off():
    plain = rope_table(8, 16, 10000.0, RoPEScaling(factor=1.0))
    angles = torch.outer(torch.arange(16), 10000.0 ** -(torch.arange(4) / 4))
    torch.testing.assert_close(plain[..., 0], angles.cos())
    scaled = rope_table(8, 16, 10000.0, RoPEScaling(original_max_positions=64))
    assert not torch.allclose(plain, scaled)
