"""MMDiT token by token, from the names of parameters alone, and what tests of its layers share."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from torchtitan_mixtures.models.mmdit.block import BlockConfig, JointBlock
from torchtitan_mixtures.models.mmdit.trunk import MMDiT

Weights = Mapping[str, Tensor]


def shake(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Change all parameters, so that none is zero, and make them float64."""
    generator = torch.Generator().manual_seed(1)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise)
    return module


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def randn_streams(dims: Mapping[str, int], lengths: Collection[int], batch: int = 2, seed: int = 0):
    """Tokens of each modality."""
    return {
        name: randn(batch, length, dim, seed=10 * seed + i)
        for i, ((name, dim), length) in enumerate(zip(dims.items(), lengths, strict=True))
    }


def random_mask(batch: int, seq: int, seed: int = 0) -> Tensor:
    """Some tokens of each sample are seen, the first always."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, seq, generator=generator) < 0.5
    mask[:, 0] = True
    return mask


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def below(w: Weights, prefix: str) -> dict[str, Tensor]:
    """Parameters of a part."""
    return {n.removeprefix(prefix + "."): p for n, p in w.items() if n.startswith(prefix + ".")}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """A product with or without a bias."""
    y = x @ w[f"{name}.weight"].t()
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def softmax(logits: Tensor) -> Tensor:
    """Of a vector."""
    return logits.exp() / logits.exp().sum()


def gelu(x: Tensor) -> Tensor:
    """The exact form."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def layer_norm(x: Tensor, eps: float, w: Weights, name: str) -> Tensor:
    """Of the last axis, with weights if there are some."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return y * w[f"{name}.weight"] + w[f"{name}.bias"] if f"{name}.weight" in w else y


def naive_qk_norm(kind: str, w: Weights, name: str, head: int, x: Tensor) -> Tensor:
    """Norm of a query or key of one head of one token."""
    if kind == "none":
        return x
    weight = w[f"{name}.weight"]
    if kind == "shared":
        return x / (x.square().mean() + 1e-6).sqrt() * weight
    return x / x.square().sum().sqrt() * math.sqrt(len(x)) * weight[head]


def naive_attention(
    w: Weights,
    streams: Mapping[str, Tensor],
    masks: Mapping[str, Tensor | None] | None = None,
    *,
    heads: int,
    head_dim: int,
    qk_norm: str = "none",
    softclamp: float | None = None,
    weights: int = 1,
) -> dict[str, Tensor]:
    """Joint attention by loops over samples, tokens, heads and adaptive weights."""
    outputs = {name: torch.zeros_like(x) for name, x in streams.items() if f"wo.{name}.weight" in w}
    tokens = [(name, n) for name, x in streams.items() for n in range(x.shape[1])]
    for b in range(len(next(iter(streams.values())))):
        q, k, v, gates = {}, {}, {}, {}
        for name, n in tokens:
            x = streams[name][b, n]
            candidates = linear(w, f"wqkv.{name}", x).view(heads, weights, 3, head_dim)
            for h in range(heads):
                gate = torch.ones(1, dtype=x.dtype)
                if weights > 1:
                    gate = softmax(linear(w, f"gates.{name}", x).view(heads, weights)[h])
                parts = (
                    sum(gate[j] * candidates[h, j, part] for j in range(weights))
                    for part in range(3)
                )
                q[name, n, h], k[name, n, h], v[name, n, h] = parts
                for vectors, norm in ((q, "q_norm"), (k, "k_norm")):
                    normed = naive_qk_norm(qk_norm, w, f"{norm}.{name}", h, vectors[name, n, h])
                    vectors[name, n, h] = normed
                gates[name, n, h] = gate
        masks = masks or {}
        seen = [(m, i) for m, i in tokens if masks.get(m) is None or masks[m][b, i]]
        for name, n in tokens:
            if name not in outputs:
                continue
            y = w.get(f"wo.{name}.bias", torch.zeros(streams[name].shape[2], dtype=torch.float64))
            wo = w[f"wo.{name}.weight"].view(-1, heads, weights, head_dim)
            for h in range(heads):
                dots = [q[name, n, h] @ k[m, i, h] / math.sqrt(head_dim) for m, i in seen]
                logits = torch.stack(dots)
                if softclamp is not None:
                    logits = softclamp * torch.tanh(logits / softclamp)
                shares = softmax(logits)
                o = sum(p * v[m, i, h] for p, (m, i) in zip(shares, seen, strict=True))
                for j in range(weights):
                    y = y + gates[name, n, h][j] * (wo[:, h, j] @ o)
            outputs[name][b, n] = y
    return outputs


def naive_mixing(w: Weights, streams: Tensor, dynamic: bool) -> Tensor:
    """`(alpha, beta)` of one token, `(streams, columns)`, from its streams `(streams, dim)`."""
    rows = []
    for k, stream in enumerate(streams):
        row = w["static"][k]
        if dynamic:
            normed = stream / stream.square().mean().sqrt() * w["norm_weight"]
            scale = [w["scale"][0]] * len(row)
            if len(row) > 1:
                scale[-1] = w["scale"][1]
            moves = [scale[j] * torch.tanh(normed @ column) for j, column in enumerate(w["weight"])]
            row = row + torch.stack(moves)
        rows.append(row)
    return torch.stack(rows)


def naive_read(w: Weights, state: Tensor, dynamic: bool):
    """What a branch reads, what goes on, and the shares of its output, of `(b, n, s, dim)`."""
    num_streams = state.shape[2]
    reads, carried, betas = state[:, :, 0].clone(), state.clone(), state[..., 0].clone()
    for b in range(state.shape[0]):
        for n in range(state.shape[1]):
            mixing = naive_mixing(w, state[b, n], dynamic)
            reads[b, n] = sum(mixing[k, 0] * state[b, n, k] for k in range(num_streams))
            if mixing.shape[1] == 1:
                continue
            for j in range(num_streams):
                carried[b, n, j] = sum(
                    mixing[k, 1 + j] * state[b, n, k] for k in range(num_streams)
                )
                betas[b, n, j] = mixing[j, -1]
    return reads, carried, betas


def naive_block(
    block: JointBlock,
    streams: Mapping[str, Tensor],
    condition: Tensor | Mapping[str, Tensor] | None,
    masks: Mapping[str, Tensor | None] | None = None,
    skip: Collection[str] = (),
) -> dict[str, Tensor]:
    """A block from its parameters; streams are `(b, n, dim)`, or `(b, n, s, dim)` with several."""
    w, config = dict(block.named_parameters()), block.config

    def read(kind: str, name: str, x: Tensor):
        if config.num_residual_streams == 1:
            return x, x, None
        return naive_read(below(w, f"{kind}.{name}"), x, config.dynamic_streams)

    def write(carried: Tensor, beta: Tensor | None, out: Tensor) -> Tensor:
        if beta is None:
            return carried + out
        parts = [carried[:, :, j] + beta[:, :, j, None] * out for j in range(carried.shape[2])]
        return torch.stack(parts, dim=2)

    def vector(name: str, number: int) -> Tensor:
        """Shift, scale or gate; the scale is a factor."""
        if condition is None:
            return torch.full((1, 1, 1), float(number % 3 != 0), dtype=torch.float64)
        own = condition if isinstance(condition, Tensor) else condition[name]
        made = linear(w, f"modulation.{name}.linear", own * torch.sigmoid(own))
        dim = block.attention.wqkv[name].in_features
        made = made[..., number * dim : (number + 1) * dim]
        if number % 3 == 1 and config.modulation == "zero":
            made = 1 + made
        return made if made.ndim == 3 else made[:, None]

    inputs, carried, betas, outputs = {}, {}, {}, {}
    for name, x in streams.items():
        u, carried[name], betas[name] = read("attention_streams", name, x)
        normed = layer_norm(u, config.norm_eps, w, f"attention_norm.{name}")
        inputs[name] = normed * vector(name, 1) + vector(name, 0)
    attended = naive_attention(
        below(w, "attention"),
        inputs,
        masks,
        heads=config.n_heads,
        head_dim=config.head_dim,
        qk_norm=config.qk_norm,
        softclamp=config.softclamp,
        weights=config.num_adaptive_weights,
    )
    for name, y in attended.items():
        x = write(carried[name], betas[name], vector(name, 2) * y)
        if name not in skip:
            u, rest, beta = read("ffn_streams", name, x)
            normed = layer_norm(u, config.norm_eps, w, f"ffn_norm.{name}")
            normed = normed * vector(name, 4) + vector(name, 3)
            hidden = gelu(linear(w, f"feed_forward.{name}.w1", normed))
            x = write(rest, beta, vector(name, 5) * linear(w, f"feed_forward.{name}.w2", hidden))
        outputs[name] = x
    return outputs


def naive_trunk(
    trunk: MMDiT,
    tokens: Collection[Tensor],
    masks: Collection[Tensor | None],
    condition: Tensor | None,
) -> list[Tensor]:
    """Registers, streams, blocks, mean of the streams, norm; one condition for all modalities."""
    w = dict(trunk.named_parameters())
    streams, seen, lengths = {}, {}, {}
    for i, (x, mask) in enumerate(zip(tokens, masks, strict=True)):
        registers = w.get(f"registers.{i}", x.new_zeros(0, x.shape[2]))
        x = torch.stack([torch.cat([registers, sample]) for sample in x])
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(mask), len(registers)), mask], dim=1)
        if trunk.num_streams > 1:
            x = torch.stack([x] * trunk.num_streams, dim=2)
        streams[str(i)], seen[str(i)], lengths[str(i)] = x, mask, len(registers)
    for block in trunk.layers.values():
        streams = naive_block(block, streams, condition, seen)
    outputs = []
    for name, x in streams.items():
        x = x[:, lengths[name] :]
        if trunk.num_streams > 1:
            x = sum(x[:, :, j] for j in range(trunk.num_streams)) / trunk.num_streams
        if f"norms.{name}.weight" in w:
            x = x / x.square().mean(-1, keepdim=True).sqrt() * w[f"norms.{name}.weight"]
        outputs.append(x)
    return outputs


def config_of(**fields) -> BlockConfig:
    """A small block."""
    return BlockConfig(**{"n_heads": 2, "head_dim": 4, "condition_dim": 5, **fields})
