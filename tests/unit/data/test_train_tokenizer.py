"""Codebooks trained on files: what is written, what is reported, what stops the training."""

import argparse
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from torchtitan_mixtures.data import train_tokenizer, training_rows
from torchtitan_mixtures.data.audio import write_wav
from torchtitan_mixtures.data.kmeans import kmeans
from torchtitan_mixtures.data.speech import LogMelCodebook, build_speech_tokenizer
from torchtitan_mixtures.data.tokenizers import PatchCodebook, build_image_tokenizer
from torchtitan_mixtures.data.train_tokenizer import (
    Quality,
    Training,
    train_image_tokenizer,
    train_speech_tokenizer,
)
from torchtitan_mixtures.data.training_rows import RowSample, find_files

ROOT = Path(__file__).parents[3]


def save_images(folder: Path, count: int, colours: int = 8, size: int = 16) -> None:
    """Pictures of 4 x 4 squares in few colours, in two folders."""
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (colours, 3), dtype=np.uint8)
    for number in range(count):
        inner = folder / f"{number % 2}"
        inner.mkdir(parents=True, exist_ok=True)
        squares = palette[rng.integers(0, colours, (size // 4, size // 4))]
        Image.fromarray(squares.repeat(4, 0).repeat(4, 1)).save(inner / f"{number}.png")


def quiet(line: str) -> None:
    """What is logged in tests that do not look at it."""


# --- images ---------------------------------------------------------------------------------------


def test_as_many_codes_as_colours_lose_nothing(tmp_path: Path):
    save_images(tmp_path / "in", 20)
    out, lines = tmp_path / "new" / "codebook.safetensors", []
    training = Training(str(tmp_path / "in"), out, codes=9, holdout=0.1)
    trained = train_image_tokenizer(training, 16, 4, lines.append)
    assert trained.held_out is not None
    assert (trained.trained.files, trained.held_out.files) == (18, 2)
    assert trained.trained.psnr == trained.held_out.psnr == math.inf
    tokenizer = build_image_tokenizer(str(out))
    assert isinstance(tokenizer, PatchCodebook)
    assert (tokenizer.image_size, tokenizer.num_codes, tokenizer.codes_per_image) == (16, 9, 16)
    assert (tokenizer.centres[0] == 255).all()
    image = np.asarray(Image.open(tmp_path / "in" / "1" / "3.png"))[None]
    assert (tokenizer.decode(tokenizer.encode(image)) == image).all()
    text = "\n".join(lines)
    assert "18 images, and 2 held out" in text and "9 of them different" not in text
    assert "PSNR inf dB of 2 held-out images" in text and "codes occur in 2 held-out" in text
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_reported_quality_is_that_of_the_file(tmp_path: Path):
    save_images(tmp_path / "in", 12, colours=40)
    out = tmp_path / "codebook.safetensors"
    training = Training(str(tmp_path / "in"), out, codes=6, holdout=0.25, iterations=4)
    trained = train_image_tokenizer(training, 16, 4, quiet)
    tokenizer = build_image_tokenizer(str(out))
    paths = find_files(str(tmp_path / "in"), (".png",))
    random.Random(0).shuffle(paths)
    for quality, group in ((trained.held_out, paths[:3]), (trained.trained, paths[3:])):
        assert quality is not None
        images = np.stack([np.asarray(Image.open(path)) for path in group])
        codes = tokenizer.encode(images)
        error = (tokenizer.decode(codes).astype(float) - images) ** 2
        assert quality.psnr == pytest.approx(10 * math.log10(255**2 / error.mean()))
        occurring = [list(codes.flat).count(code) / codes.size for code in range(6)]
        assert quality.used == sum(share > 0 for share in occurring) / 6
        entropy = -sum(share * math.log(share) for share in occurring if share)
        assert quality.perplexity == pytest.approx(math.exp(entropy))
        patches = images.reshape(-1, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
        spread = ((patches - patches.mean(axis=0)) ** 2).sum()
        assert quality.variance_kept == pytest.approx(1 - error.sum() / spread)


def test_a_training_repeats_and_its_seed_matters(tmp_path: Path):
    save_images(tmp_path / "in", 12, colours=40)
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / name
        training = Training(str(tmp_path / "in"), out, codes=6, seed=seed, iterations=2)
        train_image_tokenizer(training, 16, 4, quiet)
        contents.append(out.read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_patterns_and_a_limit_choose_files(tmp_path: Path):
    save_images(tmp_path / "in", 12)
    (tmp_path / "in" / "0" / "notes.txt").write_text("no image")
    assert len(find_files(str(tmp_path / "in"), (".png",))) == 12
    pattern = str(tmp_path / "in" / "1" / "*.png")
    training = Training(pattern, tmp_path / "a", codes=4, max_files=4, holdout=0)
    trained = train_image_tokenizer(training, 16, 4, quiet)
    assert trained.trained.files == 4 and trained.held_out is None


def test_bad_images_are_skipped_and_named(tmp_path: Path):
    save_images(tmp_path / "in", 20)
    (tmp_path / "in" / "0" / "0.png").write_bytes(b"")
    whole = (tmp_path / "in" / "1" / "1.png").read_bytes()
    (tmp_path / "in" / "1" / "1.png").write_bytes(whole[: len(whole) // 2])
    lines: list[str] = []
    values = {"codes": 4, "holdout": 0.2, "max_bad_fraction": 0.1}
    training = Training(str(tmp_path / "in"), tmp_path / "a", **values)
    trained = train_image_tokenizer(training, 16, 4, lines.append)
    assert trained.held_out is not None
    assert trained.trained.files + trained.held_out.files == 18
    skipped = [line for line in lines if line.startswith("Skipped")]
    assert len(skipped) == 2
    assert any("0.png: the file is empty" in line for line in skipped)
    assert any("1.png" in line for line in skipped)


def test_too_many_bad_images_stop_the_training_and_nothing_is_written(tmp_path: Path):
    save_images(tmp_path / "in", 20)
    for number in (0, 2, 4):
        (tmp_path / "in" / "0" / f"{number}.png").write_bytes(b"no")
    training = Training(str(tmp_path / "in"), tmp_path / "a", codes=4)
    with pytest.raises(ValueError, match=r"of \d+ images .*--max-bad-fraction = 0.01 allows 0"):
        train_image_tokenizer(training, 16, 4, quiet)
    assert not (tmp_path / "a").exists()


def test_many_bad_images_stop_the_training_early(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(training_rows, "_MIN_SEEN", 5)
    for number in range(50):
        (tmp_path / f"{number:02}.png").write_bytes(b"no")
    training = Training(str(tmp_path), tmp_path / "a", codes=4)
    with pytest.raises(ValueError, match=r"^5 of 5 images \(100.00%\)"):
        train_image_tokenizer(training, 16, 4, quiet)


def test_a_failed_write_leaves_no_codebook(tmp_path: Path, monkeypatch):
    save_images(tmp_path / "in", 4)

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    training = Training(str(tmp_path / "in"), tmp_path / "a", codes=4)
    with pytest.raises(OSError, match="disk full"):
        train_image_tokenizer(training, 16, 4, quiet)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"codes": 1}, "--codes = 1 is out of range; expected 2 to"),
        ({"codes": 10**6}, "--codes = 1000000"),
        ({"holdout": 1.0}, r"--holdout = 1\.0"),
        ({"holdout": 0.99}, "--holdout = 0.99 takes"),
        ({"iterations": 0}, "--iterations = 0"),
        ({"max_files": 0}, "the number of files = 0"),
        ({"max_bad_fraction": 2.0}, r"--max-bad-fraction = 2\.0"),
        ({"codes": 10}, r"--codes = 10, but .* only 8 different pieces to make 9"),
    ],
)
def test_values_out_of_range_are_named(tmp_path: Path, values: dict, message: str):
    save_images(tmp_path / "in", 10)
    training = Training(**{"path": str(tmp_path / "in"), "out": tmp_path / "a", **values})
    with pytest.raises(ValueError, match=message):
        train_image_tokenizer(training, 16, 4, quiet)


def test_sizes_and_files_that_do_not_fit_are_named(tmp_path: Path):
    training = Training(str(tmp_path), tmp_path / "a")
    with pytest.raises(ValueError, match="--size = 18 is not a multiple of --patch-size = 4"):
        train_image_tokenizer(training, 18, 4, quiet)
    with pytest.raises(ValueError, match="has no files; expected a folder or a pattern"):
        train_image_tokenizer(training, 16, 4, quiet)
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=r"--out .*a exists"):
        train_image_tokenizer(training, 16, 4, quiet)
    other = Training(str(tmp_path), tmp_path / "b")
    with pytest.raises(ValueError, match="--sample-rate = 16050 is not a multiple of 100"):
        train_speech_tokenizer(other, 40, 16_050, 2, quiet)
    with pytest.raises(ValueError, match="--bands = 0"):
        train_speech_tokenizer(other, 0, 16_000, 2, quiet)


# --- sounds ---------------------------------------------------------------------------------------


def tone(hertz: float, rate: int, seconds: float) -> NDArray[np.float32]:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype("f4")


def test_a_codebook_of_sounds_serves_as_a_speech_tokenizer(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for number in range(12):
        rate = (8_000, 16_000, 22_050)[number % 3]
        sound = np.concatenate([tone(300 + 40 * number, rate, 0.3), tone(900, rate, 0.2)])
        write_wav(tmp_path / "in" / f"{number}.wav", sound, rate)
    out, lines = tmp_path / "codebook.safetensors", []
    training = Training(str(tmp_path / "in"), out, codes=16, holdout=0.2, iterations=5)
    trained = train_speech_tokenizer(training, 20, 8_000, 4, lines.append)
    tokenizer = build_speech_tokenizer(str(out))
    assert isinstance(tokenizer, LogMelCodebook)
    assert (tokenizer.num_codes, tokenizer.sample_rate) == (16, 8_000)
    assert (tokenizer.units_per_second, tokenizer.num_bands) == (12.5, 20)
    assert not tokenizer.centres[0].any()  # silence
    assert tokenizer.encode(tone(300, 8_000, 0.5)).shape == (7,)
    assert trained.held_out is not None and trained.held_out.files == 3
    assert 0.5 < trained.held_out.variance_kept <= trained.trained.variance_kept < 1
    text = "\n".join(lines)
    assert "of the variance of 3 held-out sounds kept" in text
    assert "of 16 codes occur in 3 held-out sounds" in text


def test_broken_sounds_are_named(tmp_path: Path):
    write_wav(tmp_path / "a.wav", tone(300, 8_000, 1.0), 8_000)
    (tmp_path / "b.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:99])
    training = Training(str(tmp_path), tmp_path / "out", codes=2, holdout=0)
    with pytest.raises(ValueError, match=r"1 of 2 sounds .*b\.wav is cut off"):
        train_speech_tokenizer(training, 20, 8_000, 2, quiet)


# --- parts ----------------------------------------------------------------------------------------


def test_a_sample_is_even_and_stays_within_its_limit():
    counts = np.zeros(100, int)
    for seed in range(300):
        sample = RowSample(10, seed)
        for start in range(0, 100, 7):
            numbers = np.arange(start, min(start + 7, 100), dtype=np.uint8)
            sample.add(numbers[:, None])
        rows = sample.rows(1)
        assert rows.shape == (10, 1) and len({*rows.flat}) == 10
        counts[rows[:, 0]] += 1
    # 30 each are expected, with a standard deviation of 5.2.
    assert counts.min() > 9 and counts.max() < 51
    assert abs(counts[:50].sum() - 1500) < 120


def test_a_sample_of_few_rows_is_all_of_them():
    sample = RowSample(10, 0)
    assert sample.rows(3).shape == (0, 3)
    rows = np.arange(15, dtype=np.uint8).reshape(5, 3)
    sample.add(rows)
    assert (sample.rows(3) == rows).all()


def test_k_means_matches_a_naive_one():
    rng = np.random.default_rng(0)
    points = np.unique(rng.integers(0, 256, (60, 3), dtype=np.uint8), axis=0)
    weights = rng.integers(1, 4, len(points))
    pinned = np.zeros(3, np.uint8)
    before = kmeans(points, weights, pinned, 5, 3, seed=4)
    after = kmeans(points, weights, pinned, 5, 4, seed=4)
    groups: list[list[tuple[list[int], int]]] = [[] for _ in before]
    for point, weight in zip(points.astype(int).tolist(), weights.tolist(), strict=True):
        distances = [
            sum((a - b) ** 2 for a, b in zip(point, centre, strict=True))
            for centre in before.astype(int).tolist()
        ]
        groups[distances.index(min(distances))].append((point, weight))
    assert all(groups)
    for number, group in enumerate(groups):
        total = sum(weight for _, weight in group)
        means = [sum(p[axis] * weight for p, weight in group) / total for axis in range(3)]
        expected = [0, 0, 0] if number == 0 else [math.floor(mean + 0.5) for mean in means]
        assert after[number].tolist() == expected


def test_k_means_in_chunks_gives_the_same(monkeypatch):
    from torchtitan_mixtures.data import codebooks
    from torchtitan_mixtures.data import kmeans as module

    rng = np.random.default_rng(0)
    points = np.unique(rng.integers(0, 256, (200, 3), dtype=np.uint8), axis=0)
    arguments = (points, np.ones(len(points), np.int64), points[0], 20, 4, 0)
    whole = kmeans(*arguments)
    monkeypatch.setattr(module, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(codebooks, "_CHUNK_DISTANCES", 50)
    assert (kmeans(*arguments) == whole).all()


def test_the_pinned_centre_stays_where_no_point_is_near():
    points = np.array([[200], [210], [220], [230], [240]], np.uint8)
    centres = kmeans(points, np.ones(5, np.int64), np.zeros(1, np.uint8), 3, 5, seed=0)
    assert centres[0] == 0 and (centres[1:] >= 200).all()


def test_quality_where_nothing_varies():
    quality = Quality(2)
    rows = np.full((3, 2), 7, np.uint8)
    quality.add(rows, np.full((2, 2), 7, np.uint8))
    assert (quality.variance_kept, quality.psnr, quality.perplexity) == (1.0, math.inf, 1.0)
    quality.add(rows, np.full((2, 2), 8, np.uint8))
    assert quality.variance_kept == 0.0 and quality.used == 0.5


@pytest.mark.parametrize("kind", ["image", "speech"])
def test_the_commands_train_codebooks(tmp_path: Path, monkeypatch, capsys, kind: str):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import prepare_data_tokenizers as commands

    parser = argparse.ArgumentParser()
    subcommands = parser.add_subparsers(required=True)
    commands.add_train_image_tokenizer(subcommands)
    commands.add_train_speech_tokenizer(subcommands)
    out = str(tmp_path / "out.safetensors")
    words = [f"train-{kind}-tokenizer", "--path", str(tmp_path / "in"), "--out", out]
    words += ["--codes", "4", "--holdout", "0.2", "--iterations", "2", "--seed", "3"]
    if kind == "image":
        save_images(tmp_path / "in", 10)
        words += ["--size", "16", "--patch-size", "4", "--max-images", "8"]
    else:
        (tmp_path / "in").mkdir()
        for number in range(4):
            sound = tone(300 + 100 * number, 8_000, 0.5)
            write_wav(tmp_path / "in" / f"{number}.wav", sound, 8_000)
        words += ["--bands", "20", "--sample-rate", "8000", "--frames-per-unit", "2"]
    arguments = parser.parse_args(words)
    arguments.run(arguments)
    assert f"train with --multimodal.{kind}_tokenizer {out}" in capsys.readouterr().out
    build = build_image_tokenizer if kind == "image" else build_speech_tokenizer
    assert build(out).num_codes == 4
    sys.modules.pop("prepare_data_tokenizers")


def test_quality_is_measured_on_a_bounded_number_of_files(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "_JUDGED", 3)
    save_images(tmp_path / "in", 20)
    training = Training(str(tmp_path / "in"), tmp_path / "a", codes=4, holdout=0.5)
    trained = train_image_tokenizer(training, 16, 4, quiet)
    assert trained.held_out is not None
    assert (trained.trained.files, trained.held_out.files) == (3, 3)
