"""The mixture of analytic experts by an analytic router is the exact model of all data.

Of data from two normal distributions everything is known in closed form: see `specs` 4.3 in the
words of McAllister et al. 2025, arXiv 2501.05450, equation 5.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.unit.models.mixdiff.helpers import make_model
from torchtitan_mixtures.models.mixdiff.dispatch import choose_top_k
from torchtitan_mixtures.models.mixdiff.model import MixtureOfDiffusers
from torchtitan_mixtures.objectives.flow import RectifiedFlow
from torchtitan_mixtures.objectives.outputs import DenoiserOutput
from torchtitan_mixtures.objectives.patches import patchify
from torchtitan_mixtures.sampling.denoise import sample_euler

CLUSTERS = ((0.25, -1.0, 0.5), (0.75, 2.0, 0.3))
"""Share, mean and standard deviation of each."""


def velocity(cluster, z, t):
    """Optimal velocity of one cluster at `z`, tensors of any one shape."""
    _, mean, std = cluster
    variance = (1 - t) ** 2 * std**2 + t**2
    centred = z - (1 - t) * mean
    return t * centred / variance - (mean + (1 - t) * std**2 * centred / variance)


def log_evidence(cluster, z, t):
    """Logarithm of share and density, up to what all clusters have in common."""
    share, mean, std = cluster
    variance = (1 - t) ** 2 * std**2 + t**2
    return math.log(share) - 0.5 * (z - (1 - t) * mean) ** 2 / variance - 0.5 * variance.log()


class AnalyticRouter(nn.Module):
    """The posterior of the cluster; of images of one pixel. Time comes times 1000."""

    def forward(self, latents, times, **condition):
        z, t = latents[:, 0, 0, 0], times.to(latents.dtype) / 1000
        return torch.stack([log_evidence(cluster, z, t) for cluster in CLUSTERS], 1)


class AnalyticExpert(nn.Module):
    """The optimal velocity of one cluster."""

    def __init__(self, cluster):
        super().__init__()
        self.cluster = cluster

    def forward(self, latents, times, **condition):
        t = times.to(latents.dtype)[:, None, None, None] / 1000
        return DenoiserOutput(patchify(velocity(self.cluster, latents, t), 1))


def make_mixture():
    """The package's mixture, whose router and experts are replaced."""
    model = make_model(experts=("mom/debugmodel_dit",) * 2, expert_names=("low", "high"))
    model.router = AnalyticRouter()
    for name, cluster in zip(("low", "high"), CLUSTERS, strict=True):
        model.experts[name] = AnalyticExpert(cluster)
    assert isinstance(model, MixtureOfDiffusers)
    return model


GOLDEN = [
    (0.3, 0.5, (0.215512, 0.784488), (1.960000, -3.168807), -2.063486),
    (2.0, 0.9, (0.139955, 0.860045), (3.261538, -0.022198), 0.437378),
    (-1.0, 0.2, (1.0, 0.0), (1.0, None), 1.0),
]


@pytest.mark.parametrize(("z", "t", "posterior", "velocities", "expected"), GOLDEN)
def test_the_velocity_of_a_union_of_clusters(z, t, posterior, velocities, expected):
    latents = torch.full((1, 1, 1, 1), z, dtype=torch.float64)
    times = torch.tensor([1000 * t], dtype=torch.float64)
    output = make_mixture()(latents, times)
    assert output.gates[0].tolist() == pytest.approx(posterior, abs=2e-6)
    for cluster, value in zip(CLUSTERS, velocities, strict=True):
        if value is not None:
            found = velocity(cluster, latents.flatten(), times / 1000)
            assert float(found) == pytest.approx(value, abs=1e-6)
    assert float(output.prediction) == pytest.approx(expected, abs=2e-6)


def test_the_noise_of_a_union_of_clusters():
    # Noise with as much variance as data has left: alpha_bar = 1/2, x = 0.3.
    x, half = torch.tensor(0.3, dtype=torch.float64), math.sqrt(0.5)
    evidence, noises = [], []
    for share, mean, std in CLUSTERS:
        variance = torch.tensor(0.5 * std**2 + 0.5, dtype=torch.float64)
        centred = x - half * mean
        evidence.append(math.log(share) - 0.5 * centred**2 / variance - 0.5 * variance.log())
        noises.append(half * centred / variance)
    choice = choose_top_k(torch.stack(evidence)[None], None, 2, renormalize=True)
    posterior = choice.dense(2)[0]
    assert posterior.tolist() == pytest.approx((0.301631, 0.698369), abs=1e-6)
    assert [float(n) for n in noises] == pytest.approx((1.139411, -1.445629), abs=1e-6)
    assert float((posterior * torch.stack(noises)).sum()) == pytest.approx(-0.665900, abs=1e-6)


def test_sampling_from_the_mixture_gives_the_moments_of_the_data():
    model, count = make_mixture(), 20_000
    noise = torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def denoiser(latents, times):
        return model(latents, times).prediction[:, :, :, None]

    drawn = sample_euler(denoiser, noise, RectifiedFlow(), 200).double().flatten()
    mean = sum(share * mean for share, mean, _ in CLUSTERS)
    second = sum(share * (mean**2 + std**2) for share, mean, std in CLUSTERS)
    # Standard errors: 0.010 of the mean, 0.002 of the shares; 200 steps of Euler add as much.
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.04)
    assert float(drawn.square().mean()) == pytest.approx(second, abs=0.08)
    low = drawn[drawn < 0.5]
    assert len(low) / count == pytest.approx(0.25, abs=0.015)
    assert float(low.mean()) == pytest.approx(-1.0, abs=0.03)
    assert float(low.std()) == pytest.approx(0.5, abs=0.03)
    assert float(drawn[drawn > 0.5].std()) == pytest.approx(0.3, abs=0.02)
