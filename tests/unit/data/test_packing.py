"""Encoding and packing, against a naive second implementation and by properties."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch

from tests.unit.data.fakes import (
    MODALITIES,
    SENTINELS,
    ByteTokenizer,
    GreyTokenizer,
    make_encoder,
    random_document,
    random_documents,
)
from torchtitan_mixtures.data.batch import check_batch
from torchtitan_mixtures.data.batch_builder import BatchBuilder
from torchtitan_mixtures.data.encoding import DocumentEncoder, Modalities
from torchtitan_mixtures.data.packing import Packer, choose_documents
from torchtitan_mixtures.data.sources import Document, Segment

SEQ_LEN = 64


def naive_tokens(document: Document) -> list[int]:
    """What a document that fits must become, token by token."""
    tokens = [SENTINELS.bos]
    for segment in document.segments:
        if segment.modality == "text":
            tokens += ByteTokenizer().encode(segment.payload)
        else:
            tokens += [SENTINELS.image_start, *(300 + int(c) for c in segment.payload)]
            tokens += [SENTINELS.image_end]
    return [*tokens, SENTINELS.eos]


def naive_batch(sequences: list[list[list[int]]], resets: bool) -> dict[str, list[list]]:
    """The batch contract, position by position."""
    keys = ("input", "labels", "document_ids", "image_ids", "positions", "modality")
    rows: dict[str, list[list]] = {key: [] for key in keys}
    for sequence in sequences:
        row: dict[str, list] = {key: [] for key in keys}
        image = -1
        used = sum(map(len, sequence))
        padded = [*sequence, [SENTINELS.pad] * (SEQ_LEN - used)]
        for number, tokens in enumerate(padded):
            for place, token in enumerate(tokens):
                is_image = token >= 300
                if is_image and tokens[place - 1] < 300:
                    image += 1
                is_labelled = number < len(sequence) and place + 1 < len(tokens)
                row["positions"].append(place if resets else len(row["input"]))
                row["input"].append(token)
                row["labels"].append(tokens[place + 1] if is_labelled else -100)
                row["document_ids"].append(number)
                row["image_ids"].append(image if is_image else -1)
                row["modality"].append(int(is_image))
        for key in keys:
            rows[key].append(row[key])
    return rows


def make_builder(
    weights: tuple[float, ...] = (1.0, 1.0),
    resets: bool = False,
    modalities: Modalities = MODALITIES,
) -> BatchBuilder:
    return BatchBuilder(modalities, weights, SENTINELS.pad, SEQ_LEN, resets)


def test_document_gets_sentinels_and_shifted_codes() -> None:
    document = Document((Segment("text", "ab"), Segment("image", np.array([0, 1, 2, 15]))), "k")
    (tokens,) = make_encoder(SEQ_LEN).encode(document)
    assert tokens.tolist() == [1, 7 + 97, 7 + 98, 3, 300, 301, 302, 315, 4, 2]


def test_pixels_are_encoded() -> None:
    pixels = np.full((8, 8, 3), 255, np.uint8)
    (tokens,) = make_encoder(SEQ_LEN).encode(Document((Segment("image", pixels),), "k"))
    assert tokens.tolist() == [1, 3, 315, 315, 315, 315, 4, 2]


@pytest.mark.parametrize("seed", range(5))
def test_batches_match_naive_implementation(seed: int) -> None:
    resets = seed % 2 == 1
    documents = [d for d in random_documents(seed, 300) if len(naive_tokens(d)) <= SEQ_LEN]
    packed = list(Packer(SEQ_LEN).pack(map(make_encoder(SEQ_LEN).encode, documents)))
    arrays, labels = make_builder(resets=resets).build(packed)
    naive = naive_batch([[doc.tolist() for doc in seq] for seq in packed], resets)
    for key in ("input", "document_ids", "image_ids", "positions"):
        assert arrays[key].tolist() == naive[key], key
    assert labels.tolist() == naive["labels"]
    assert arrays["modality_masks"].argmax(1).tolist() == naive["modality"]
    assert "loss_weights" not in arrays

    # Every document is there exactly once, whole.
    expected = sorted(naive_tokens(document) for document in documents)
    assert sorted(doc.tolist() for seq in packed for doc in seq) == expected
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    check_batch(tensors, torch.from_numpy(labels), MODALITIES.vocab_ranges)


@pytest.mark.parametrize("seed", range(5))
def test_long_documents_lose_nothing_and_images_stay_whole(seed: int) -> None:
    rng = random.Random(seed)
    encoder = make_encoder(16)
    for document in random_documents(seed, 100, max_text=60):
        pieces = encoder.encode(document)
        inner = [piece.tolist()[1:-1] for piece in pieces]
        assert list(itertools.chain(*inner)) == naive_tokens(document)[1:-1]
        for piece in pieces:
            assert len(piece) <= 16
            assert (piece[0], piece[-1]) == (SENTINELS.bos, SENTINELS.eos)
            starts, ends = piece == SENTINELS.image_start, piece == SENTINELS.image_end
            assert (starts.nonzero()[0] + 5 == ends.nonzero()[0]).all()
    fitting = random_document(rng, "k", max_text=2)
    assert len(encoder.encode(Document(fitting.segments[:1], "k"))) == 1


def test_choice_is_the_fullest_and_takes_the_oldest() -> None:
    rng = random.Random(0)
    for _ in range(200):
        space = rng.randint(5, 40)
        lengths = [rng.randint(1, space) for _ in range(rng.randint(1, 8))]
        chosen = choose_documents(lengths, space)
        others = range(1, len(lengths))
        subsets = itertools.chain.from_iterable(
            itertools.combinations(others, n) for n in range(len(lengths))
        )
        sums = (lengths[0] + sum(lengths[i] for i in subset) for subset in subsets)
        assert sum(lengths[i] for i in chosen) == max(s for s in sums if s <= space)
        assert chosen[0] == 0
        assert chosen == sorted(set(chosen))


def test_no_document_waits_forever_and_little_is_padded() -> None:
    documents = list(random_documents(0, 2000))
    packer, pieces = Packer(512), map(make_encoder(512).encode, documents)
    used = [sum(map(len, sequence)) for sequence in packer.pack(pieces)]
    assert np.mean(used[:-5]) > 0.999 * 512


def test_state_continues_exactly() -> None:
    documents = list(random_documents(1, 400))

    def flatten(sequences: list) -> list:
        return [[doc.tolist() for doc in sequence] for sequence in sequences]

    whole = flatten(Packer(SEQ_LEN).pack(map(make_encoder(SEQ_LEN).encode, documents)))
    for cut in (0, 1, 7, 40):
        packer, source = Packer(SEQ_LEN), map(make_encoder(SEQ_LEN).encode, documents)
        first = flatten(list(itertools.islice(packer.pack(source), cut)))
        state = json.loads(json.dumps(packer.state_dict(), default=np.ndarray.tolist))
        resumed = Packer(SEQ_LEN)
        resumed.load_state_dict(state)
        assert first + flatten(list(resumed.pack(source))) == whole


def test_weights_follow_the_target() -> None:
    document = Document((Segment("text", "ab"), Segment("image", np.array([0, 1, 2, 15]))), "k")
    sequences = [make_encoder(SEQ_LEN).encode(document)]
    arrays, labels = make_builder(weights=(1.0, 0.5)).build(sequences)
    # bos a b <image> 0 1 2 15 </image> eos: the weight at a position is that of the next token
    expected = [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 1, 1]
    assert arrays["loss_weights"][0, :9].tolist() == expected
    assert arrays["loss_weights"].dtype == np.float32
    assert (arrays["loss_weights"][labels == -100] == 0).all()


def test_weight_of_zero_removes_labels() -> None:
    document = Document((Segment("text", "ab"), Segment("image", np.array([0, 1, 2, 15]))), "k")
    sequences = [make_encoder(SEQ_LEN).encode(document)]
    arrays, labels = make_builder(weights=(0.0, 1.0)).build(sequences)
    assert "loss_weights" not in arrays
    assert labels[labels != -100].tolist() == [300, 301, 302, 315]
    with pytest.raises(ValueError, match="are all 0"):
        make_builder(weights=(0.0, 0.0))


def test_empty_sequence_is_padding_without_loss() -> None:
    arrays, labels = make_builder().build([[]])
    assert (arrays["input"] == SENTINELS.pad).all()
    assert (labels == -100).all()
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    check_batch(tensors, torch.from_numpy(labels), MODALITIES.vocab_ranges)


def test_third_modality_without_data_is_absent_and_with_data_works() -> None:
    modalities = Modalities(("text", "image", "speech"), ((0, 300), (300, 316), (316, 320)))
    speech = Segment("speech", np.array([0, 3]))
    image = Segment("image", np.array([1, 2, 3, 4]))
    (tokens,) = make_encoder(SEQ_LEN, modalities).encode(Document((speech, image), "k"))
    assert tokens.tolist() == [1, 5, 316, 319, 6, 3, 301, 302, 303, 304, 4, 2]
    builder = make_builder((1.0, 1.0, 1.0), modalities=modalities)
    arrays, _ = builder.build([[tokens]])
    assert arrays["modality_masks"].sum((0, 2)).tolist() == [SEQ_LEN - 6, 4, 2]
    idle = Modalities(("text", "image", "speech"), ((0, 300), (300, 316), (316, 316)))
    arrays, _ = make_builder((1.0, 1.0, 1.0), modalities=idle).build([[tokens[:1]]])
    assert arrays["modality_masks"].sum((0, 2)).tolist() == [SEQ_LEN, 0, 0]


def test_errors_name_the_key_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"training\.seq_len = 7 is too short.*at least 8"):
        make_encoder(7)
    with pytest.raises(ValueError, match=r"validation\.seq_len = 7"):
        DocumentEncoder(ByteTokenizer(), GreyTokenizer(), MODALITIES, 7, "validation.seq_len")
    encoder = make_encoder(SEQ_LEN)
    with pytest.raises(ValueError, match=r"Document k .*'speech'.*text, image"):
        encoder.encode(Document((Segment("speech", np.array([0])),), "k"))
    with pytest.raises(ValueError, match=r"image codes span \[0, 16\].*0 to 15"):
        encoder.encode(Document((Segment("image", np.array([0, 16])),), "k"))
    with pytest.raises(ValueError, match="Document k has 102 tokens of image in one segment"):
        encoder.encode(Document((Segment("image", np.zeros(100, np.int64)),), "k"))
