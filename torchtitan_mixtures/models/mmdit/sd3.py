"""Weights of Stable Diffusion 3, in and out, as diffusers names and lays them out.

All functions are pure and work on state dicts: parameter name -> plain tensor. The model there is
`SD3Transformer2DModel`. With a prompt that is called text:

    here                                     diffusers
    x_embedder                               pos_embed.proj
    t_embedder.{w1,w2}                       time_text_embed.timestep_embedder.linear_{1,2}
    pooled_embedder.text.{w1,w2}             time_text_embed.text_embedder.linear_{1,2}
    prompt_embedder.text                     context_embedder
    layers.{i}.modulation.image.linear       transformer_blocks.{i}.norm1.linear
               modulation.text.linear        .. norm1_context.linear
               attention.wqkv.image          .. attn.to_q, attn.to_k, attn.to_v
               attention.wqkv.text           .. attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
               attention.wo.{image,text}     .. attn.to_out.0, attn.to_add_out
               attention.{q,k}_norm.image    .. attn.norm_{q,k}
               attention.{q,k}_norm.text     .. attn.norm_added_{q,k}
               feed_forward.image.{w1,w2}    .. ff.net.0.proj, ff.net.2
               feed_forward.text.{w1,w2}     .. ff_context.net.0.proj, ff_context.net.2
    final_layer.modulation.linear            norm_out.linear
    final_layer.linear                       proj_out

There patches are embedded by a convolution, weight `(dim, channels, patch_row, patch_col)`, and
where a norm has no gate after it (text in the last block, the final layer) the scale comes before
the shift. Patches are put out in the same order, `(patch_row, patch_col, channel)`.

There is one more tensor, `pos_embed.pos_embed`: a square table of places, out of whose middle those
of an image are cut. It is in checkpoints, and may be another than diffusers computes for a new
model. There is no table here: with `n` places a side in it, and `s` of a square image, what is
computed is place `(i - (n - s) / 2) position_grid / s` for row or column `i` of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchtitan_mixtures.models.common.embeddings import centred_position_table
from torchtitan_mixtures.models.mmdit.args import IMAGE, MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser

State = dict[str, Tensor]
Config = Mapping[str, Any]

CLASS = "SD3Transformer2DModel"
POSITIONS = "pos_embed.pos_embed"

_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": [],
    "qk_norm": None,
}
"""What keys that are not in a `config.json` mean."""
_QK_NORMS = {"none": None, "shared": "rms_norm"}
_NUM_TIMESTEP_FEATURES = 256
_TABLE = 3  # height of the table of places / that of square images, as in Stable Diffusion 3
_MLP_RATIO = 4


class _Part(NamedTuple):
    """A layer here, and the layers it is there."""

    ours: str
    theirs: tuple[str, ...]
    layout: Literal["same", "scale_first", "fused", "patches"] = "same"


def check_model(args: MMDiTModelArgs) -> None:
    """Check that a model has nothing that Stable Diffusion 3 does not have.

    Raises:
        ValueError: Names each field that makes it another model.
    """
    allowed = {
        "qk_norm": tuple(_QK_NORMS),
        "softclamp": (None,),
        "modulation": ("zero",),
        "num_residual_streams": (1,),
        "num_adaptive_weights": (1,),
        "single_stream": (False,),
        "learned_variance": (False,),
        "mlp_ratio": (_MLP_RATIO,),
        "num_timestep_features": (_NUM_TIMESTEP_FEATURES,),
    }
    problems = [
        f"{name} = {getattr(args, name)!r} (there {' or '.join(map(repr, values))})"
        for name, values in allowed.items()
        if getattr(args, name) not in values
    ]
    if args.registers:
        problems.append(f"num_registers = {tuple(args.num_registers)} (there none)")
    if any(width != args.dim for width in args.prompt_dims):
        problems.append(f"prompt_dims = {tuple(args.prompt_dims)} (there dim = {args.dim})")
    kinds = [spec.kind if spec.kind == "tokens" else spec.pooled_dim for spec in args.prompts]
    if len(kinds) != 1 or kinds[0] in ("tokens", 0):
        problems.append(
            f"prompts {', '.join(f'{spec.name} ({spec.kind})' for spec in args.prompts)} (there "
            "one, of embeddings with pooled ones: multimodal.text_encoders or text_embeddings)"
        )
    if problems:
        raise ValueError(
            f"the model is not that of Stable Diffusion 3: {', '.join(problems)}. Choose another "
            "model.flavor, other data, or another objective."
        )


def sd3_config(args: MMDiTModelArgs) -> dict[str, Any]:
    """Make the `config.json` of a model that passes `check_model`."""
    spec = args.prompts[0]
    return {
        "_class_name": CLASS,
        "sample_size": args.image_size,
        "patch_size": args.patch_size,
        "in_channels": args.in_channels,
        "num_layers": args.n_layers,
        "attention_head_dim": args.head_dim,
        "num_attention_heads": args.n_heads,
        "joint_attention_dim": spec.dim,
        "caption_projection_dim": args.dim,
        "pooled_projection_dim": spec.pooled_dim,
        "out_channels": args.out_channels,
        "pos_embed_max_size": _TABLE * _image_side(args),
        "dual_attention_layers": [],
        "qk_norm": _QK_NORMS[args.qk_norm],
    }


def check_config(config: Config, args: MMDiTModelArgs) -> None:
    """Check that a `config.json` is that of a model that passes `check_model`.

    Raises:
        ValueError: Names each key that says something else.
    """
    kind = config.get("_class_name")
    if kind != CLASS:
        raise ValueError(f"config.json: _class_name = {kind!r}: only {CLASS!r} is imported.")
    if dual := config.get("dual_attention_layers"):
        raise ValueError(
            f"config.json: dual_attention_layers = {dual}: blocks with a second attention, of the "
            "image alone (Stable Diffusion 3.5 medium has them), are not supported here. Import a "
            "model without them."
        )
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    expected, found = sd3_config(args), _DEFAULTS | given
    if found["out_channels"] is None:
        found["out_channels"] = found["in_channels"]
    sample, size, side = (
        found.pop("sample_size"),
        found.pop("pos_embed_max_size"),
        _image_side(args),
    )
    del found["dual_attention_layers"]
    problems = [
        f"{key} = {value!r} ({f'here {expected[key]!r}' if key in expected else 'not known here'})"
        for key, value in found.items()
        if key not in expected or value != expected[key]
    ]
    if not isinstance(sample, int) or sample < args.patch_size:
        problems.append(f"sample_size = {sample!r} (here {args.image_size})")
    if not isinstance(size, int) or size < side or (size - side) % 2:
        problems.append(f"pos_embed_max_size = {size!r} (here {side} or an even number more)")
    if problems:
        raise ValueError(
            f"config.json: {', '.join(problems)}; that is another model. Choose another "
            "model.flavor if sizes or qk_norm differ, other encoders or embeddings of prompts if "
            "joint_attention_dim or pooled_projection_dim do."
        )


def from_sd3(weights: Mapping[str, Tensor], args: MMDiTModelArgs) -> State:
    """Make parameters of weights of diffusers.

    Args:
        weights: Theirs; what `check_positions` is for may be among them.
        args: Of a model that passes `check_model`.

    Returns:
        All parameters, in the precision of the weights.

    Raises:
        ValueError: Weights are missing, unknown, or of another shape.
    """
    with torch.device("meta"):
        model = MMDiTDenoiser(args)
    shapes = {name: parameter.detach() for name, parameter in model.named_parameters()}
    _check_weights(weights, to_sd3(shapes, args))
    state = {}
    for part in _parts(args):
        for leaf in ("weight", "bias"):
            if f"{part.ours}.{leaf}" in shapes:
                pieces = [weights[f"{name}.{leaf}"] for name in part.theirs]
                state[f"{part.ours}.{leaf}"] = _join(part, pieces, args)
    return state


def to_sd3(state: Mapping[str, Tensor], args: MMDiTModelArgs) -> State:
    """Make weights of diffusers of all parameters, the inverse of `from_sd3`."""
    weights = {}
    for part in _parts(args):
        for leaf in ("weight", "bias"):
            # Norms have no bias; of the last block text has no output.
            if (tensor := state.get(f"{part.ours}.{leaf}")) is not None:
                pieces = _split(part, tensor, args)
                names = (f"{name}.{leaf}" for name in part.theirs)
                weights |= zip(names, pieces, strict=True)
    return weights


def sd3_positions(args: MMDiTModelArgs, size: int | None = None) -> Tensor:
    """Make `pos_embed.pos_embed`, out of whose middle the places of an image are cut.

    Args:
        args: Of a model that passes `check_model`.
        size: Height and width of the table; None: as `sd3_config` says.

    Returns:
        `(1, size**2, dim)` float32.
    """
    size = _TABLE * _image_side(args) if size is None else size
    side, scaled_side = _position_sides(args)
    device = torch.device("cpu")
    return centred_position_table(args.dim, size, size, side, scaled_side, device)[None]


def check_positions(table: Tensor | None, config: Config, args: MMDiTModelArgs) -> None:
    """Check that a checkpoint's places are those that a model computes.

    Args:
        table: `pos_embed.pos_embed`, which need not be what diffusers computes for a new model;
            None: it is.
        config: A `config.json` that passes `check_config`.
        args: Of the model.

    Raises:
        ValueError: They are others; says which.
    """
    values = _DEFAULTS | dict(config)
    size, base = values["pos_embed_max_size"], values["sample_size"] // args.patch_size
    ours = sd3_positions(args, size)
    if table is None:
        table = centred_position_table(args.dim, size, size, size, base, ours.device)[None]
    if table.shape != ours.shape or not table.is_floating_point():
        raise ValueError(
            f"{POSITIONS} is {tuple(table.shape)}, {table.dtype}: with pos_embed_max_size = {size} "
            f"in config.json it would have to be {tuple(ours.shape)}, floating-point numbers."
        )
    table, tolerance = table.float(), max(1e-4, torch.finfo(table.dtype).eps)
    if torch.allclose(table, ours, rtol=0, atol=tolerance):
        return
    found, expected = (_first_and_last(places, size) for places in (table, ours))
    raise ValueError(
        f"{POSITIONS}: its {size} places a side seem to go from {found[0]:.1f} to {found[1]:.1f}, "
        f"those of the model go from {expected[0]:.1f} to {expected[1]:.1f}. Set "
        "multimodal.image_size to what the checkpoint was trained with (in latents), or choose a "
        "flavour with another position_grid; tables of something else than the sines and cosines "
        "of places that are equally far apart cannot be imported."
    )


def _first_and_last(table: Tensor, size: int) -> tuple[float, float]:
    """Read the places of the first row's ends off a table, `(1, size**2, dim)`."""
    quarter = table.shape[2] // 4
    frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)
    slow = int((frequencies * 2 * size > torch.pi).sum().clamp(max=quarter - 1))  # no full turn
    ends = table[0, [0, size - 1]]
    places = torch.atan2(ends[:, slow], ends[:, quarter + slow]) / frequencies[slow]
    return places[0].item(), places[1].item()


