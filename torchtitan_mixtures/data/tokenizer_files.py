"""Files of Hugging Face tokenizers, read so that special tokens are found in no text."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from tokenizers import Tokenizer


def read_tokenizer(path: Path) -> tuple[str, Tokenizer]:
    """Read a `tokenizer.json`.

    Args:
        path: The file.

    Returns:
        Its content, and the tokenizer, which neither fills texts up nor cuts them.

    Raises:
        ValueError: No such file, or not a tokenizer; names it.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}); expected a tokenizer.json") from error
    try:
        return content, _parse(content)
    # `from_str` is compiled from Rust and raises `Exception` itself, no subclass of it.
    except Exception as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error


def _parse(content: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True  # special strings in a text are split as plain text
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Id of each added token by its string."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: index for index, token in added.items()}


def with_special_tokens(
    content: str, tokenizer: Tokenizer, ids: Collection[int]
) -> tuple[str, Tokenizer]:
    """Mark added tokens as special: only such can be kept out of encoded text.

    Args:
        content: Of the `tokenizer.json`.
        tokenizer: Of it.
        ids: Of the tokens; those that the tokenizer does not have are passed over.

    Returns:
        Content and tokenizer, the same ones if there is nothing to mark.
    """
    added = tokenizer.get_added_tokens_decoder()
    if all(added[index].special for index in ids if index in added):
        return content, tokenizer
    data = json.loads(content)
    for token in data["added_tokens"]:
        token["special"] |= token["id"] in ids
    content = json.dumps(data)
    return content, _parse(content)


def without_spellings(content: str, ids: Collection[int]) -> Tokenizer:
    """A tokenizer whose model cannot make a text into some of its added tokens.

    Args:
        content: Of the `tokenizer.json`.
        ids: Of the added tokens. One that stands for unknown characters still does.
    """
    data = json.loads(content)
    model = data["model"]
    # Models refuse to go without their token for what they do not know.
    names = {
        token["content"]: f"\0{token['content']}\0"
        for token in data["added_tokens"]
        if token["id"] in ids and token["content"] != model.get("unk_token")
    }
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    else:  # of a Unigram model: a list, by id
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])
        ]
    return _parse(json.dumps(data))
