"""Image codebooks and text tokenizers."""

import json
import pickle
import random
from dataclasses import asdict, astuple, fields
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from torchtitan_mixtures.data import tokenizers as tokenizers_module
from torchtitan_mixtures.data.codebooks import nearest_centres
from torchtitan_mixtures.data.emoji import EMBEDDED_FOLDER, SPLITS, EmojiCorpus
from torchtitan_mixtures.data.tokenizers import (
    IMAGE_TOKENIZERS,
    SENTINEL_TOKENS,
    PatchCodebook,
    Sentinels,
    TextTokenizer,
    build_image_tokenizer,
    build_text_tokenizer,
)

# The study of the corpus (four styles) reports 22.0/21.8 dB at 32 px and 24.7/24.6 dB at 64 px for
# train/unseen drawings. Scenes are served as well here, which costs drawings a little: 0.5 dB less.
MIN_PSNR = {"emoji_32px": (21.5, 21.3), "emoji_64px": (24.2, 24.1)}
MAX_GAP = 0.5


def psnr(images: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / ((images.astype(float) - other) ** 2).mean()))


def sample_images(size: int, split: str) -> NDArray[np.uint8]:
    corpus = EmojiCorpus.load()
    return corpus.images(corpus.drawings(split)[:: 4 if split == "train" else 1], size)


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_TOKENIZERS)
def test_codebooks_serve_unseen_drawings_almost_as_well_as_train(name: str):
    tokenizer = build_image_tokenizer(name)
    quality = {}
    for split in SPLITS:
        images = sample_images(tokenizer.image_size, split)
        quality[split] = psnr(tokenizer.decode(tokenizer.encode(images)), images)
    train, unseen = MIN_PSNR[name]
    assert quality["train"] >= train
    assert quality["unseen_concept"] >= unseen and quality["unseen_style"] >= unseen
    assert quality["train"] - quality["unseen_concept"] < MAX_GAP
    assert quality["train"] - quality["unseen_style"] < MAX_GAP


@pytest.mark.parametrize("name", IMAGE_TOKENIZERS)
def test_scenes_stay_legible(name: str):
    tokenizer = build_image_tokenizer(name)
    corpus, rng = EmojiCorpus.load(), random.Random(0)
    scenes = [corpus.compose_scene(rng, "train", tokenizer.image_size) for _ in range(100)]
    images = np.stack([scene.image for scene in scenes])
    assert psnr(tokenizer.decode(tokenizer.encode(images)), images) > 20.0


def test_shapes_of_the_embedded_codebooks():
    small, large = build_image_tokenizer("emoji_32px"), build_image_tokenizer("emoji_64px")
    assert (small.image_size, small.num_codes, small.codes_per_image) == (32, 1024, 64)
    assert (large.image_size, large.num_codes, large.codes_per_image) == (64, 1024, 256)
    codes = small.encode(np.full((2, 32, 32, 3), 255, np.uint8))
    assert codes.dtype == np.int64 and codes.shape == (2, 64)
    assert (codes == 0).all() and (small.decode(codes) == 255).all()  # white is kept exactly


