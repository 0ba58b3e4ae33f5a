"""A small encoder of prompts that is trained with the model, so that none must be downloaded.

Bidirectional transformer blocks, as in BERT (Devlin et al. 2018, arXiv 1810.04805), but with the
norm in front of each branch (Xiong et al. 2020, arXiv 2002.04745).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.dit import Attention, FeedForward
from torchtitan_mixtures.models.common.embeddings import EMBEDDING_STD


class PromptEncoderBlock(nn.Module):
    """Attention and feed-forward network.

    State dict:

        attention_norm.*, ffn_norm.*  weight and bias (dim,)
        attention.*                   see `Attention`
        feed_forward.*                see `FeedForward`
    """

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, n_heads)
        self.ffn_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, length, dim)` -> the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))

    def init_weights(self) -> None:
        """Initialise all weights."""
        self.attention_norm.reset_parameters()
        self.attention.init_weights()
        self.ffn_norm.reset_parameters()
        self.feed_forward.init_weights()


class PromptEncoder(nn.Module):
    """From the ids of a prompt to a vector for each, and one for all.

    There is no mask: what fills a prompt up has an embedding of its own, from which the encoder
    learns that nothing is there.

    State dict:

        tokens.weight     (vocab_size, dim)
        positions.weight  (length, dim)
        blocks.{0..}.*    see `PromptEncoderBlock`
        norm.*            weight and bias (dim,)
    """

    def __init__(self, vocab_size: int, length: int, dim: int, n_layers: int, n_heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(PromptEncoderBlock(dim, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode prompts.

        Args:
            ids: `(batch, length)` int64.

        Returns:
            `(batch, length, dim)`, and their mean `(batch, dim)`.
        """
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x, x.mean(1)

    def init_weights(self) -> None:
        """Initialise all weights."""
        init.normal_(self.tokens.weight, std=EMBEDDING_STD)
        init.normal_(self.positions.weight, std=EMBEDDING_STD)
        for block in self.blocks:
            cast(PromptEncoderBlock, block).init_weights()
        self.norm.reset_parameters()
