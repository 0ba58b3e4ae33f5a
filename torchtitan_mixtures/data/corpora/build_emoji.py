"""Builds the embedded emoji corpus from pinned npm packages.

Run through `python scripts/prepare_data.py emoji`; needs the `npm` client and `resvg-py`. The same
inputs give byte-identical files: fixed seeds, integer arithmetic in k-means, no timestamps.
"""

import hashlib
import json
import random
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from torchtitan_mixtures.data.corpora.emoji_concepts import (
    RESVG_VERSION,
    IconSet,
    build_concepts,
    family_key,
    merge_lookalikes,
    rasterize,
    read_entries,
)
from torchtitan_mixtures.data.corpora.kmeans import kmeans
from torchtitan_mixtures.data.emoji import (
    CELL_SIZE,
    EMBEDDED_FOLDER,
    FORMAT_VERSION,
    MANIFEST,
    REBUILD_COMMAND,
    SPLITS,
    STYLES,
    Concept,
    EmojiCorpus,
    Sheet,
)
from torchtitan_mixtures.data.tokenizers import SENTINEL_TOKENS, nearest_centres, split_patches


@dataclass(frozen=True)
class Package:
    """An npm package the corpus is made from; `sha256` is of the tarball that `npm pack` writes."""

    name: str
    version: str
    sha256: str


PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "noto_v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "unicode": Package(
        "unicode-emoji-json",
        "0.9.0",
        "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    ),
    "cldr": Package(
        "cldr-annotations-full",
        "48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ),
    "emojibase": Package(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}

KEPT_LICENCES = EMBEDDED_FOLDER / "licences"  # two texts are not in any of the packages

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

# --- sources --------------------------------------------------------------------------------------


def fetch(package: Package, work_dir: Path) -> Path:
    """Download and unpack one package; what is already there is used again.

    Returns:
        The folder of the unpacked package.
    """
    spec = f"{package.name}@{package.version}"
    target = work_dir / re.sub(r"[^a-z0-9.]+", "-", spec).strip("-")
    target.mkdir(parents=True, exist_ok=True)
    if not list(target.glob("*.tgz")):
        command = ["npm", "pack", spec, "--silent", "--pack-destination", str(target)]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            raise ValueError(
                "`npm` is not on the PATH; install Node.js to rebuild the corpus"
            ) from None
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"`{' '.join(command)}` failed with status {error.returncode}"
            ) from None
    (tarball,) = target.glob("*.tgz")
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{tarball} has sha256 {digest}, expected {package.sha256}; delete it and try again"
        )
    with tarfile.open(tarball) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


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
    write_notices(out_dir, folders)
    write_readme(out_dir, corpus)
    write_manifest(out_dir, corpus)


def write_concepts(path: Path, concepts: Sequence[Concept]) -> None:
    """Write `concepts.json`, one concept a line."""
    lines = ",\n".join(json.dumps(asdict(concept), ensure_ascii=False) for concept in concepts)
    path.write_text(f'{{"concepts": [\n{lines}\n]}}\n', encoding="utf-8")


def write_notices(out_dir: Path, folders: Mapping[str, Path]) -> None:
    """Write NOTICE and the licence texts."""
    licences = {
        "Apache-2.0": KEPT_LICENCES / "Apache-2.0.txt",
        "MIT-Fluent-Emoji": KEPT_LICENCES / "MIT-Fluent-Emoji.txt",
        "MIT-unicode-emoji-json": folders["unicode"] / "LICENSE",
        "MIT-emojibase": folders["emojibase"] / "LICENSE",
        "Unicode-3.0": folders["cldr"] / "LICENSE",
    }
    (out_dir / "licences").mkdir(parents=True, exist_ok=True)
    for name, source in licences.items():
        (out_dir / "licences" / f"{name}.txt").write_bytes(source.read_bytes())
    (out_dir / "NOTICE").write_text(NOTICE, encoding="utf-8")


def count_splits(corpus: EmojiCorpus) -> dict[str, dict[str, int]]:
    """Drawings, concepts and families of each split."""
    counts = {}
    for split in SPLITS:
        drawings = corpus.drawings(split)
        found = {drawing.concept for drawing in drawings}
        families = {concept.family for concept in found}
        counts[split] = {
            "drawings": len(drawings),
            "concepts": len(found),
            "families": len(families),
        }
    return counts


