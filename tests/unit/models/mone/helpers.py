"""What the tests of this family share: small models, and naive ones to compare with.

Naive versions go token by token, in the order of the image, and read each token's slice of a weight
where it is used. They share nothing with the code but the names of parameters.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.model import MoNE


def tiny_args(**fields) -> MoNEModelArgs:
    """Arguments of a model that runs in milliseconds: 16 tokens of width 16, three experts."""
    defaults = {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "patch_size": 2,
        "in_channels": 3,
        "image_size": 8,
        "num_classes": 5,
        "mlp_ratio": 2.0,
        "num_experts": 3,
        "capacity": 0.6,
        "alpha_init": 0.3,
        "init_seed": 0,
    }
    return MoNEModelArgs(**{**defaults, **fields})


def shake(module: nn.Module, scale: float = 0.3) -> None:
    """Change all parameters, so that none is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def build(args: MoNEModelArgs, dtype: torch.dtype = torch.float64) -> MoNE:
    """A model all of whose parts do something, alpha included."""
    model = MoNE(args)
    model.init_weights()
    shake(model)
    return model.to(dtype)


def random_images(
    args: MoNEModelArgs, batch: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Images whose pixels are in [-1, 1]."""
    shape = (batch, args.in_channels, args.image_size, args.image_size)
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(shape, generator=generator, dtype=dtype) - 1


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(output: Tensor, inputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """Of a random combination of all outputs; zeros where an input plays no part."""
    weights = randn(*output.shape, seed=seed).to(output.dtype)
    found = torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def width(expert: int, dim: int, num_experts: int) -> int:
    """Channels of an expert, counted from 0; of -1, who skips, none."""
    return 0 if expert < 0 else dim // 2 ** (num_experts - 1 - expert)


def gelu(x: Tensor) -> Tensor:
    """The exact form."""
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def naive_choice(scores: Sequence[Sequence[float]], counts: Sequence[int]) -> list[int]:
    """Algorithm 1 for one image: expert of each token, by sorting.

    Args:
        scores: Of each token a number for each expert.
        counts: Tokens of each expert, the smallest first; who is left over gets -1.
    """
    experts = [-1] * len(scores)
    for expert in reversed(range(len(counts))):
        free = [token for token, of_token in enumerate(experts) if of_token == -1]
        free.sort(key=lambda token: -scores[token][expert])
        for token in free[: counts[expert]]:
            experts[token] = expert
    return experts


def naive_expand(x: Tensor, weight: Tensor, bias: Tensor, widths: Sequence[int]) -> Tensor:
    """`(tokens, in)`, each token's first channels -> `(tokens, out)`."""
    rows = [weight[:, :d] @ token[:d] + bias for token, d in zip(x, widths, strict=True)]
    return torch.stack(rows)


def naive_contract(x: Tensor, weight: Tensor, bias: Tensor, widths: Sequence[int]) -> Tensor:
    """`(tokens, in)` -> `(tokens, out)`, each token's first channels."""
    rows = []
    for token, d in zip(x, widths, strict=True):
        zeros = torch.zeros(weight.shape[0] - d, dtype=x.dtype)
        rows.append(torch.cat([weight[:d] @ token + bias[:d], zeros]))
    return torch.stack(rows)


def naive_attention(w: dict[str, Tensor], x: Tensor, widths: Sequence[int], heads: int) -> Tensor:
    """Attention of one image's normed tokens `(tokens, dim)`."""
    dim = x.shape[1]
    size = dim // heads
    qkv = naive_expand(x, w["attention.wqkv.weight"], w["attention.wqkv.bias"], widths)
    outputs = []
    for head in range(heads):
        start = 3 * size * head
        q, k, v = (qkv[:, start + i * size : start + (i + 1) * size] for i in range(3))
        weights = (q @ k.t() / math.sqrt(size)).exp()
        outputs.append(weights @ v / weights.sum(1, keepdim=True))
    attended = torch.cat(outputs, dim=1)
    return naive_contract(attended, w["attention.wo.weight"], w["attention.wo.bias"], widths)


def naive_block(
    w: dict[str, Tensor],
    x: Tensor,
    experts: Sequence[int],
    num_experts: int,
    heads: int,
    offsets: Sequence[Tensor | float] | None = None,
) -> Tensor:
    """A block for one image.

    Args:
        w: Parameters by the names they have in the block.
        x: `(tokens, dim)`.
        experts: Of each token; of -1 the block knows nothing.
        num_experts: Number of experts.
        heads: Attention heads.
        offsets: `alpha r` of each token; None: 0.
    """
    staying = [token for token, expert in enumerate(experts) if expert >= 0]
    widths = [width(experts[token], x.shape[1], num_experts) for token in staying]
    z = x[staying]
    z = z + naive_attention(
        w, norm(z, w["attention_norm.weight"], w["attention_norm.bias"]), widths, heads
    )
    hidden = naive_expand(
        norm(z, w["ffn_norm.weight"], w["ffn_norm.bias"]),
        w["feed_forward.w1.weight"],
        w["feed_forward.w1.bias"],
        widths,
    )
    branch = naive_contract(
        gelu(hidden), w["feed_forward.w2.weight"], w["feed_forward.w2.bias"], widths
    )
    rows = list(x)
    for place, token in enumerate(staying):
        offset = 0.0 if offsets is None else offsets[token]
        rows[token] = z[place] + (1 + offset) * branch[place]
    return torch.stack(rows)


def naive_tokens(model: MoNE, image: Tensor) -> Tensor:
    """Embedded patches of one image, pixel by pixel, `(seq, dim)`."""
    args, w = model.model_args, dict(model.named_parameters())
    p, grid = args.patch_size, args.image_size // args.patch_size
    tokens = []
    for row in range(grid):
        for column in range(grid):
            pixels = [
                image[channel, row * p + y, column * p + x]
                for y in range(p)
                for x in range(p)
                for channel in range(args.in_channels)
            ]
            patch = torch.stack(pixels)
            tokens.append(w["embedder.proj.weight"] @ patch + w["embedder.proj.bias"])
    if args.pool == "class_token":
        tokens.insert(0, w["embedder.class_token"])
    return torch.stack(tokens) + w["embedder.positions"]


def naive_routing(
    model: MoNE,
    x: Tensor,
    router: int,
    counts: Sequence[int],
    scores: Tensor | None = None,
) -> tuple[list[int], list[Tensor]]:
    """Expert of each token of one image, and its probability.

    Args:
        model: The model.
        x: `(seq, dim)`.
        router: Number of the router.
        counts: Image tokens of each expert.
        scores: `(image tokens, experts)`, what experts choose by; None: the probabilities.
    """
    args, w = model.model_args, dict(model.named_parameters())
    name = f"routers.{0 if args.shared_router else router}"
    powers = (x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]).exp()
    probabilities = powers / powers.sum(1, keepdim=True)
    largest, first = args.num_experts - 1, int(args.pool == "class_token")
    table = (probabilities[first:] if scores is None else scores).tolist()
    if args.routing == "argmax":
        experts = [row.index(max(row)) for row in table]
    else:
        experts = naive_choice(table, counts)
    experts = [largest] * first + experts
    return experts, [probabilities[t, max(e, 0)] for t, e in enumerate(experts)]