def _image_side(args: MMDiTModelArgs) -> int:
    return args.image_size // args.patch_size


def _position_sides(args: MMDiTModelArgs) -> tuple[int, int]:
    """Side of the square whose middle images have the places of, and where its places end."""
    return _image_side(args), args.position_grid or _image_side(args)


def _parts(args: MMDiTModelArgs) -> list[_Part]:
    """All layers of a model."""
    text = args.prompts[0].name
    time, pooled = (
        "time_text_embed.timestep_embedder.linear",
        "time_text_embed.text_embedder.linear",
    )
    parts = [
        _Part("x_embedder", ("pos_embed.proj",), "patches"),
        _Part("t_embedder.w1", (f"{time}_1",)),
        _Part("t_embedder.w2", (f"{time}_2",)),
        _Part(f"pooled_embedder.{text}.w1", (f"{pooled}_1",)),
        _Part(f"pooled_embedder.{text}.w2", (f"{pooled}_2",)),
        _Part(f"prompt_embedder.{text}", ("context_embedder",)),
        _Part("final_layer.modulation.linear", ("norm_out.linear",), "scale_first"),
        _Part("final_layer.linear", ("proj_out",)),
    ]
    for i in range(args.n_layers):
        ours, theirs = f"layers.{i}", f"transformer_blocks.{i}"
        parts += [
            _Part(f"{ours}.{part.ours}", tuple(f"{theirs}.{n}" for n in part.theirs), part.layout)
            for part in _parts_of_block(text, is_last=i == args.n_layers - 1)
        ]
    return parts


