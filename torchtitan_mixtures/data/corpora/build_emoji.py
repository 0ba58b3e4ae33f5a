"""Builds the embedded emoji corpus from pinned npm packages.

Run through `python scripts/prepare_data.py emoji`; needs the `npm` client, `resvg-py` and, for the
speech (see `build_speech.py`), `espeakng-loader`. The same inputs give byte-identical files: fixed
seeds, integer arithmetic in k-means, no timestamps.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from torchtitan_mixtures.data.codebooks import nearest_centres, split_patches
from torchtitan_mixtures.data.corpora.build_speech import build_speech
from torchtitan_mixtures.data.corpora.emoji_concepts import (
    IconSet,
    build_concepts,
    family_key,
    merge_lookalikes,
    rasterize,
    read_entries,
)
from torchtitan_mixtures.data.corpora.emoji_folder import write_licences
from torchtitan_mixtures.data.corpora.emoji_packages import PACKAGES, fetch
from torchtitan_mixtures.data.emoji import CELL_SIZE, STYLES, Concept, EmojiCorpus, Sheet
from torchtitan_mixtures.data.kmeans import kmeans
from torchtitan_mixtures.data.tokenizers import SENTINEL_TOKENS

SEED = 20
HELD_OUT = 0.1  # share of the families, and of the concepts with two styles, that is held out
NUM_CODES = 1024
PATCH_SIZE = 4
CODEBOOK_SIZES = (32, 64)
NUM_COLOURS = 256
SHEET_COLUMNS = 32
VOCAB_SIZE = 2048
LOOKALIKE_LIMIT = 10.0  # root mean square difference of 16 px views, in grey levels
SCENES_FOR_CODEBOOK = 1000
SCENES_FOR_TEXT = 6000
CAPTIONS_PER_DRAWING = 4

# --- pictures -------------------------------------------------------------------------------------


def write_sheet(path: Path, pictures: NDArray[np.uint8], seed: int) -> Sheet:
    """Quantise the pictures of one style to a palette and store them as one PNG.

    Args:
        path: The PNG file.
        pictures: `(drawings, 64, 64, 3)` uint8.
        seed: Of the palette's k-means.
    """
    packed = pictures.reshape(-1, 3).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    values, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colours = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1).astype(np.uint8)
    white = np.full(3, 255, np.uint8)
    counts[values == 0xFFFFFF] = 1  # white is pinned and would outweigh everything
    palette = kmeans(colours, counts, white, NUM_COLOURS, iterations=30, seed=seed)
    indices = nearest_centres(colours, palette).astype(np.uint8)[inverse]
    cells = indices.reshape(-1, CELL_SIZE, CELL_SIZE)
    rows = -(-len(cells) // SHEET_COLUMNS)
    grid = np.zeros((rows * SHEET_COLUMNS, CELL_SIZE, CELL_SIZE), np.uint8)
    grid[: len(cells)] = cells
    grid = grid.reshape(rows, SHEET_COLUMNS, CELL_SIZE, CELL_SIZE).transpose(0, 2, 1, 3)
    image = Image.fromarray(grid.reshape(rows * CELL_SIZE, -1), mode="P")
    image.putpalette(palette.tobytes(), "RGB")
    image.save(path, optimize=True)
    return Sheet(cells, palette)


def build_codebook(corpus: EmojiCorpus, size: int) -> NDArray[np.uint8]:
    """Patch centres of the train drawings and of scenes of them, `(1024, 4, 4, 3)` uint8."""
    rng = random.Random(SEED + size)
    scenes = [corpus.compose_scene(rng, "train", size).image for _ in range(SCENES_FOR_CODEBOOK)]
    images = np.concatenate([corpus.images(corpus.drawings("train"), size), np.stack(scenes)])
    patches = split_patches(images, PATCH_SIZE)
    white = np.full(patches.shape[1], 255, np.uint8)
    unique, counts = np.unique(patches, axis=0, return_counts=True)
    centres = kmeans(unique, counts, white, NUM_CODES, iterations=25, seed=SEED)
    return centres.reshape(NUM_CODES, PATCH_SIZE, PATCH_SIZE, 3)


# --- text -----------------------------------------------------------------------------------------


def build_tokenizer(corpus: EmojiCorpus) -> Tokenizer:
    """Byte-level BPE of captions and scene captions of the train split; sentinels come first."""
    rng = random.Random(SEED)
    captions = [
        corpus.caption(drawing, rng)
        for drawing in corpus.drawings("train")
        for _ in range(CAPTIONS_PER_DRAWING)
    ]
    captions += [corpus.compose_scene(rng, "train", 16).caption for _ in range(SCENES_FOR_TEXT)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[candidates[0] for candidates in SENTINEL_TOKENS.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


# --- the folder -----------------------------------------------------------------------------------


def build(out_dir: Path, work_dir: Path) -> None:
    """Build the corpus.

    Args:
        out_dir: Where the files go; those of an earlier build are replaced.
        work_dir: Where packages are downloaded and unpacked; what is there already is used again.

    Raises:
        ValueError: A tool is not installed, or a package is not the pinned one.
    """
    folders = {key: fetch(package, work_dir) for key, package in PACKAGES.items()}
    icon_sets = {style: IconSet.read(folders[style]) for style in STYLES}
    entries = read_entries(folders, icon_sets)
    pictures = [
        {style: rasterize(icon_sets[style].svg(icon)) for style, icon in entry.icons.items()}
        for entry in entries
    ]
    families = merge_lookalikes([family_key(entry) for entry in entries], pictures, LOOKALIKE_LIMIT)
    concepts = build_concepts(entries, families, HELD_OUT, SEED)

    out_dir.mkdir(parents=True, exist_ok=True)
    sheets = {}
    for style in STYLES:
        drawn = np.stack([drawings[style] for drawings in pictures if style in drawings])
        sheets[style] = write_sheet(out_dir / f"{style}.png", drawn, SEED)
    write_concepts(out_dir / "concepts.json", concepts)
    corpus = EmojiCorpus(concepts, sheets)
    for size in CODEBOOK_SIZES:
        tensors = {
            "centres": build_codebook(corpus, size),
            "image_size": np.array([size], np.int64),
        }
        (out_dir / f"codebook_{size}px.safetensors").write_bytes(save(tensors))
    build_tokenizer(corpus).save(str(out_dir / "tokenizer.json"), pretty=False)
    write_licences(out_dir, folders)
    build_speech(out_dir, corpus)


def write_concepts(path: Path, concepts: Sequence[Concept]) -> None:
    """Write `concepts.json`, one concept a line."""
    lines = ",\n".join(json.dumps(asdict(concept), ensure_ascii=False) for concept in concepts)
    path.write_text(f'{{"concepts": [\n{lines}\n]}}\n', encoding="utf-8")
