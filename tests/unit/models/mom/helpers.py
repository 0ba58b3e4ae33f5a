"""What the tests of this family share: small models, and naive ones to compare with."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.models.mom.mixers import MixtureOfMixers
from torchtitan_mixtures.models.mom.model import MoM


def tiny_args(**fields) -> MoMModelArgs:
    """Arguments of a model that runs in milliseconds: 16 tokens of width 32."""
    defaults = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "patch_size": 4,
        "in_channels": 3,
        "image_size": 16,
        "num_classes": 5,
        "num_timestep_features": 16,
        "init_seed": 0,
    }
    return MoMModelArgs(**{**defaults, **fields})


def shake(module: torch.nn.Module, scale: float = 0.2) -> None:
    """Change all parameters, so that none is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def build(args: MoMModelArgs, dtype: torch.dtype = torch.float64) -> MoM:
    """A model whose blocks do something, with routers that do not treat all samples alike."""
    model = MoM(args)
    model.init_weights()
    shake(model)
    return model.to(dtype)


def build_mixture(*arguments, dtype: torch.dtype = torch.float64, **fields) -> MixtureOfMixers:
    """A mixture alone, as `build`."""
    mixture = MixtureOfMixers(*arguments, **fields)
    with init.parameter_names(mixture, 0):
        mixture.init_weights()
    shake(mixture)
    return mixture.to(dtype)


def random_inputs(
    args: MoMModelArgs, batch: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, times and classes, one of which is "no class"."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, args.in_channels, args.image_size, args.image_size)
    images = torch.randn(shape, generator=generator, dtype=dtype)
    times = 999 * torch.rand(batch, generator=generator, dtype=torch.float64)
    labels = torch.randint(args.num_classes, (batch,), generator=generator)
    labels[0] = args.num_classes
    return images, times.to(dtype), labels


def random_tokens(batch: int = 6, seq: int = 16, dim: int = 32, seed: int = 0) -> Tensor:
    """Activations whose samples differ in their mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, seq, dim, generator=generator, dtype=torch.float64)
    return x + torch.randn(batch, 1, dim, generator=generator, dtype=torch.float64)


def gelu(x: Tensor) -> Tensor:
    """The tanh form."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_choice(scores: Sequence[float], tokens: int, top_k: int, least: tuple[int, int]):
    """Numbers of the chosen experts, given the least number of either kind."""
    ranking = sorted(range(len(scores)), key=lambda e: -scores[e])
    chosen = [e for e in ranking if e < tokens][: least[0]]
    chosen += [e for e in ranking if e >= tokens][: least[1]]
    chosen += [e for e in ranking if e not in chosen][: top_k - len(chosen)]
    return chosen


def naive_mixture(
    weights: dict[str, Tensor],
    x: Tensor,
    top_k: int = 2,
    least: tuple[int, int] = (1, 1),
    noise: Tensor | None = None,
    sigma: float = 0.0,
    experts: Sequence[Sequence[int]] | None = None,
):
    """A mixture one sample and one expert at a time, from its parameters alone.

    Returns:
        Outputs, and of each sample: probabilities, chosen experts, the partition function's log.
    """
    num_token = weights["token_mixers.w1"].shape[0] if "token_mixers.w1" in weights else 0
    outputs, probabilities, choices, logs = [], [], [], []
    for b, sample in enumerate(x):
        seen = sum(sample) / len(sample)
        if noise is not None:
            seen = seen * (1 + sigma * noise[b])
        logits = weights["router.weight"] @ seen
        p = logits.exp() / logits.exp().sum()
        chosen = experts[b] if experts else naive_choice(p.tolist(), num_token, top_k, least)
        total = sum(p[e] for e in chosen) if top_k > 1 else 1
        out = torch.zeros_like(sample)
        for e in chosen:
            kind, number = ("token", e) if e < num_token else ("channel", e - num_token)
            w1, b1, w2, b2 = (
                weights[f"{kind}_mixers.{n}"][number] for n in ("w1", "b1", "w2", "b2")
            )
            rows = sample.t() if kind == "token" else sample
            mixed = torch.stack([w2 @ gelu(w1 @ row + b1) + b2 for row in rows])
            out = out + p[e] / total * (mixed.t() if kind == "token" else mixed)
        outputs.append(out)
        probabilities.append(p)
        choices.append(list(chosen))
        logs.append(logits.exp().sum().log())
    return torch.stack(outputs), torch.stack(probabilities), choices, torch.stack(logs)


def naive_forward(model: MoM, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """A whole model with typed top-2, pixel by pixel, from the state dict alone."""
    args, w = model.model_args, dict(model.named_parameters())
    grid, p, half = (
        args.image_size // args.patch_size,
        args.patch_size,
        args.num_timestep_features // 2,
    )

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + 1e-6
        ).sqrt()

    def place(row: int, column: int) -> Tensor:
        quarter = args.dim // 4
        values = []
        for number in (column, row):
            angles = [number * 10000 ** (-i / quarter) for i in range(quarter)]
            values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        return torch.tensor(values, dtype=torch.float64)

    predictions = []
    for image, time, label in zip(images, times.tolist(), labels.tolist(), strict=True):
        angles = [time * math.exp(-math.log(10000) * i / half) for i in range(half)]
        features = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        c = linear("t_embedder.w1", torch.tensor(features, dtype=torch.float64))
        c = silu(linear("t_embedder.w2", silu(c)) + w["y_embedder.weight"][label])
        tokens = []
        for row in range(grid):
            for column in range(grid):
                patch = [
                    image[channel, row * p + y, column * p + x]
                    for y in range(p)
                    for x in range(p)
                    for channel in range(args.in_channels)
                ]
                tokens.append(linear("x_embedder", torch.stack(patch)) + place(row, column))
        x = torch.stack(tokens)
        for layer in range(args.n_layers):
            prefix = f"layers.{layer}."
            mixer = {
                name.removeprefix(prefix + "mixer."): parameter
                for name, parameter in w.items()
                if name.startswith(prefix + "mixer.")
            }
            vectors = linear(prefix + "modulation.linear", c).view(6, -1)
            shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = vectors
            mixed, *_ = naive_mixture(mixer, (norm(x) * (1 + scale) + shift)[None])
            x = x + gate * mixed[0]
            hidden = gelu(linear(prefix + "feed_forward.w1", norm(x) * (1 + ffn_scale) + ffn_shift))
            x = x + ffn_gate * linear(prefix + "feed_forward.w2", hidden)
        shift, scale = linear("final_layer.modulation.linear", c).view(2, -1)
        predictions.append(linear("final_layer.linear", norm(x) * (1 + scale) + shift))
    return torch.stack(predictions)