def _parts_of_block(text: str, is_last: bool) -> list[_Part]:
    """The layers of a block that it can have."""
    context_qkv = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    order = "scale_first" if is_last else "same"
    return [
        _Part(f"modulation.{IMAGE}.linear", ("norm1.linear",)),
        _Part(f"modulation.{text}.linear", ("norm1_context.linear",), order),
        _Part(f"attention.wqkv.{IMAGE}", ("attn.to_q", "attn.to_k", "attn.to_v"), "fused"),
        _Part(f"attention.wqkv.{text}", context_qkv, "fused"),
        _Part(f"attention.wo.{IMAGE}", ("attn.to_out.0",)),
        _Part(f"attention.wo.{text}", ("attn.to_add_out",)),
        _Part(f"attention.q_norm.{IMAGE}", ("attn.norm_q",)),
        _Part(f"attention.k_norm.{IMAGE}", ("attn.norm_k",)),
        _Part(f"attention.q_norm.{text}", ("attn.norm_added_q",)),
        _Part(f"attention.k_norm.{text}", ("attn.norm_added_k",)),
        _Part(f"feed_forward.{IMAGE}.w1", ("ff.net.0.proj",)),
        _Part(f"feed_forward.{IMAGE}.w2", ("ff.net.2",)),
        _Part(f"feed_forward.{text}.w1", ("ff_context.net.0.proj",)),
        _Part(f"feed_forward.{text}.w2", ("ff_context.net.2",)),
    ]


