"""Model arguments of the `mot` family."""

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, get_args

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.vocabulary import code_vocab_sizes
from torchtitan_mixtures.models.common.rope import RoPEScaling

NormPosition = Literal["pre", "post"]
TowerInit = Literal["independent", "copy"]
Dispatch = Literal["split", "grouped", "reference"]
AttentionType = Literal["sdpa", "flex", "varlen", "sdpa_dense"]
AttentionMaskType = Literal["causal", "block_causal"]


@dataclass
class MoTModelArgs(BaseModelArgs):
    """Hyper-parameters of a Mixture-of-Transformers.

    A *tower* is one copy of the untied layers. By default each modality has its own; layers that
    are not untied exist once, under the name of the first tower.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as heads
    vocab_size: int = 128256  # of text; see code_vocab_sizes
    code_vocab_sizes: list[int] = field(default_factory=list)  # one per modality but text
    multiple_of: int = 256  # the FFN width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    qk_normalization: bool = False  # per head, before RoPE; untied with the attention
    rope_theta: float = 500000.0
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_positions: int = 8192
    max_seq_len: int = 8192

    n_modalities: int = 2
    modality_names: list[str] = field(default_factory=lambda: ["text", "image"])  # text first
    tower_of_modality: list[int] | None = None  # e.g. [0, 0, 1]; None: one tower per modality
    untie_attention: bool = True
    untie_ffn: bool = True
    untie_norm: bool = True  # the norms of the blocks
    untie_final_norm: bool = False
    norm_position: NormPosition = "pre"  # of a sub-layer's input, or of its output as in the paper

    depth_init: bool = True  # scale wo, w2, w3 by the depth of the layer, else of the model
    init_towers: TowerInit = "independent"  # or all towers equal at the start
    zero_init_branch: bool = False  # wo and w2 of all towers but the first start at zero
    init_seed: int | None = None  # None: the seed of the global generator

    attn_type: AttentionType = "sdpa"
    attn_mask_type: AttentionMaskType = "causal"  # block_causal: inside a document only
    bidirectional_images: bool = False
    dispatch: Dispatch = "split"

    # What may differ between a checkpoint and the run that goes on from it: how the same function
    # is computed, and how weights are drawn that the checkpoint replaces.
    resumable_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "attn_type",
            "dispatch",
            "max_seq_len",
            "depth_init",
            "init_towers",
            "zero_init_branch",
            "init_seed",
        }
    )

    def __post_init__(self) -> None:
        self.check()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_hidden_dim(self) -> int:
        """Hidden width of the FFN: 2/3 of 4 x dim, times the multiplier, rounded up."""
        hidden_dim = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden_dim = int(self.ffn_dim_multiplier * hidden_dim)
        return -(-hidden_dim // self.multiple_of) * self.multiple_of

    @property
    def rope_scaling(self) -> RoPEScaling:
        """Frequency scaling of the rotary embedding."""
        return RoPEScaling(
            factor=self.rope_scaling_factor,
            low_freq_factor=self.rope_low_freq_factor,
            high_freq_factor=self.rope_high_freq_factor,
            original_max_positions=self.rope_original_max_positions,
        )

    @property
    def vocab_ranges(self) -> list[tuple[int, int]]:
        """Half-open range of token ids of each modality, empty where it has no codes."""
        code_vocab_sizes = self.code_vocab_sizes or [0] * (self.n_modalities - 1)
        return list(pairwise(accumulate([0, self.vocab_size, *code_vocab_sizes])))

    @property
    def total_vocab_size(self) -> int:
        """Rows of the embedding and of the output head."""
        return self.vocab_ranges[-1][1]

    @property
    def towers(self) -> list[int]:
        """Tower of each modality."""
        if self.tower_of_modality is None:
            return list(range(self.n_modalities))
        return self.tower_of_modality

    @property
    def tower_names(self) -> list[str]:
        """Name of each tower: that of its first modality."""
        towers = self.towers
        return [self.modality_names[towers.index(tower)] for tower in range(max(towers) + 1)]

    @property
    def is_untied(self) -> bool:
        """Whether any layer exists more than once, so that tokens must be told apart."""
        untied = (self.untie_attention, self.untie_ffn, self.untie_norm, self.untie_final_norm)
        return len(self.tower_names) > 1 and any(untied)

    def names_of(self, is_untied: bool) -> list[str]:
        """Names of the copies of a component, given its switch."""
        return self.tower_names if is_untied else self.tower_names[:1]

    def tower_of_parameter(self, name: str) -> str | None:
        """Name of the tower that the parameter called `name` belongs to; None if all share it."""
        *_, component, tower, _ = ["", "", *name.split(".")]
        if component in ("wq", "wk", "wv", "wo", "q_norm", "k_norm"):
            is_untied = self.untie_attention
        elif component in ("w1", "w2", "w3"):
            is_untied = self.untie_ffn
        elif component in ("attention_norm", "ffn_norm"):
            is_untied = self.untie_norm
        else:
            is_untied = component == "norm" and self.untie_final_norm
        return tower if is_untied and len(self.tower_names) > 1 else None

    @property
    def num_total_parameters(self) -> int:
        """Parameters of the whole model."""
        return self._num_parameters(is_active=False)

    @property
    def num_active_parameters(self) -> int:
        """Parameters one token passes through; all of the embedding and the head are counted."""
        return self._num_parameters(is_active=True)

    def _num_parameters(self, *, is_active: bool) -> int:
        def copies(is_untied: bool) -> int:
            return 1 if is_active else len(self.names_of(is_untied))

        # Every tower has the same shape, so which one a token takes does not matter.
        attention = 2 * self.dim * (self.n_heads + self.num_kv_heads) * self.head_dim
        if self.qk_normalization:
            attention += 2 * self.head_dim
        layer = (
            attention * copies(self.untie_attention)
            + 3 * self.dim * self.ffn_hidden_dim * copies(self.untie_ffn)
            + 2 * self.dim * copies(self.untie_norm)
        )
        embedding_and_output = 2 * self.total_vocab_size * self.dim
        final_norm = self.dim * copies(self.untie_final_norm)
        return embedding_and_output + final_norm + self.n_layers * layer

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Count parameters and FLOPs by TorchTitan's convention, the latter of active ones only.

        Args:
            model: The model; all its parameters are counted.
            seq_len: Length of the sequences.

        Returns:
            Number of parameters, and FLOPs per token of a training step: 6 per active parameter
            outside the embedding, plus attention without regard to causality.
        """
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        num_matmul_parameters = self.num_active_parameters - self.total_vocab_size * self.dim
        attention_flops = 6 * self.n_layers * self.n_heads * 2 * self.head_dim * seq_len
        return num_parameters, 6 * num_matmul_parameters + attention_flops

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        """Take over what the TOML decides; empty values of `[mixture]` keep the flavour's."""
        seq_len = job_config.training.seq_len
        if job_config.validation.enable:
            seq_len = max(seq_len, job_config.validation.seq_len)
        if seq_len > self.max_seq_len:
            logger.warning(
                f"training.seq_len or validation.seq_len = {seq_len} exceeds the flavour's maximum "
                f"of {self.max_seq_len}"
            )
        self.max_seq_len = seq_len
        sections: Any = job_config  # the host's class does not know this plugin's sections
        mixture = sections.mixture
        self.dispatch = mixture.dispatch or self.dispatch
        self.tower_of_modality = mixture.tower_of_modality or self.tower_of_modality
        if mixture.untie:
            untied = mixture.untie.split("+")
            self.untie_attention = "attention" in untied
            self.untie_ffn = "ffn" in untied
            self.untie_norm = "norm" in untied
        self.code_vocab_sizes = code_vocab_sizes(self.modality_names, sections.multimodal)
        self.init_seed = job_config.debug.seed
        self.check()

    def check(self) -> None:
        """Raise ValueError, naming the field, for values and combinations that cannot work."""
        for name, allowed in (
            ("norm_position", NormPosition),
            ("init_towers", TowerInit),
            ("dispatch", Dispatch),
            ("attn_type", AttentionType),
            ("attn_mask_type", AttentionMaskType),
        ):
            value = getattr(self, name)
            _require(value in get_args(allowed), name, value, f"one of {get_args(allowed)}")
        self._check_shapes()
        self._check_modalities()
        self._check_attention()

    def _check_shapes(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seq_len"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        divides = self.dim % self.n_heads == 0 and self.head_dim % 2 == 0
        _require(divides, "n_heads", self.n_heads, f"a divisor of dim = {self.dim}, even quotient")
        kv_heads = self.num_kv_heads
        divides = kv_heads > 0 and self.n_heads % kv_heads == 0
        _require(divides, "n_kv_heads", kv_heads, f"a divisor of n_heads = {self.n_heads}")

    def _check_modalities(self) -> None:
        n, names, codes = self.n_modalities, self.modality_names, self.code_vocab_sizes
        _require(n > 0, "n_modalities", n, "a positive number")
        is_complete = len(names) == n and len(set(names)) == n
        _require(is_complete, "modality_names", names, f"n_modalities = {n} distinct names")
        is_complete = not codes or (len(codes) == n - 1 and min(codes) >= 0)
        _require(is_complete, "code_vocab_sizes", codes, f"[] or {n - 1} sizes, one per non-text")
        towers = self.towers
        is_complete = len(towers) == n and set(towers) == set(range(max(towers, default=0) + 1))
        _require(
            is_complete, "tower_of_modality", towers, f"None or {n} towers, numbered from 0, no gap"
        )
        if self.zero_init_branch:
            has_branch = max(towers) > 0 and (self.untie_attention or self.untie_ffn)
            _require(has_branch, "zero_init_branch", True, "False without a second tower")
            # RMSNorm has no useful gradient at zero.
            is_pre = self.norm_position == "pre"
            _require(is_pre, "zero_init_branch", True, "False with norm_position = 'post'")

    def _check_attention(self) -> None:
        if self.attn_type == "sdpa":
            is_causal = self.attn_mask_type == "causal"
            allowed = "'causal' with attn_type = 'sdpa'"
            _require(is_causal, "attn_mask_type", self.attn_mask_type, allowed)
        if self.attn_type == "varlen":
            is_block_causal = self.attn_mask_type == "block_causal"
            allowed = "'block_causal' with attn_type = 'varlen'"
            _require(is_block_causal, "attn_mask_type", self.attn_mask_type, allowed)
        if self.bidirectional_images:
            is_masked = self.attn_type in ("flex", "sdpa_dense")
            allowed = "'flex' or 'sdpa_dense' with bidirectional_images"
            _require(is_masked, "attn_type", self.attn_type, allowed)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: {allowed}")
