"""Model arguments of the `mmdit` family."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs

from torchtitan_mixtures.data.prompt_spec import EncoderSpan, PromptSpec
from torchtitan_mixtures.models.mmdit.block import BlockConfig
from torchtitan_mixtures.models.mmdit.feed_forward import FeedForwardOptions

IMAGE = "image"
"""Name of the stream that is denoised; it comes last."""

SD3_PROMPT = PromptSpec(
    name="text",
    kind="embeddings",
    length=154,
    dim=4096,
    pooled_dim=2048,
    spans=(
        EncoderSpan("CLIP-L", rows=(0, 77), channels=(0, 768), pooled=(0, 768)),
        EncoderSpan("CLIP-bigG", rows=(0, 77), channels=(768, 2048), pooled=(768, 2048)),
        EncoderSpan("T5-XXL", rows=(77, 154), channels=(0, 4096)),
    ),
)
"""What Stable Diffusion 3 is told of a prompt."""


@dataclass
class MMDiTModelArgs(BaseModelArgs):
    """Hyper-parameters of a diffusion transformer with weights of its own for each modality.

    Its streams are the prompts, in their order, and then the image, which is cut into patches.
    With `single_stream` all tokens share one stream and its weights: a DiT of the same FLOPs.
    """

    dim: int = 1536  # of the image's stream, and of the condition
    n_layers: int = 24
    n_heads: int = 24
    patch_size: int = 2
    in_channels: int = 16  # of what the model sees; the TOML's data decides these two
    image_size: int = 32
    learned_variance: bool = False  # the TOML's objective decides
    mlp_ratio: float = 4.0  # hidden units of a feed-forward network / width of its stream
    num_timestep_features: int = 256

    prompt_names: tuple[str, ...] = ("text",)
    prompts: tuple[PromptSpec, ...] = (SD3_PROMPT,)  # the TOML's data decides
    prompt_dims: tuple[int, ...] = ()  # widths of the prompts' streams; () = dim
    prompt_length: int = 40  # of text that the model encodes itself
    speech_length: int = 88
    encoder_layers: int = 2  # of such an encoder
    encoder_dim: int = 128
    encoder_heads: int = 4

    qk_norm: Literal["none", "shared", "per_head"] = "shared"
    softclamp: float | None = None  # bound of the attention logits; None: none
    modulation: Literal["zero", "film_identity"] = "zero"
    num_registers: tuple[int, ...] = ()  # of each stream, the image last; () = none
    num_residual_streams: int = 1
    dynamic_streams: bool = True  # whether their connections depend on the tokens
    num_adaptive_weights: int = 1
    single_stream: bool = False
    position_grid: int = 0  # side that positions of a square image are scaled to; 0 = not scaled

    init_seed: int | None = None  # None: PyTorch's initial seed

    is_prompted: ClassVar[bool] = True
    """Whether images are drawn to prompts, and not to classes."""

    # What may differ between a checkpoint and the run that goes on from it.
    resumable_fields: ClassVar[frozenset[str]] = frozenset({"init_seed", "image_size"})

    def __post_init__(self) -> None:
        # In JSON tuples are lists, and prompts tables.
        for name in ("prompt_names", "prompt_dims", "num_registers"):
            setattr(self, name, tuple(getattr(self, name)))
        self.prompts = tuple(
            spec if isinstance(spec, PromptSpec) else PromptSpec.from_table(spec)
            for spec in self.prompts
        )
        self.check()

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: noise or velocity, then the variance if it is learned."""
        return 2 * self.in_channels if self.learned_variance else self.in_channels

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.n_heads

    @property
    def num_tokens(self) -> int:
        """Tokens of a square image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_encoders(self) -> int:
        """Parts of all prompts that are dropped independently."""
        return sum(spec.num_encoders for spec in self.prompts)

    @property
    def stream_dims(self) -> dict[str, int]:
        """Width of each stream of the blocks by its name."""
        if self.single_stream:
            return {IMAGE: self.dim}
        widths = self.prompt_dims or (self.dim,) * len(self.prompts)
        names = [spec.name for spec in self.prompts]
        return {**dict(zip(names, widths, strict=True)), IMAGE: self.dim}

    @property
    def registers(self) -> dict[str, int]:
        """Number of registers of each stream that has some."""
        if not self.num_registers:
            return {}
        numbers = zip(self.stream_dims, self.num_registers, strict=True)
        return {name: number for name, number in numbers if number}

    @property
    def stream_lengths(self) -> dict[str, int]:
        """Tokens of each stream for a square image, registers included."""
        lengths = {spec.name: spec.length for spec in self.prompts}
        if self.single_stream:
            lengths = {IMAGE: sum(lengths.values()) + self.num_tokens}
        else:
            lengths[IMAGE] = self.num_tokens
        return {name: n + self.registers.get(name, 0) for name, n in lengths.items()}

    @property
    def block_config(self) -> BlockConfig:
        """What all blocks have in common."""
        return BlockConfig(
            n_heads=self.n_heads,
            head_dim=self.head_dim,
            condition_dim=self.dim,
            modulation=self.modulation,
            qk_norm=self.qk_norm,
            qkv_bias=True,
            out_bias=True,
            softclamp=self.softclamp,
            num_adaptive_weights=self.num_adaptive_weights,
            feed_forward=FeedForwardOptions(mult=self.mlp_ratio, tanh_gelu=True),
            num_residual_streams=self.num_residual_streams,
            dynamic_streams=self.dynamic_streams,
        )

    def pooled_dim(self, spec: PromptSpec) -> int:
        """Channels of what is known of a whole prompt; 0 = nothing is."""
        return self.encoder_dim if spec.kind == "tokens" else spec.pooled_dim

    def macs_per_image(self, num_tokens: int | None = None) -> float:
        """Count multiply-adds of the matrix products for one image, forward; encoders included.

        Args:
            num_tokens: Tokens of the image; None: of a square one.
        """
        tokens = self.num_tokens if num_tokens is None else num_tokens
        more = tokens - self.num_tokens
        lengths = {**self.stream_lengths, IMAGE: self.stream_lengths[IMAGE] + more}
        total = 0.0
        for layer in range(self.n_layers):
            total += self._macs_of_block(lengths, is_last=layer == self.n_layers - 1)
        patch, dim = self.patch_size**2, self.dim
        total += tokens * patch * dim * (self.in_channels + self.out_channels)
        total += self.num_timestep_features * dim + dim**2 + 2 * dim**2
        return total + sum(self._macs_of_prompt(spec) for spec in self.prompts)

    def _macs_of_block(self, lengths: dict[str, int], is_last: bool) -> float:
        """Those of one block for streams of these lengths."""
        inner, all_tokens, choices = self.dim, sum(lengths.values()), self.num_adaptive_weights
        total = 2.0 * all_tokens**2 * inner
        for name, width in self.stream_dims.items():
            is_cut = is_last and name != IMAGE
            per_token = 3 * width * inner * choices
            if choices > 1:
                per_token += width * self.n_heads * choices
            if not is_cut:
                hidden = int(self.mlp_ratio * width)
                per_token += inner * width * choices + 2 * width * hidden
            streams = self.num_residual_streams
            if streams > 1:
                # A product for each column of a connection, and one that decides it if dynamic.
                columns = 1 if is_cut else 2 * (streams + 2)
                per_token += (1 + self.dynamic_streams) * columns * streams * width
            total += lengths[name] * per_token + (2 if is_cut else 6) * self.dim * width
        return total

    def _macs_of_prompt(self, spec: PromptSpec) -> float:
        """Those of what a prompt goes through before the blocks."""
        length, dim, encoder = spec.length, self.dim, self.encoder_dim
        width = dim if self.single_stream else self.stream_dims[spec.name]
        pooled = self.pooled_dim(spec)
        total = float(pooled * dim + dim**2) if pooled else 0.0
        if spec.kind == "embeddings":
            return total + length * spec.dim * width
        layer = 12 * length * encoder**2 + 2 * length**2 * encoder
        return total + self.encoder_layers * layer + length * encoder * width

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Count parameters, and FLOPs by TorchTitan's convention.

        Args:
            model: The model; all its parameters are counted.
            seq_len: Not used: a square image has `num_tokens` tokens.

        Returns:
            Number of parameters, and FLOPs per image token of a training step: 6 per multiply-add,
            those of prompts among them.
        """
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        return num_parameters, round(6 * self.macs_per_image() / self.num_tokens)

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        """Take over what the TOML decides: the data and the objective."""
        # Imported late: the loader looks up flavours.
        from torchtitan_mixtures.data.prompt_loader import prompted_image_spec
        from torchtitan_mixtures.data.prompts import prompt_specs

        images = prompted_image_spec(job_config)
        self.in_channels, self.image_size = images.channels, images.size
        self.prompts = prompt_specs(job_config, self)
        objective = job_config.objective  # pyrefly: ignore [missing-attribute]
        self.learned_variance = objective.kind == "ddpm" and objective.learned_variance
        self.init_seed = job_config.debug.seed
        self.check()

    def check(self) -> None:
        """Raise ValueError, naming the field, for values and combinations that cannot work."""
        names = ["dim", "n_layers", "n_heads", "patch_size", "in_channels", "image_size"]
        names += ["prompt_length", "speech_length", "encoder_layers", "encoder_dim"]
        names += ["encoder_heads", "num_residual_streams", "num_adaptive_weights"]
        for name in names:
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        _require(self.dim % 4 == 0, "dim", self.dim, "a multiple of 4")
        for name, dim in (("n_heads", self.dim), ("encoder_heads", self.encoder_dim)):
            heads = getattr(self, name)
            _require(dim % heads == 0, name, heads, f"a divisor of the width, {dim}")
        features = self.num_timestep_features
        is_even = features > 0 and features % 2 == 0
        _require(is_even, "num_timestep_features", features, "a positive even number")
        divides = self.image_size % self.patch_size == 0
        allowed = f"a multiple of patch_size = {self.patch_size} of the flavour"
        _require(divides, "multimodal.image_size", self.image_size, allowed)
        for name in ("qk_norm", "modulation"):
            allowed = get_args(MMDiTModelArgs.__annotations__[name])
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {allowed}")
        is_bound = self.softclamp is None or 0 < self.softclamp < math.inf
        _require(is_bound, "softclamp", self.softclamp, "None or a finite number > 0")
        _require(self.position_grid >= 0, "position_grid", self.position_grid, "a number >= 0")
        self._check_prompts()

    def _check_prompts(self) -> None:
        names = tuple(spec.name for spec in self.prompts)
        _require(names == self.prompt_names, "prompts", names, f"those of {self.prompt_names}")
        is_named = len({*names, IMAGE}) == len(names) + 1
        _require(is_named, "prompt_names", self.prompt_names, "different names, none of them image")
        widths, count = self.prompt_dims, len(names)
        _require(len(widths) in (0, count), "prompt_dims", widths, f"() or {count} widths")
        _require(all(width > 0 for width in widths), "prompt_dims", widths, "positive numbers")
        is_tied = not (self.single_stream and widths)
        _require(is_tied, "prompt_dims", widths, "() with single_stream, where all share a width")
        registers, streams = self.num_registers, 1 if self.single_stream else count + 1
        allowed = f"() or {streams} numbers >= 0, the image's last"
        is_counted = len(registers) in (0, streams) and all(n >= 0 for n in registers)
        _require(is_counted, "num_registers", registers, allowed)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: {allowed}")