def naive_forward(
    model: MoNE,
    images: Tensor,
    counts: Sequence[int] | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, list[list[list[int]]]]:
    """A whole model, one image after the other, whose tokens stay in the image's order.

    Args:
        model: The model; its parameters are read by name.
        images: `(batch, channels, height, width)`.
        counts: Image tokens of each expert; not of a dense model.
        scores: `(batch, routers, image tokens, experts)` or None.

    Returns:
        Logits, and of each image and router the experts of all tokens.
    """
    args, w = model.model_args, dict(model.named_parameters())
    left = args.n_layers - args.router_layer
    places = [args.router_layer + i * left // args.num_routers for i in range(args.num_routers)]
    logits, choices = [], []
    for number, image in enumerate(images):
        x = naive_tokens(model, image)
        experts, chosen = [args.num_experts - 1] * len(x), None
        chosen_by_router: list[list[int]] = []
        for layer in range(args.n_layers):
            if args.num_experts > 1 and layer in places:
                experts, chosen = naive_routing(
                    model,
                    x,
                    len(chosen_by_router),
                    counts,
                    None if scores is None else scores[number, len(chosen_by_router)],
                )
                chosen_by_router.append(experts)
            offsets = None
            if chosen is not None:
                alpha = w["router_scale.alpha"][layer if args.alpha_per_layer else 0]
                offsets = [alpha * probability for probability in chosen]
            prefix = f"layers.{layer}."
            block = {
                name.removeprefix(prefix): parameter
                for name, parameter in w.items()
                if name.startswith(prefix)
            }
            x = naive_block(block, x, experts, args.num_experts, args.n_heads, offsets)
        x = norm(x, w["norm.weight"], w["norm.bias"], args.norm_eps)
        pooled = x[0] if args.pool == "class_token" else sum(x) / len(x)
        logits.append(w["head.weight"] @ pooled + w["head.bias"])
        choices.append(chosen_by_router)
    return torch.stack(logits), choices
