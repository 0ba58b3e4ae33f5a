"""The JSON files beside the weights of dense ViTs, of transformers and of timm.

Weights do not say all that a ViT computes: how many heads it has, what it pools, what its
activation is. Their `config.json` does; one that says what the models here do not do is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchtitan.tools.logging import logger

from torchtitan_mixtures.models.mone.args import MoNEModelArgs

Config = Mapping[str, Any]

_TIMM_EPS = 1e-6
_TIMM_SAME = {
    "qkv_bias": (True,),
    "proj_bias": (True,),
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "init_values": (None,),
    "no_embed_class": (False,),
    "reg_tokens": (0,),
    "pos_embed": ("learn",),
    "pre_norm": (False,),
    "final_norm": (True,),
    "fc_norm": (False, None),
    "act_layer": (None, "gelu"),
}
"""Arguments of timm's models, and the values with which they compute what is computed here."""
_TIMM_FREE = {
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth",
    "num_heads", "mlp_ratio", "class_token", "drop_rate", "pos_drop_rate", "patch_drop_rate",
    "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init",
    "dynamic_img_size", "strict_img_size",
}  # fmt: skip
"""Those that the weights show, that are compared elsewhere, or that change training alone."""
_POOLS = {"mean": "avg", "class_token": "token"}


def check_huggingface(config: Config, args: MoNEModelArgs) -> None:
    """Check that a `config.json` of transformers is that of a model.

    Raises:
        ValueError: Names each key that says something else.
    """
    kind = config.get("model_type")
    if kind != "vit":
        raise ValueError(f"model_type = {kind!r} in config.json: only ViTs ('vit') are imported.")
    expected = {  # key: (what it is without the key, what it is to be)
        "hidden_size": (768, args.dim),
        "num_hidden_layers": (12, args.n_layers),
        "num_attention_heads": (12, args.n_heads),
        "intermediate_size": (3072, args.hidden_dim),
        "patch_size": (16, args.patch_size),
        "num_channels": (3, args.in_channels),
        "layer_norm_eps": (1e-12, args.norm_eps),
        "hidden_act": ("gelu", "gelu"),
        "qkv_bias": (True, True),
    }
    found = {key: _side(config.get(key, default)) for key, (default, _) in expected.items()}
    problems = [
        f"{key} = {value!r} (here {expected[key][1]!r})"
        for key, value in found.items()
        if value != expected[key][1]
    ]
    if isinstance(size := _side(config.get("image_size", 224)), list):
        problems.append(f"image_size = {size} (here squares)")
    if args.pool != "class_token":
        problems.append("a class token for the head (here the mean of tokens)")
    if problems:
        raise ValueError(
            f"config.json: {', '.join(problems)}; that is another model. Choose another "
            "model.flavor (published ViTs are of those that end in -cls); with an activation or "
            "biases other than here it cannot be imported."
        )


def _side(value: Any) -> Any:
    """The one number of `[n, n]`."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def check_timm(config: Config, args: MoNEModelArgs) -> None:
    """Check that a `config.json` of timm, as on the Hugging Face hub, is that of a model.

    Raises:
        ValueError: Names each key that says something else.
    """
    model_args = config.get("model_args") or {}
    pool = model_args.get("global_pool", config.get("global_pool", "token"))
    problems = []
    if pool != _POOLS[args.pool]:
        problems.append(f"global_pool = {pool!r} (here {_POOLS[args.pool]!r})")
    heads = model_args.get("num_heads", args.n_heads)
    if heads != args.n_heads:
        problems.append(f"num_heads = {heads} (here {args.n_heads})")
    for key, value in model_args.items():
        if key in _TIMM_FREE:
            continue
        allowed = _TIMM_SAME.get(key, ())
        if value not in allowed:
            instead = f" (here {allowed[0]!r})" if allowed else " (not known here)"
            problems.append(f"{key} = {value!r}{instead}")
    architecture = str(config.get("architecture", ""))
    if "quickgelu" in architecture:
        problems.append(f"architecture = {architecture!r} (here gelu)")
    if problems:
        raise ValueError(
            f"config.json: {', '.join(problems)}; that is another model. Choose another "
            "model.flavor if heads or pooling differ, else it cannot be imported."
        )


def warn_of_timm_eps(args: MoNEModelArgs) -> None:
    """Say if norms have another epsilon than timm's, which no file of timm tells."""
    if args.norm_eps != _TIMM_EPS:
        logger.warning(
            f"norm_eps = {args.norm_eps:g} of the flavour: timm's ViTs have {_TIMM_EPS:g}. Outputs "
            "differ where the variance of what is normed is not far above that."
        )


def warn_of_normalization(config: Config, key: str) -> None:
    """Say if pixels were not as they are here, in [-1, 1].

    Args:
        config: What has the mean and standard deviation of pixels.
        key: Beginning of their names, "image_" or "".
    """
    for name in (f"{key}mean", f"{key}std"):
        value = config.get(name)
        if value is not None and any(number != 0.5 for number in value):
            logger.warning(
                f"{name} = {value} of the checkpoint: its pixels were normalised with that, here "
                "they are with 0.5, to [-1, 1]. It will need some training to get used to it."
            )


def huggingface_config(args: MoNEModelArgs) -> dict[str, Any]:
    """Make the `config.json` of transformers' `ViTForImageClassification`."""
    labels = [f"LABEL_{i}" for i in range(args.num_classes)]
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "intermediate_size": args.hidden_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": args.norm_eps,
        "image_size": args.image_size,
        "patch_size": args.patch_size,
        "num_channels": args.in_channels,
        "qkv_bias": True,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "torch_dtype": "float32",
    }


def huggingface_preprocessor(args: MoNEModelArgs) -> dict[str, Any]:
    """Make the `preprocessor_config.json` of transformers: pixels in [-1, 1]."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": args.image_size, "width": args.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * args.in_channels,
        "image_std": [0.5] * args.in_channels,
    }


def timm_config(args: MoNEModelArgs) -> dict[str, Any]:
    """Make the `config.json` of timm, with which `create_model("local-dir:DIR")` builds a ViT."""
    pool = _POOLS[args.pool]
    return {
        # Any ViT would do: the arguments say what differs from it.
        "architecture": "vit_base_patch16_224",
        "num_classes": args.num_classes,
        "global_pool": pool,
        "model_args": {
            "img_size": args.image_size,
            "patch_size": args.patch_size,
            "in_chans": args.in_channels,
            "num_classes": args.num_classes,
            "embed_dim": args.dim,
            "depth": args.n_layers,
            "num_heads": args.n_heads,
            "mlp_ratio": args.hidden_dim / args.dim,
            "qkv_bias": True,
            "class_token": args.pool == "class_token",
            "global_pool": pool,
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "num_classes": args.num_classes,
            "input_size": [args.in_channels, args.image_size, args.image_size],
            "fixed_input_size": True,
            "mean": [0.5] * args.in_channels,
            "std": [0.5] * args.in_channels,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
