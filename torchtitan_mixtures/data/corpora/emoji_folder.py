"""What stands beside the data of the emoji corpus: notices, README and manifest."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torchtitan_mixtures.data.corpora.emoji_concepts import RESVG_VERSION
from torchtitan_mixtures.data.corpora.emoji_packages import PACKAGES
from torchtitan_mixtures.data.corpora.espeak import ESPEAK_PACKAGE, ESPEAK_VERSION
from torchtitan_mixtures.data.emoji import (
    CELL_SIZE,
    EMBEDDED_FOLDER,
    FORMAT_VERSION,
    MANIFEST,
    REBUILD_COMMAND,
    SPEECH_COMMAND,
    SPLITS,
    STYLES,
    EmojiCorpus,
)
from torchtitan_mixtures.data.spoken import VOICES, SpokenNames

KEPT_LICENCES = EMBEDDED_FOLDER / "licences"  # two texts are not in any of the packages


def describe_folder(out_dir: Path, corpus: EmojiCorpus, spoken: SpokenNames) -> None:
    """Write NOTICE, README and manifest, of the data files that are there by now."""
    (out_dir / "NOTICE").write_text(NOTICE, encoding="utf-8")
    write_readme(out_dir, corpus, spoken)
    write_manifest(out_dir, corpus, spoken)


def write_licences(out_dir: Path, folders: Mapping[str, Path]) -> None:
    """Write the licence texts."""
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


def write_readme(out_dir: Path, corpus: EmojiCorpus, spoken: SpokenNames) -> None:
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
        speech_command=SPEECH_COMMAND,
        espeak=f"{ESPEAK_PACKAGE}=={ESPEAK_VERSION}",
        voices=", ".join(f"`{voice}`" for voice in VOICES[:-1]),
        withheld=VOICES[-1],
        units=len(spoken.units),
        minutes=round(len(spoken.units) / 25 / 60),
    )
    (out_dir / "README.md").write_text(text, encoding="utf-8")


def write_manifest(out_dir: Path, corpus: EmojiCorpus, spoken: SpokenNames) -> None:
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
        "speech": {
            "made_with": f"{ESPEAK_PACKAGE} {ESPEAK_VERSION}",
            "voices": VOICES,
            "withheld_voice": VOICES[-1],
            "units": len(spoken.units),
        },
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

speech.safetensors, codebook_speech.safetensors
    Computed from what the speech synthesiser espeak-ng (GPL-3.0-or-later) said when it was given
    the names. They are its output and contain no part of it; it is not in this project.
"""

README = """\
# Emoji: the embedded corpus

{drawings:,} drawings of {concepts:,} emoji in three styles, with English names, keywords, and the
names spoken in six voices. Skin tones and flags are left out. Read it through
`torchtitan_mixtures.data.emoji`. This folder is generated: change `../build_emoji.py`,
`../build_speech.py` or `../emoji_folder.py` and rebuild. Sizes are in `manifest.json`.

| file | content |
|---|---|
| `noto.png`, `noto_v1.png`, `fluent.png` | 64 px cells on white, 256 colours, 0 is pure white |
| `concepts.json` | name, keywords, group, subgroup, family, split and styles of each emoji |
| `codebook_32px.safetensors`, `codebook_64px.safetensors` | 1,024 patches of 4x4 pixels |
| `tokenizer.json` | byte-level BPE, 2,048 entries; ids 0 to 6 are the sentinels |
| `speech.safetensors` | `units` of the names, voice by voice; `lengths`, (emoji, voices) |
| `codebook_speech.safetensors` | 512 pairs of log-mel spectra with 40 bands; code 0 is silence |
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
others: each of its emoji occurs in `train` in another style. `unseen_voice` is for models with
speech: the drawings of `train`, with names in a voice that speaks in no other split.

## Speech

{units:,} units of 40 ms, {minutes} minutes: every name in the voices
{voices}
and, withheld for `unseen_voice`, `{withheld}`. They are the output of the synthesiser
espeak-ng, which is not part of this project and is not needed to train. The codebook is k-means of
the train names in the five train voices, on 16 kHz sound. Decoding to sound is rough: see
`torchtitan_mixtures.data.speech`.

## Rebuild

```
pip install resvg-py=={resvg} {espeak}
{command}
{speech_command}    # the speech alone, on a corpus that is there
```

The first needs the `npm` client, and fetches

{packages}

The result is byte-identical for the same versions of these, of `resvg-py`, of Pillow with its zlib,
of `tokenizers` and of `espeakng-loader` for Linux. The Apache-2.0 text and the MIT text of Fluent
are kept in `licences/` by hand: the packages do not carry them.
"""