def _join(part: _Part, pieces: list[Tensor], args: MMDiTModelArgs) -> Tensor:
    """From the tensors of a layer there to the one here."""
    if part.layout == "fused":
        heads = [piece.unflatten(0, (args.n_heads, args.head_dim)) for piece in pieces]
        return torch.stack(heads, 1).flatten(0, 2)  # rows (head, q | k | v, head_dim)
    (tensor,) = pieces
    if part.layout == "scale_first":
        return torch.cat(tensor.chunk(2)[::-1])
    if part.layout == "patches" and tensor.ndim == 4:
        return tensor.permute(0, 2, 3, 1).flatten(1)  # columns (patch_row, patch_col, channel)
    return tensor


def _split(part: _Part, tensor: Tensor, args: MMDiTModelArgs) -> list[Tensor]:
    """From the tensor of a layer here to the ones there."""
    if part.layout == "fused":
        heads = tensor.unflatten(0, (args.n_heads, 3, args.head_dim))
        return [piece.flatten(0, 1) for piece in heads.unbind(1)]
    if part.layout == "scale_first":
        return [torch.cat(tensor.chunk(2)[::-1])]
    if part.layout == "patches" and tensor.ndim == 2:
        patch = args.patch_size, args.patch_size, args.in_channels
        return [tensor.unflatten(1, patch).permute(0, 3, 1, 2)]
    return [tensor]


def _check_weights(weights: Mapping[str, Tensor], expected: State) -> None:
    """Check names, shapes and kinds of numbers, all that is wrong at once."""
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys() - {POSITIONS})
    named = ((missing, "missing"), (unknown, "not known here"))
    problems = [f"{_list(names)} {what}" for names, what in named if names]
    shared = [(name, weights[name], expected[name]) for name in expected if name in weights]
    problems += [
        f"{name} is {tuple(theirs.shape)} (here {tuple(ours.shape)})"
        for name, theirs, ours in shared
        if theirs.shape != ours.shape
    ][:3]
    problems += [
        f"{name} is {theirs.dtype} (here floating-point numbers)"
        for name, theirs, _ in shared
        if not theirs.is_floating_point()
    ][:3]
    if problems:
        raise ValueError(
            f"the weights are not those of this model: {'; '.join(problems)}. Choose another "
            "model.flavor, or a folder whose weights and config.json belong together."
        )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