def write_readme(out_dir: Path, corpus: EmojiCorpus) -> None:
    """Write the README of the folder, with the counts of this build."""
    rows = [
        f"| `{split}` | {count['drawings']:,} | {count['concepts']:,} | {count['families']:,} |"
        for split, count in count_splits(corpus).items()
    ]
    styles = Counter(style for concept in corpus.concepts for style in concept.styles)
    text = README.format(
        concepts=len(corpus.concepts),
        drawings=sum(styles.values()),
        styles=", ".join(f"`{style}` {styles[style]:,}" for style in STYLES),
        splits="\n".join(rows),
        packages="\n".join(
            f"- `{package.name}` {package.version}" for package in PACKAGES.values()
        ),
        resvg=RESVG_VERSION,
        command=REBUILD_COMMAND,
    )
    (out_dir / "README.md").write_text(text, encoding="utf-8")


def write_manifest(out_dir: Path, corpus: EmojiCorpus) -> None:
    """Write `manifest.json`: sha256 and size of every other file, and the sources."""
    files = {}
    for path in sorted(
        path for path in out_dir.rglob("*") if path.is_file() and path.name != MANIFEST
    ):
        content = path.read_bytes()
        files[path.relative_to(out_dir).as_posix()] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
    manifest = {
        "format_version": FORMAT_VERSION,
        "cell_size": CELL_SIZE,
        "styles": STYLES,
        "splits": count_splits(corpus),
        "speech": None,  # no spoken names yet, and so no `unseen_voice` split
        "sources": {key: asdict(package) for key, package in PACKAGES.items()},
        "files": files,
    }
    (out_dir / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


NOTICE = """\
This folder contains works of others, changed: vector drawings were rasterised and reduced to 256
colours; names and keywords were selected and edited. The licence texts are in `licences/`.

noto.png, noto_v1.png
    Noto Emoji, Google
    Copyright Google Inc. Apache License 2.0 (Apache-2.0.txt)

fluent.png
    Fluent Emoji (flat), Microsoft
    Copyright (c) Microsoft Corporation. MIT License (MIT-Fluent-Emoji.txt)

concepts.json
    Unicode CLDR annotations (names, keywords)
    Copyright (c) Unicode, Inc. Unicode License V3 (Unicode-3.0.txt)
    unicode-emoji-json (order, groups, slugs)
    Copyright (c) Mu-An Chiou. MIT License (MIT-unicode-emoji-json.txt)
    emojibase-data (subgroups)
    Copyright (c) Miles Johnson. MIT License (MIT-emojibase.txt)

codebook_32px.safetensors, codebook_64px.safetensors and tokenizer.json are computed from the above.
"""

README = """\
# Emoji: the embedded corpus

{drawings:,} drawings of {concepts:,} emoji in three styles, with English names and keywords. Skin
tones and flags are left out. Read it through `torchtitan_mixtures.data.emoji`. This folder is
generated: change `../build_emoji.py` and rebuild. Sizes are in `manifest.json`.

| file | content |
|---|---|
| `noto.png`, `noto_v1.png`, `fluent.png` | 64 px cells on white, 256 colours, 0 is pure white |
| `concepts.json` | name, keywords, group, subgroup, family, split and styles of each emoji |
| `codebook_32px.safetensors`, `codebook_64px.safetensors` | 1,024 patches of 4x4 pixels |
| `tokenizer.json` | byte-level BPE, 2,048 entries; ids 0 to 6 are the sentinels |
| `manifest.json` | sha256 and size of every other file, checked at load |
| `NOTICE`, `licences/` | whose work this is |

Drawings by style: {styles}. Cell `i` of a sheet is the `i`-th emoji that has the style. The
codebooks are k-means centres of train drawings and scenes of them; code 0 is pure white.

## Splits

A family is a set of near-duplicates: man, woman and person, left and right, clock faces, colours of
one shape, and drawings that look alike pixel by pixel. No family is in both `train` and
`unseen_concept`.

| split | drawings | emoji | families |
|---|---|---|---|
{splits}

`unseen_concept` holds a tenth of the families. `unseen_style` withholds one style of a tenth of the
others: each of its emoji occurs in `train` in another style. There is no speech yet ("speech" is
null in the manifest); the split `unseen_voice` will come with it.

## Rebuild

```
pip install resvg-py=={resvg}
{command}
```

needs the `npm` client, and fetches

{packages}

The result is byte-identical for the same versions of these, of `resvg-py`, of Pillow with its zlib
and of `tokenizers`. The Apache-2.0 text and the MIT text of Fluent are kept in `licences/` by hand:
the packages do not carry them.
"""
