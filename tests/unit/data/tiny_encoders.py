"""Tiny text encoders with random weights, saved by `transformers` as users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

CLIP_WINDOW = 11
OTHER_WINDOW = 12
WORDS = ["a", "red", "green", "blue", "fox", "apple", "bell", "above", "under", "two"]


def save_clip(folder: Path, kind: str = "CLIPTextModelWithProjection", seed: int = 0) -> Path:
    """A CLIP of hidden size 32, projected to 24 if `kind` says so; `CLIPModel` has both halves."""
    tokenizer = _clip_tokenizer()
    tokenizer.save_pretrained(folder)
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=24,
        max_position_embeddings=CLIP_WINDOW,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config: Any = text
    if kind == "CLIPModel":
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
        # The half's own width of the projection is not the one that counts.
        halves = {"text_config": {**text.to_dict(), "projection_dim": 7}, "vision_config": vision}
        config = transformers.CLIPConfig(**halves, projection_dim=24)
    _save(getattr(transformers, kind), config, folder, seed)
    return folder


def save_t5(folder: Path, kind: str = "T5", window: int | None = 9, seed: int = 0) -> Path:
    """A T5 of width 48 with its decoder; `kind` may be MT5 or UMT5."""
    tokenizer = _word_tokenizer(window)
    tokenizer.save_pretrained(folder)
    sizes = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer) + 3, decoder_start_token_id=0, **sizes
    )
    _save(getattr(transformers, f"{kind}ForConditionalGeneration"), config, folder, seed)
    return folder


def save_other(folder: Path, kind: str = "Bert", seed: int = 0) -> Path:
    """A model of width 16 that is neither: Bert, Roberta, DistilBert or GPT2."""
    tokenizer = _word_tokenizer(None)
    tokenizer.save_pretrained(folder)
    common = {"vocab_size": len(tokenizer), "pad_token_id": 0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": OTHER_WINDOW}
    if kind == "Roberta":  # counts positions from the number after that of the padding
        sizes["max_position_embeddings"] += 1
    elif kind == "DistilBert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
        sizes["max_position_embeddings"] = OTHER_WINDOW
    elif kind == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": OTHER_WINDOW}
    config = getattr(transformers, f"{kind}Config")(**common, **sizes)
    _save(getattr(transformers, f"{kind}Model"), config, folder, seed)
    return folder


def _save(kind: Any, config: Any, folder: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():  # what starts as a constant would hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(folder)
        transformers.utils.logging.enable_progress_bar()


def _clip_tokenizer() -> transformers.CLIPTokenizer:
    """Letters, and the words "fox" and "red"."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [("o", "x</w>"), ("f", "ox</w>"), ("e", "d</w>"), ("r", "ed</w>")]
    pieces = letters + [f"{letter}</w>" for letter in letters] + ["".join(m) for m in merges]
    vocab = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_WINDOW)


def _word_tokenizer(window: int | None) -> transformers.PreTrainedTokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", *WORDS]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer: Any = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    limit = {} if window is None else {"model_max_length": window}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **limit,
    )


def save_captions(path: Path, **columns: list[Any]) -> Path:
    """A data set of captions as `save_to_disk` writes it; one column for each split."""
    kind = datasets.Value("string")
    splits = {}
    for split, captions in columns.items():
        has_lists = any(isinstance(value, list) for value in captions)
        feature = datasets.List(kind) if has_lists else kind
        splits[split] = datasets.Dataset.from_dict(
            {"caption": captions, "number": list(range(len(captions)))},
            features=datasets.Features({"caption": feature, "number": datasets.Value("int64")}),
        )
    datasets.disable_progress_bars()
    datasets.DatasetDict(splits).save_to_disk(str(path))
    datasets.enable_progress_bars()
    return path