@pytest.mark.parametrize("name", IMAGE_TOKENIZERS)
def test_encode_matches_a_naive_search_in_row_major_order(name: str):
    tokenizer = build_image_tokenizer(name)
    assert isinstance(tokenizer, PatchCodebook)
    images = sample_images(tokenizer.image_size, "unseen_concept")[:2]
    codes = tokenizer.encode(images)
    grid = tokenizer.image_size // 4
    for row, column in ((0, 0), (grid // 2, 1), (2, grid // 2), (grid - 1, grid - 1)):
        patch = images[1, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].astype(int).tolist()
        flat = [value for line in patch for pixel in line for value in pixel]
        best, best_distance = -1, float("inf")
        for code, centre in enumerate(tokenizer.centres.astype(int).tolist()):
            distance = sum((a - b) ** 2 for a, b in zip(flat, centre, strict=True))
            if distance < best_distance:
                best, best_distance = code, distance
        assert codes[1, row * grid + column] == best


@pytest.mark.parametrize("name", IMAGE_TOKENIZERS)
def test_decoded_images_are_fixed_points(name: str):
    tokenizer = build_image_tokenizer(name)
    codes = tokenizer.encode(sample_images(tokenizer.image_size, "unseen_style"))
    decoded = tokenizer.decode(codes)
    again = tokenizer.encode(decoded)
    assert (again == codes).all() and (tokenizer.decode(again) == decoded).all()


@pytest.mark.parametrize("dim", [3, 48, 192])
def test_nearest_centres_are_exact_and_ties_take_the_lowest(dim: int):
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 256, (16, dim), dtype=np.uint8)
    centres[9] = centres[4]
    points = np.concatenate([centres, rng.integers(0, 256, (20, dim), dtype=np.uint8)])
    difference = points[:, None].astype(np.int64) - centres.astype(np.int64)
    assert (nearest_centres(points, centres) == (difference**2).sum(-1).argmin(1)).all()
    assert nearest_centres(centres, centres)[9] == 4


def test_codes_and_images_that_do_not_fit_are_refused():
    tokenizer = build_image_tokenizer("emoji_32px")
    with pytest.raises(ValueError, match=r"expected \(batch, 32, 32, 3\) uint8"):
        tokenizer.encode(np.zeros((1, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="dtype float64"):
        tokenizer.encode(np.zeros((1, 32, 32, 3)))
    for code in (-1, 1024):
        with pytest.raises(ValueError, match=r"codes 0 to 1023"):
            tokenizer.decode(np.full((1, 64), code))
    with pytest.raises(ValueError, match=r"expected \(batch, 64\)"):
        tokenizer.decode(np.zeros((1, 65), np.int64))
    assert tokenizer.decode(np.zeros((0, 64), np.int64)).shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weights": np.zeros((4, 4, 4, 3), np.uint8)},
        {"centres": np.zeros((4, 4, 4, 3), np.float32), "image_size": np.array([32])},
        {"centres": np.zeros((4, 48), np.uint8), "image_size": np.array([32])},
        {"centres": np.zeros((4, 5, 5, 3), np.uint8), "image_size": np.array([32])},
        {"centres": np.zeros((4, 4, 4, 3), np.uint8), "image_size": np.array([32.0])},
    ],
)
def test_a_wrong_codebook_file_is_named_with_what_is_expected(tmp_path: Path, tensors: dict):
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"wrong\.safetensors .*expected a patch codebook"):
        build_image_tokenizer(str(path))


def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path):
    path = tmp_path / "text.safetensors"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"cannot read .*text\.safetensors"):
        build_image_tokenizer(str(path))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'emoji_8px' is unknown; use emoji_32px or emoji_64px"):
        build_image_tokenizer("emoji_8px")
    with pytest.raises(ValueError, match=r"'emoij' is unknown; use emoji"):
        build_text_tokenizer("emoij")


# --- text -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji_tokenizer() -> TextTokenizer:
    return build_text_tokenizer("emoji")


