"""Mixture-of-Transformers: all layers but embedding and output untied per modality.

Source: Liang et al., TMLR 2025, arXiv 2411.04996, Eq. 1-3 and Algorithm 1.

Deviations:
    - Norms are applied before a sub-layer by default, so that a dense Llama can be taken over; the
      paper's place, on the output of a sub-layer, is `norm_position = "post"`.
    - The final norm is shared unless `untie_final_norm` (the paper does not say).
    - Tokens are sorted by tower once per forward pass, where Algorithm 1 gathers and scatters in
      every sub-layer. The result is the same.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.protocols.model import AttentionMasksType, ModelProtocol

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.attention import (
    AttentionMask,
    build_attention_mask,
    document_ids_from_eos,
)
from torchtitan_mixtures.models.common.dispatch import (
    Plan,
    RowNorm,
    check_tokens,
    plan_by_masks,
    plan_by_sorting,
)
from torchtitan_mixtures.models.common.rope import Rotation, rope_table, rotation_at
from torchtitan_mixtures.models.mot.args import MoTModelArgs
from torchtitan_mixtures.models.mot.attention import ModalityUntiedAttention
from torchtitan_mixtures.models.mot.feed_forward import ModalityUntiedFeedForward


class MoTTransformerBlock(nn.Module):
    """Attention and feed-forward network, each with a norm and a residual connection.

    State dict, for each tower name (the first one only where a component is tied):

        attention.*                    see `ModalityUntiedAttention`
        attention_norm.{tower}.weight  (dim,)
        feed_forward.*                 see `ModalityUntiedFeedForward`
        ffn_norm.{tower}.weight        (dim,)
    """

    def __init__(self, layer_id: int, args: MoTModelArgs) -> None:
        super().__init__()
        names = args.names_of(args.untie_norm)
        self.attention = ModalityUntiedAttention(args)
        self.feed_forward = ModalityUntiedFeedForward(args)
        self.attention_norm = RowNorm(names, args.dim, args.norm_eps)
        self.ffn_norm = RowNorm(names, args.dim, args.norm_eps)
        self.is_pre_norm = args.norm_position == "pre"
        depth = layer_id + 1 if args.depth_init else args.n_layers
        self.branch_init_std = 0.02 / (2 * depth) ** 0.5

    def forward(
        self, x: Tensor, rotation: Rotation, mask: AttentionMask | None, plan: Plan | None
    ) -> Tensor:
        """Run the block.

        Args:
            x: Residual stream in the order of the plan, `(rows, dim)`; `(batch, seq, dim)` without
                one.
            rotation: Rotary embedding of each position, in original order.
            mask: Attention mask in original order; None for a plain causal one.
            plan: Which rows belong to which tower; None if no layer of the model is untied.

        Returns:
            Same shape as `x`.
        """
        if self.is_pre_norm:
            x = x + self.attention(self.attention_norm(x, plan), rotation, mask, plan)
            return x + self.feed_forward(self.ffn_norm(x, plan), plan)
        x = x + self.attention_norm(self.attention(x, rotation, mask, plan), plan)
        return x + self.ffn_norm(self.feed_forward(x, plan), plan)

    def init_weights(self) -> None:
        """Initialise all weights of the block."""
        self.attention.init_weights(self.branch_init_std)
        self.feed_forward.init_weights(self.branch_init_std)
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()

    @torch.no_grad()
    def copy_first_tower(self) -> None:
        """Give all towers the weights of the first."""
        for towers in self.modules():
            if isinstance(towers, nn.ModuleDict):
                first, *others = towers.values()
                for other in others:
                    for target, source in zip(other.parameters(), first.parameters(), strict=True):
                        target.copy_(source)

    def zero_branches(self) -> None:
        """Make the block an identity for all towers but the first."""
        for towers in (self.attention.wo, self.feed_forward.w2):
            for weight in towers.weights[1:]:
                nn.init.zeros_(weight)


class MoTTransformer(ModelProtocol):
    """Decoder-only transformer with one tower per modality and attention across all.

    State dict:

        tok_embeddings.weight  (vocab, dim), all modalities' ranges
        layers.{0..}.*         see `MoTTransformerBlock`
        norm.weight            (dim,); norm.{tower}.weight with untie_final_norm
        output.weight          (vocab, dim)

    A tower is named after its first modality. A component that is not untied has one entry, under
    the name of the first tower, so a dense model's names are those of a tower.

    Pipeline stages set what they lack of `tok_embeddings`, `norm` and `output` to None and drop
    entries of `layers`; between stages, activations are in original order.
    """

    def __init__(self, model_args: MoTModelArgs) -> None:
        super().__init__(model_args)
        self.model_args = model_args
        # Rows of a tower come in multiples of this; parallelism may ask for a larger one.
        self.row_multiple = 8
        vocab_size, dim = model_args.total_vocab_size, model_args.dim
        self.tok_embeddings: nn.Embedding | None = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleDict(
            {str(i): MoTTransformerBlock(i, model_args) for i in range(model_args.n_layers)}
        )
        self.norm: nn.RMSNorm | RowNorm | None
        if model_args.untie_final_norm:
            self.norm = RowNorm(model_args.tower_names, dim, model_args.norm_eps)
        else:
            self.norm = nn.RMSNorm(dim, eps=model_args.norm_eps)
        self.output: nn.Linear | None = nn.Linear(dim, vocab_size, bias=False)
        self.rope_table: Tensor
        self.register_buffer("rope_table", self._build_rope_table(), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        modality_masks: Tensor | Sequence[Tensor] | None = None,
        document_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention_masks: AttentionMask | None = None,
    ) -> Tensor:
        """Compute logits.

        Args:
            tokens: Token ids, `(batch, seq)`, int64; on later pipeline stages the activations
                `(batch, seq, dim)` of the stage before.
            modality_masks: Tokens of each modality, `(batch, modalities, seq)` bool, or one
                flattened `(batch * seq,)` bool mask per modality. Exactly one is True per token.
                None: by the vocabulary range each token id falls in (first pipeline stage only).
            document_ids: Document of each token, `(batch, seq)`, int64; its values are not read by
                `attn_mask_type = "causal"`. Where each rank holds a part of the sequences but
                attends over whole ones, those of whole sequences.
            image_ids: Image of each token, -1 outside, in the shape of `document_ids`; read with
                `bidirectional_images` only.
            positions: Position of each token for the rotary embedding, `(batch, seq)`, int64, below
                `max_seq_len`; None counts from 0. Causality goes by place in the sequence.
            attention_masks: As returned by `get_attention_masks`; None builds them from
                `document_ids` and `image_ids`.

        Returns:
            Logits `(batch, seq, vocab)`; without `output`, activations `(batch, seq, dim)`.

        Raises:
            ValueError: If a token has no modality or several, or an id outside the vocabulary.
        """
        plan = self._plan(tokens, modality_masks)
        mask = attention_masks
        if mask is None and self.model_args.attn_type != "sdpa":
            mask = self._build_mask(tokens, document_ids, image_ids)
        rotation = rotation_at(self.rope_table, tokens.shape[1], positions)

        if self.tok_embeddings is not None:
            h = self.tok_embeddings(tokens if plan is None else plan.sort_ids(tokens))
        else:
            h = tokens if plan is None else plan.sort(tokens)
        for layer in self.layers.values():
            h = layer(h, rotation, mask, plan)
        if isinstance(self.norm, RowNorm):
            h = self.norm(h, plan)
        elif self.norm is not None:
            h = self.norm(h)
        if plan is not None:
            h = plan.unsort(h)  # (batch, seq, dim)
        return h if self.output is None else self.output(h)

    def _plan(
        self, tokens: Tensor, modality_masks: Tensor | Sequence[Tensor] | None
    ) -> Plan | None:
        """Decide which tower each token goes to; None if there is nothing to decide."""
        args = self.model_args
        ranges = args.vocab_ranges
        has_ids = self.tok_embeddings is not None
        masks = None
        checks: dict[str, Tensor] = {}
        if modality_masks is not None:
            masks = self._stack_masks(tokens, modality_masks)
            coverage = masks.sum(1)
            checks["are covered by no modality mask"] = coverage == 0
            checks["are covered by more than one modality mask"] = coverage > 1
        if has_ids:
            in_vocabulary = (tokens >= 0) & (tokens < args.total_vocab_size)
            checks[f"have an id outside the vocabulary ranges {ranges}"] = ~in_vocabulary
        if not args.is_untied:
            check_tokens(checks, *tokens.shape[:2])
            return None
        if masks is None:
            if not has_ids:
                raise ValueError("modality_masks = None on a pipeline stage that has no token ids")
            masks = torch.stack([(tokens >= low) & (tokens < high) for low, high in ranges], dim=1)

        towers = torch.zeros_like(masks[:, 0], dtype=torch.int64)
        for modality, tower in enumerate(args.towers):
            if tower > 0:
                towers = towers + masks[:, modality] * tower
        num_towers = len(args.tower_names)
        towers = towers.clamp(max=num_towers - 1)  # doubly covered tokens are reported, not sorted
        if args.dispatch == "reference":
            return plan_by_masks(towers, num_towers, checks=checks)
        return plan_by_sorting(
            towers,
            num_towers,
            checks=checks,
            row_multiple=self.row_multiple,
            is_grouped=args.dispatch == "grouped",
        )

    def _stack_masks(self, tokens: Tensor, modality_masks: Tensor | Sequence[Tensor]) -> Tensor:
        """Bring either form of the masks to `(batch, modalities, seq)`."""
        batch, seq = tokens.shape[:2]
        shape = (batch, self.model_args.n_modalities, seq)
        if not isinstance(modality_masks, Tensor):
            flat = [mask.numel() == batch * seq for mask in modality_masks]
            if len(flat) != shape[1] or not all(flat):
                shapes = [tuple(mask.shape) for mask in modality_masks]
                raise ValueError(
                    f"modality_masks has shapes {shapes}; allowed: {shape[1]} masks of "
                    f"({batch * seq},)"
                )
            modality_masks = torch.stack([mask.view(batch, seq) for mask in modality_masks], dim=1)
        if modality_masks.shape != shape or modality_masks.dtype != torch.bool:
            raise ValueError(
                f"modality_masks is {modality_masks.dtype} {tuple(modality_masks.shape)}; allowed: "
                f"bool (batch, modalities, seq) = {shape}"
            )
        return modality_masks

    def _build_mask(
        self, tokens: Tensor, document_ids: Tensor | None, image_ids: Tensor | None
    ) -> AttentionMask:
        args = self.model_args
        if args.attn_mask_type == "block_causal" and document_ids is None:
            raise ValueError("document_ids = None with attn_mask_type = 'block_causal'")
        if args.bidirectional_images and image_ids is None:
            raise ValueError("image_ids = None with bidirectional_images = True")
        attended = tokens if document_ids is None else document_ids
        return build_attention_mask(
            args.attn_type,
            batch=attended.shape[0],
            seq=attended.shape[1],
            device=tokens.device,
            document_ids=document_ids if args.attn_mask_type == "block_causal" else None,
            image_ids=image_ids if args.bidirectional_images else None,
        )

    def get_attention_masks(
        self,
        input_batch: Tensor,
        tokenizer: BaseTokenizer,
        extra_inputs: dict[str, Tensor] | None = None,
    ) -> AttentionMasksType:
        """Build the mask of a batch before it is cut by context parallelism.

        Args:
            input_batch: Token ids, `(batch, seq)`.
            tokenizer: Gives the end-of-sequence id that separates documents where
                `extra_inputs["document_ids"]` is missing.
            extra_inputs: Further arguments of `forward`.

        Returns:
            The mask for all blocks; on a CPU a `(batch or 1, 1, seq, seq)` bool tensor.

        Raises:
            TypeError: If `attn_type = "sdpa"`, which takes no mask (the host expects this).
        """
        args = self.model_args
        if args.attn_type == "sdpa":
            raise TypeError("attn_type = 'sdpa' takes no mask")
        extra_inputs = extra_inputs or {}
        document_ids = extra_inputs.get("document_ids")
        if document_ids is None and args.attn_mask_type == "block_causal":
            if tokenizer.eos_id is None:
                raise ValueError("the tokenizer has no eos_id and the batch no document_ids")
            document_ids = document_ids_from_eos(input_batch, tokenizer.eos_id)
        mask = self._build_mask(input_batch, document_ids, extra_inputs.get("image_ids"))
        # The host's type leaves out the dense mask, but the host only passes it on.
        return cast(AttentionMasksType, mask)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Initialise all parameters and buffers, by the rule of TorchTitan's llama3.

        Args:
            buffer_device: Device of the rotary table; None leaves it where it is.
        """
        args = self.model_args
        with torch.device(buffer_device or self.rope_table.device):
            self.rope_table = self._build_rope_table()
        with init.parameter_names(self, args.init_seed):
            if self.tok_embeddings is not None:
                init.normal_(self.tok_embeddings.weight)
            for layer in self.layers.values():
                block = cast(MoTTransformerBlock, layer)
                block.init_weights()
                if args.init_towers == "copy":
                    block.copy_first_tower()
                if args.zero_init_branch:
                    block.zero_branches()
            if self.norm is not None:
                self.norm.reset_parameters()
            if self.output is not None:
                std = args.dim**-0.5
                init.trunc_normal_(self.output.weight, std=std, a=-3 * std, b=3 * std)

    def _build_rope_table(self) -> Tensor:
        args = self.model_args
        return rope_table(args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling)
