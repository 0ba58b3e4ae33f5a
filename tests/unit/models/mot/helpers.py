"""What the tests of this family share: small models, and a naive one to compare with."""

import math

import torch
from torch import Tensor

from torchtitan_mixtures.models.mot.args import MoTModelArgs
from torchtitan_mixtures.models.mot.model import MoTTransformer

NAMES = ["text", "image", "speech"]


def tiny_args(n_modalities: int = 2, **fields) -> MoTModelArgs:
    """Arguments of a model that runs in milliseconds."""
    defaults = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 48,
        "multiple_of": 16,
        "max_seq_len": 32,
        "n_modalities": n_modalities,
        "modality_names": NAMES[:n_modalities],
        "init_seed": 0,
    }
    return MoTModelArgs(**{**defaults, **fields})


def build(args: MoTModelArgs, dtype: torch.dtype = torch.float64) -> MoTTransformer:
    """An initialised model with norm scales that differ and attention that is far from uniform."""
    model = MoTTransformer(args)
    model.init_weights()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "layers" in name:
                parameter.mul_(6)
    return model.to(dtype)


def random_batch(
    n_modalities: int = 2, batch: int = 2, seq: int = 19, seed: int = 0, vocab_size: int = 48
) -> tuple[Tensor, Tensor]:
    """Token ids `(batch, seq)` and modality masks `(batch, modalities, seq)`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch, seq), generator=generator)
    modality = torch.randint(n_modalities, (batch, seq), generator=generator)
    return tokens, masks_of(modality, n_modalities)


def masks_of(modality: Tensor, n_modalities: int) -> Tensor:
    """`(batch, seq)` modality numbers -> `(batch, modalities, seq)` masks."""
    return torch.stack([modality == m for m in range(n_modalities)], dim=1)


def naive_forward(
    model: MoTTransformer,
    tokens: Tensor,
    modality_masks: Tensor,
    document_ids: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Algorithm 1 of the paper, one token at a time, from the state dict alone."""
    args, weights = model.model_args, dict(model.named_parameters())
    towers = args.tower_of_modality or list(range(args.n_modalities))
    tower_names = [args.modality_names[towers.index(t)] for t in sorted(set(towers))]
    heads, kv_heads = args.n_heads, args.n_kv_heads or args.n_heads
    width = args.dim // heads

    def weight(component: str, tower: str, is_untied: bool) -> Tensor:
        return weights[f"{component}.{tower if is_untied else tower_names[0]}.weight"]

    def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * (x.square().mean() + 1e-5) ** -0.5 * scale

    def rope(x: Tensor, position: int) -> Tensor:
        out = []
        for pair in range(width // 2):
            frequency = args.rope_theta ** (-2 * pair / width)
            wavelength = 2 * math.pi / frequency
            if wavelength > 8192:
                frequency /= 8
            elif wavelength > 8192 / 4:
                smooth = (8192 / wavelength - 1) / 3
                frequency = (1 - smooth) * frequency / 8 + smooth * frequency
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            even, odd = x[2 * pair], x[2 * pair + 1]
            out += [even * cos - odd * sin, even * sin + odd * cos]
        return torch.stack(out)

    logits = []
    for b, sequence in enumerate(tokens.tolist()):
        tower = []
        for i in range(len(sequence)):
            (modality,) = [m for m in range(args.n_modalities) if modality_masks[b, m, i]]
            tower.append(tower_names[towers[modality]])
        place = list(range(len(sequence))) if positions is None else positions[b].tolist()
        document = [0] * len(sequence) if document_ids is None else document_ids[b].tolist()
        h = [weights["tok_embeddings.weight"][token] for token in sequence]
        for layer in range(args.n_layers):
            prefix = f"layers.{layer}."
            queries, keys, values = [], [], []
            for i, x in enumerate(h):
                if args.norm_position == "pre":
                    x = rms_norm(x, weight(prefix + "attention_norm", tower[i], args.untie_norm))
                project = [
                    (weight(prefix + f"attention.{w}", tower[i], args.untie_attention) @ x)
                    for w in ("wq", "wk", "wv")
                ]
                q, k = project[0].view(heads, width), project[1].view(kv_heads, width)
                if args.qk_normalization:
                    scale_q, scale_k = (
                        weight(prefix + f"attention.{n}", tower[i], args.untie_attention)
                        for n in ("q_norm", "k_norm")
                    )
                    q = torch.stack([rms_norm(head, scale_q) for head in q])
                    k = torch.stack([rms_norm(head, scale_k) for head in k])
                queries.append(torch.stack([rope(head, place[i]) for head in q]))
                keys.append(torch.stack([rope(head, place[i]) for head in k]))
                values.append(project[2].view(kv_heads, width))
            for i in range(len(h)):
                seen = [j for j in range(i + 1) if document[j] == document[i]]
                attended = []
                for head in range(heads):
                    group = head // (heads // kv_heads)
                    scores = torch.stack([queries[i][head] @ keys[j][group] for j in seen])
                    attention = (scores / math.sqrt(width)).softmax(0)
                    attended.append(
                        sum(a * values[j][group] for a, j in zip(attention, seen, strict=True))
                    )
                wo = weight(prefix + "attention.wo", tower[i], args.untie_attention)
                branch = wo @ torch.cat(attended)
                if args.norm_position == "post":
                    scale = weight(prefix + "attention_norm", tower[i], args.untie_norm)
                    branch = rms_norm(branch, scale)
                h[i] = h[i] + branch
            for i, x in enumerate(h):
                scale = weight(prefix + "ffn_norm", tower[i], args.untie_norm)
                w1, w2, w3 = (
                    weight(prefix + f"feed_forward.{w}", tower[i], args.untie_ffn)
                    for w in ("w1", "w2", "w3")
                )
                x = rms_norm(x, scale) if args.norm_position == "pre" else x
                gate = w1 @ x
                branch = w2 @ (gate * torch.sigmoid(gate) * (w3 @ x))
                if args.norm_position == "post":
                    branch = rms_norm(branch, scale)
                h[i] = h[i] + branch
        for i, x in enumerate(h):
            name = f"norm.{tower[i]}.weight" if args.untie_final_norm else "norm.weight"
            h[i] = weights["output.weight"] @ rms_norm(x, weights[name])
        logits.append(torch.stack(h))
    return torch.stack(logits)