def save_tokenizer(folder: Path, *tokens: str, special: bool = True) -> Path:
    """A byte-level tokenizer without merges that has these added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_embedded_vocabulary_has_2048_entries_and_the_sentinels_come_first(emoji_tokenizer):
    assert emoji_tokenizer.vocab_size == emoji_tokenizer.get_vocab_size() == 2048
    assert astuple(emoji_tokenizer.sentinels) == (0, 1, 2, 3, 4, 5, 6)
    assert (emoji_tokenizer.bos_id, emoji_tokenizer.eos_id) == (1, 2)


def test_every_caption_survives_a_round_trip_without_sentinels(emoji_tokenizer: TextTokenizer):
    corpus, rng = EmojiCorpus.load(), random.Random(0)
    captions = [corpus.caption(d, rng) for split in SPLITS for d in corpus.drawings(split)]
    captions += [corpus.compose_scene(rng, split, 16).caption for split in SPLITS for _ in range(9)]
    characters = tokens = 0
    for caption in captions:
        ids = emoji_tokenizer.encode(caption)
        assert min(ids) >= 7 and max(ids) < 2048
        assert emoji_tokenizer.decode(ids) == caption
        characters, tokens = characters + len(caption), tokens + len(ids)
    assert characters / tokens > 3


@pytest.mark.parametrize("text", ["", " ", "\n\n", "naïve 日本 🦊", "a\u200db\x00c", "  two  "])
def test_any_text_survives_a_round_trip(emoji_tokenizer: TextTokenizer, text: str):
    assert emoji_tokenizer.decode(emoji_tokenizer.encode(text)) == text


@pytest.mark.parametrize("special", [True, False])
def test_sentinel_strings_in_a_caption_stay_plain_text(tmp_path: Path, special: bool):
    names = ["<|pad|>", "<|bos|>", "<|eos|>", "<|image_start|>", "<|image_end|>"]
    names += ["<|speech_start|>", "<|speech_end|>"]
    own = TextTokenizer(save_tokenizer(tmp_path, *names, special=special))
    for tokenizer in (own, build_text_tokenizer("emoji")):
        sentinels = set(astuple(tokenizer.sentinels))
        for name in names:
            text = f"a fox{name} and {name}{name}"
            ids = tokenizer.encode(text)
            assert not sentinels & set(ids)
            assert tokenizer.decode(ids) == text


def test_decode_can_show_sentinels(emoji_tokenizer: TextTokenizer):
    ids = [1, *emoji_tokenizer.encode("a fox"), 3, 4, 2]
    assert emoji_tokenizer.decode(ids) == "a fox"
    shown = emoji_tokenizer.decode(ids, skip_special=False)
    assert "<|image_start|>" in shown and shown.endswith("<|eos|>")


def test_llama_3_tokens_stand_in_for_ours(tmp_path: Path):
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(6)]
    folder = save_tokenizer(tmp_path, "<|begin_of_text|>", "<|end_of_text|>", *reserved)
    tokenizer = build_text_tokenizer(str(folder))
    assert tokenizer.sentinels == Sentinels(262, 256, 257, 258, 259, 260, 261)
    assert tokenizer.vocab_size == 264
    file = TextTokenizer(folder / "tokenizer.json")
    assert file.sentinels == tokenizer.sentinels


def test_our_own_sentinels_win_over_stand_ins(tmp_path: Path):
    ours = ["<|pad|>", "<|bos|>", "<|eos|>", "<|image_start|>", "<|image_end|>"]
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(4)]
    folder = save_tokenizer(tmp_path, *reserved, "<s>", "</s>", *ours)
    sentinels = TextTokenizer(folder).sentinels
    assert astuple(sentinels) == (262, 263, 264, 265, 266, 258, 259)


def build_model(kind: str, specials: list[str]) -> Tokenizer:
    """A small tokenizer of each model type, whose vocabulary has the special tokens too."""
    words = [*specials, "[UNK]", "a", "fox", "<", ">", "/", "s", "|", "pad"]
    if kind == "BPE":
        characters = sorted({*"".join(words), " "} - {*specials})
        vocabulary = {token: i for i, token in enumerate([*specials, *characters, "</", "</s"])}
        # It would form "</s>" out of plain characters.
        merges = [("<", "/"), ("</", "s"), ("</s", ">")] if "</s>" in specials else []
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    elif kind == "WordPiece":
        pieces = {token: i for i, token in enumerate([*words, "##ox", "f"])}
        tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.WordPiece()
    elif kind == "Unigram":
        scores = [(token, 0.0) for token in [*specials, "[UNK]"]]
        scores += [(piece, -2.0) for piece in ["\u2581", *"afox</s>|pd", "\u2581fox"]]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=len(specials)))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        vocabulary = {token: i for i, token in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


NAMES = [field.name for field in fields(Sentinels)]
MODELS = ["BPE", "WordPiece", "Unigram", "WordLevel"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("specials", "known"),
    [
        ([], {}),
        (["<|endoftext|>"], {"bos": 0, "eos": 0}),
        (["[PAD]", "[CLS]", "[SEP]"], {"pad": 0, "bos": 1, "eos": 2}),
        (["<pad>", "</s>"], {"pad": 0, "eos": 1}),
    ],
)
def test_any_tokenizer_gets_the_sentinels_that_it_lacks(
    tmp_path: Path, kind: str, specials: list[str], known: dict[str, int]
):
    original = build_model(kind, specials)
    original.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_text_tokenizer(str(tmp_path))
    own = original.get_vocab_size()
    expected, following = {}, own
    for name in NAMES:
        expected[name] = known.get(name, following)
        following += name not in known
    assert asdict(tokenizer.sentinels) == expected
    assert tokenizer.vocab_size == tokenizer.get_vocab_size() == following
    for text in ("", "a fox", "fox a < s > |", "a \u65e5 fox"):
        assert tokenizer.encode(text) == original.encode(text, add_special_tokens=False).ids
    for spelling in [*specials, *(spellings[0] for spellings in SENTINEL_TOKENS.values())]:
        for text in (spelling, f"a {spelling} fox", f"fox{spelling}{spelling}"):
            ids = tokenizer.encode(text)
            assert ids and not {*astuple(tokenizer.sentinels)} & {*ids}
            if kind == "BPE":
                kept = {token for token in text if original.token_to_id(token) is not None}
                assert tokenizer.decode(ids).replace(" ", "") == "".join(
                    token for token in text if token in kept and token != " "
                )


def test_appended_sentinels_are_shown_and_left_out(tmp_path: Path):
    tokenizer = TextTokenizer(save_tokenizer(tmp_path, "<|endoftext|>"))
    assert tokenizer.sentinels == Sentinels(257, 256, 256, 258, 259, 260, 261)
    assert tokenizer.vocab_size == 262
    ids = [256, *tokenizer.encode("a fox"), 258, 259, *tokenizer.encode(" b"), 256]
    assert tokenizer.decode(ids) == "a fox b"
    shown = "<|endoftext|>a fox<|image_start|><|image_end|> b<|endoftext|>"
    assert tokenizer.decode(ids, skip_special=False) == shown


def test_appended_sentinels_come_after_the_largest_id_where_there_are_gaps(tmp_path: Path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "fox": 90}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert astuple(TextTokenizer(tmp_path).sentinels) == (91, 92, 93, 94, 95, 96, 97)
    assert TextTokenizer(tmp_path).vocab_size == 98
    assert TextTokenizer(tmp_path).encode("fox") == [90]


def test_characters_that_only_a_sentinel_stands_for_are_left_out(tmp_path: Path):
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "fox": 1}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer(tmp_path)
    assert loaded.sentinels.bos == 0
    assert loaded.encode("fox bear fox <s>") == [1, 1]


def test_what_is_appended_is_said_once(tmp_path: Path, monkeypatch):
    lines = []
    monkeypatch.setattr(tokenizers_module.logger, "info", lines.append)
    folder = save_tokenizer(tmp_path, "<pad>", "<s>", "</s>", "<|image_start|>", "<|image_end|>")
    for _ in range(2):
        TextTokenizer(folder)
    (line,) = lines
    assert str(folder / "tokenizer.json") in line
    assert "appended <|speech_start|> (261), <|speech_end|> (262)" in line


def test_a_pickled_tokenizer_still_takes_sentinels_for_text(tmp_path: Path):
    tokenizer = TextTokenizer(save_tokenizer(tmp_path, "<|endoftext|>"))
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "a <|endoftext|> b"
    assert copy.encode(text) == tokenizer.encode(text)
    assert copy.decode(copy.encode(text)) == text
    assert copy.fingerprint() == tokenizer.fingerprint()


def test_fingerprints_change_with_what_codes_depend_on(tmp_path: Path):
    prints = [build_text_tokenizer("emoji").fingerprint()]
    prints += [build_image_tokenizer(name).fingerprint() for name in IMAGE_TOKENIZERS]
    prints.append(TextTokenizer(save_tokenizer(tmp_path, "<s>")).fingerprint())
    assert prints[-1] == TextTokenizer(tmp_path / "tokenizer.json").fingerprint()
    prints.append(TextTokenizer(save_tokenizer(tmp_path, "</s>")).fingerprint())
    centres = np.zeros((4, 4, 4, 3), np.uint8)
    for size, last in ((8, 0), (16, 0), (8, 1)):
        centres[-1] = last
        tensors = {"centres": centres, "image_size": np.array([size])}
        save_file(tensors, tmp_path / "codebook.safetensors")
        prints.append(build_image_tokenizer(str(tmp_path / "codebook.safetensors")).fingerprint())
    assert len(set(prints)) == len(prints)
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in prints)
    assert build_image_tokenizer("emoji_32px").fingerprint() == prints[1]


def test_files_that_are_not_tokenizers_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"cannot read .*tokenizer\.json"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        TextTokenizer(tmp_path)


def test_embedded_files_are_in_the_corpus_folder():
    assert all(path.parent == EMBEDDED_FOLDER for path in IMAGE_TOKENIZERS.values())
