"""Mixing and packing: shares of tokens, limits, counts and loss, against naive versions."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.fakes import MODALITIES, SENTINELS, make_encoder
from torchtitan_mixtures.data.batch_builder import BatchBuilder
from torchtitan_mixtures.data.encoding import DocumentEncoder, Tokens
from torchtitan_mixtures.data.loader import MultimodalDataLoader
from torchtitan_mixtures.data.mixing import Ingredient, MixedShard, Mixture
from torchtitan_mixtures.data.packing import Packer
from torchtitan_mixtures.data.sequences import TrainingSequences
from torchtitan_mixtures.data.shards import Share
from torchtitan_mixtures.data.sources import (
    Document,
    IndexedShard,
    IndexedSource,
    PairOrder,
    Segment,
    document_rng,
)
from torchtitan_mixtures.source_entries import SourceEntry, parse_entries

SEQ_LEN = 128


class Letters(IndexedSource):
    """Texts of one letter, whose lengths are drawn from a list: tokens say their source."""

    def __init__(
        self, letter: str, lengths: Sequence[int], count: int = 1000, is_endless: bool = True
    ) -> None:
        super().__init__(count, ord(letter), is_endless)
        self.letter = letter
        self.lengths = lengths
        self.rejected: list[str] = []

    def shards(self, indices: Sequence[int], count: int) -> list[LetterShard]:
        return [LetterShard(self, index, count, self.build_document) for index in indices]

    def build_document(self, epoch: int, index: int) -> Document:
        length = document_rng(self.seed, epoch, index).choice(self.lengths)
        return Document((Segment("text", self.letter * length),), f"{self.letter}{epoch}:{index}")

    def fingerprint(self) -> dict[str, Any]:
        return {"multimodal.seed": self.seed}


class LetterShard(IndexedShard):
    def reject(self, document: Document, error: ValueError) -> None:
        self._source.rejected.append(f"{document.key}: {error}")


def mix(*parts: Ingredient, encoder: DocumentEncoder | None = None) -> Mixture:
    return Mixture(parts, encoder or make_encoder(SEQ_LEN))


def letters_of(sequences: Sequence[Sequence[Tokens]]) -> Counter[str]:
    """Tokens of each letter's documents, their sentinels among them."""
    counts: Counter[str] = Counter()
    for tokens in itertools.chain(*sequences):
        counts[chr(tokens[1] - 7)] += len(tokens)
    return counts


def packed(shard: MixedShard, count: int, method: Any = "best_fit") -> list[list[Tokens]]:
    return list(itertools.islice(Packer(SEQ_LEN, method).pack(iter(shard)), count))


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["best_fit", "greedy"])
@pytest.mark.parametrize(
    ("weights", "lengths"),
    [
        ((0.5, 0.5), ([2], [120])),
        ((0.9, 0.1), ([100, 110, 120], [1, 2, 3])),
        ((7, 2, 1), ([1, 126], [30], [60, 61])),
        ((0.97, 0.03), ([5, 20], [120])),
        ((1, 1, 1, 1), ([1], [10], [60], [126])),
        ((0.6, 0.4), ([300], [4])),  # several sequences long: split, with more sentinels
    ],
)
def test_shares_of_packed_tokens_are_within_a_hundredth_of_the_weights(weights, lengths, method):
    parts = [
        Ingredient(letter, Letters(letter, of_source), weight)
        for letter, of_source, weight in zip("abcd", lengths, weights, strict=False)
    ]
    shards = mix(*parts).shards(range(4), 4)
    counts = letters_of([row for shard in shards for row in packed(shard, 800, method)])
    for part in parts:
        share = counts[part.name] / counts.total()
        expected = part.weight / sum(weights)
        assert abs(share - expected) < 0.01, (part.name, share, expected)


def test_a_source_alone_keeps_its_order():
    source = Letters("a", [3, 50])
    (shard,) = mix(Ingredient("a", source)).shards([0], 1)
    (documents,) = source.shards([0], 1)
    encoder = make_encoder(SEQ_LEN)
    for pieces, document in itertools.islice(zip(iter(shard), documents, strict=True), 100):
        assert [piece.tolist() for piece in pieces] == [
            piece.tolist() for piece in encoder.encode(document)
        ]


def keys_of(mixture: Mixture, count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of all documents that finite mixtures give over all shards."""
    keys: list[str] = []
    encode = mixture.encoder.encode
    monkeypatch.setattr(
        mixture.encoder, "encode", lambda document: keys.append(document.key) or encode(document)
    )
    for shard in mixture.shards(range(count), count):
        try:
            list(itertools.islice(iter(shard), 2000))
        except ValueError as error:
            assert "have ended" in str(error)
    return keys


@pytest.mark.parametrize("count", [1, 5, 48])
def test_epochs_are_limited_exactly_over_all_shards(count, monkeypatch):
    source = Letters("a", [4], count=37)
    source.max_epochs = 3
    keys = keys_of(mix(Ingredient("a", source)), count, monkeypatch)
    assert Counter(keys) == Counter(f"a{epoch}:{i}" for epoch in range(3) for i in range(37))


def test_a_source_that_has_ended_leaves_its_share_to_the_others():
    first = Letters("a", [20], count=40)
    first.max_epochs = 1
    parts = (
        Ingredient("a", first, 0.5),
        Ingredient("b", Letters("b", [20]), 0.3),
        Ingredient("c", Letters("c", [50]), 0.2),
    )
    (shard,) = mix(*parts).shards([0], 1)
    counts = letters_of(packed(shard, 2000))
    assert counts["a"] == 40 * 22
    # What the others gave beside it was in their shares too.
    assert abs(counts["b"] / (counts["b"] + counts["c"]) - 0.6) < 0.01


@pytest.mark.parametrize("count", [1, 4])
def test_tokens_are_limited_over_all_shards(count):
    parts = (
        Ingredient("a", Letters("a", [20]), 0.5, max_tokens=4400),
        Ingredient("b", Letters("b", [20]), 0.5),
    )
    rows = [row for s in mix(*parts).shards(range(count), count) for row in packed(s, 200)]
    assert abs(letters_of(rows)["a"] - 4400) <= count * 22


def tokens_of(shards: Sequence[MixedShard], each: int) -> Counter[str]:
    """Tokens of each letter in the first documents of shards, `each` tokens or a few more."""
    totals: Counter[str] = Counter()
    for shard in shards:
        counts: Counter[str] = Counter()
        for pieces in shard:
            counts += letters_of([pieces])
            if counts.total() >= each:
                break
        totals += counts
    return totals


@pytest.mark.parametrize(
    ("weights", "lengths", "each", "tolerance"),
    [
        ((0.999, 0.001), ([100], [100]), 1000, 0.004),  # not a document of each in every shard
        ((0.9, 0.1), ([18], [120]), 600, 0.02),
        ((0.5, 0.5), ([5], [1200]), 3000, 0.05),
    ],
)
def test_shares_are_right_from_the_first_documents_on(weights, lengths, each, tolerance):
    parts = [
        Ingredient(n, Letters(n, of), w) for n, of, w in zip("ab", lengths, weights, strict=True)
    ]
    counts = tokens_of(mix(*parts).shards(range(200), 200), each)
    assert counts["b"] / counts.total() == pytest.approx(weights[1], abs=tolerance)


def test_a_limit_of_less_than_a_document_for_each_shard_is_kept_on_average():
    parts = (
        Ingredient("a", Letters("a", [100]), 0.5, max_tokens=5000),
        Ingredient("b", Letters("b", [20]), 0.5),
    )
    counts = tokens_of(mix(*parts).shards(range(200), 200), 1000)
    assert counts["a"] == pytest.approx(5000, rel=0.4)  # 20400 would be one for each


def test_sources_that_are_too_long_throughout_do_not_hang():
    encoder = make_encoder(SEQ_LEN, long_documents="drop")
    parts = (Ingredient("a", Letters("a", [300]), 0.5), Ingredient("b", Letters("b", [20]), 0.5))
    (shard,) = mix(*parts, encoder=encoder).shards([0], 1)
    with pytest.raises(ValueError, match=r'source "a": 1000 documents running are longer than'):
        list(itertools.islice(iter(shard), 10))


def test_pieces_and_documents_without_anything_to_predict_are_left_out():
    class Muted(Letters):
        def build_document(self, epoch: int, index: int) -> Document:
            prompt = Segment("text", "x" * 400, has_loss=False)
            answer = Segment("text", "yes", has_loss=index % 2 == 0)
            return Document((prompt, answer), str(index))

    source = Muted("m", [1], count=40)
    (shard,) = mix(Ingredient("m", source)).shards([0], 1)
    given = list(itertools.islice(iter(shard), 30))
    assert all((piece[1:] >= 0).any() for pieces in given for piece in pieces)
    (counts,) = shard.state_dict()["counts"]
    assert counts["mute"] == 30 * 3  # of four pieces the last alone has something to predict
    assert len(source.rejected) > 10
    assert all("nothing is to be predicted" in reason for reason in source.rejected)


def test_the_end_of_all_sources_is_an_error_that_says_what_to_do():
    source = Letters("a", [4], count=5)
    source.max_epochs = 1
    (shard,) = mix(Ingredient("a", source)).shards([0], 1)
    with pytest.raises(ValueError, match=r"data have ended.*max_epochs or max_tokens.*Leave one"):
        list(iter(shard))


# --- resumption -----------------------------------------------------------------------------------


def mixed_loader(share: Share = Share(0, 1), **options: Any) -> MultimodalDataLoader:  # noqa: B008
    limited = Letters("b", [1, 100], count=30)
    limited.max_epochs = 2
    parts = (
        Ingredient("a", Letters("a", [5, 90, 300], count=50), 0.6),
        Ingredient("b", limited, 0.3),
        Ingredient("c", Letters("c", [17], count=9), 0.1),
    )
    sequences = TrainingSequences(mix(*parts), lambda: Packer(SEQ_LEN), share, 4)
    builder = BatchBuilder(MODALITIES, (1.0, 1.0), SENTINELS.pad, SEQ_LEN, False)
    return MultimodalDataLoader(sequences, builder, 2, {}, **options)


def rows_from(loader: MultimodalDataLoader, count: int) -> list[list[int]]:
    batches = itertools.islice(iter(loader), count)
    return [row.tolist() for inputs, _ in batches for row in inputs["input"]]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("before", [1, 9, 40])
def test_mixtures_resume_to_the_bit(num_workers, before):
    whole = rows_from(mixed_loader(num_workers=num_workers), before + 30)
    loader = mixed_loader(num_workers=num_workers)
    assert rows_from(loader, before) == whole[: 2 * before]
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = mixed_loader(num_workers=num_workers)
    resumed.load_state_dict(state)
    assert resumed.counts() == loader.counts()
    assert rows_from(resumed, 30) == whole[2 * before :]


def test_counts_are_those_of_the_documents():
    """What ranks count of each source is what its batches hold, not what waits to be packed."""
    totals = Counter[str]()
    for rank in range(2):
        loader = mixed_loader(Share(rank, 2))
        rows = rows_from(loader, 12)
        *sources, all_of_them = loader.counts()
        packed = Counter[str]()
        for row in rows:
            letter = ""
            for place, token in enumerate(row):
                if token == SENTINELS.bos:
                    letter = chr(row[place + 1] - 7)
                packed[letter] += token != SENTINELS.pad
        tokens = sum(token != SENTINELS.pad for row in rows for token in row)
        assert all_of_them == {"tokens": tokens, "positions": len(rows) * SEQ_LEN}
        assert [counts["tokens"] for counts in sources] == [packed[letter] for letter in "abc"]
        totals.update({f"{i}.{k}": v for i, c in enumerate(sources) for k, v in c.items()})
    assert totals["0.split"] > 0 and totals["0.split"] < totals["0.documents"]
    assert totals["2.epochs"] == pytest.approx(totals["2.samples"] / 9, abs=0.5)


def test_a_resumed_mixture_reads_nothing_of_its_sources_first():
    """Where shards begin follows from the lengths of first documents; a state has it already."""
    loader = mixed_loader()
    rows_from(loader, 9)
    resumed = mixed_loader()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    rows_from(resumed, 2)
    assert "_lengths" in vars(loader._sequences.mixture)
    assert "_lengths" not in vars(resumed._sequences.mixture)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_epochs_of_a_source_that_has_ended_are_whole(count):
    source = Letters("a", [5], count=50)
    source.max_epochs = 2
    shards = source.shards(range(count), count)
    assert sum(len(list(iter(shard))) for shard in shards) == 100
    assert sum(shard.progress()["epochs"] for shard in shards) / count == pytest.approx(2)


def test_errors_of_libraries_are_named_whatever_they_derive_from():
    class Torn(Letters):
        def build_document(self, epoch: int, index: int) -> Document:
            b"\xff".decode()
            raise AssertionError

    (shard,) = mix(Ingredient("torn", Torn("a", [5]))).shards([0], 1)
    with pytest.raises(ValueError, match=r'^source "torn", after 0 documents .*: UnicodeDecode'):
        next(iter(shard))


# --- what cannot be packed ------------------------------------------------------------------------


def test_long_documents_are_dropped_and_counted_on_request():
    encoder = make_encoder(SEQ_LEN, long_documents="drop")
    source = Letters("a", [126, 127], count=400)
    (shard,) = mix(Ingredient("a", source), encoder=encoder).shards([0], 1)
    given = list(itertools.islice(iter(shard), 100))
    assert all(len(pieces) == 1 and len(pieces[0]) == SEQ_LEN for pieces in given)
    (counts,) = shard.state_dict()["counts"]
    assert counts["documents"] == 100 and counts["split"] == 0
    assert shard.state_dict()["progress"][0]["samples"] == 100 + counts["dropped"]
    assert counts["dropped"] > 50 and counts["tokens"] == 100 * SEQ_LEN


def test_empty_documents_and_those_of_other_modalities_are_rejected():
    source = Letters("a", [0, 3], count=50)
    (shard,) = mix(Ingredient("a", source)).shards([0], 1)
    given = list(itertools.islice(iter(shard), 40))
    assert all(len(pieces[0]) == 5 for pieces in given)
    assert source.rejected and all("is empty" in reason for reason in source.rejected)

    class Sounds(Letters):
        def build_document(self, epoch: int, index: int) -> Document:
            sound = Segment("speech", np.zeros(100, np.float32))
            text = super().build_document(epoch, index)
            return Document((sound,), text.key) if index % 2 else text

    source = Sounds("a", [3], count=50)
    (shard,) = mix(Ingredient("a", source)).shards([0], 1)
    assert len(list(itertools.islice(iter(shard), 40))) == 40
    assert source.rejected and all("modality 'speech'" in r for r in source.rejected)


def test_errors_that_name_nothing_are_given_the_source():
    class Torn(Letters):
        def build_document(self, epoch: int, index: int) -> Document:
            if index == 7:
                raise KeyError("torn")
            return super().build_document(epoch, index)

    source = Torn("a", [3], count=10, is_endless=False)
    (shard,) = mix(Ingredient("letters", source)).shards([0], 1)
    with pytest.raises(ValueError, match=r'source "letters", after 7 documents .*KeyError: .torn'):
        list(iter(shard))


# --- packing --------------------------------------------------------------------------------------

documents_of_any_kind = st.lists(
    st.lists(
        st.one_of(
            st.text(alphabet="ab", min_size=1, max_size=70).map(lambda t: ("text", t)),
            st.lists(st.integers(0, 15), min_size=4, max_size=4).map(lambda c: ("image", c)),
        ),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=60,
)


def naive_tokens(segments: list[tuple[str, Any]], mute: set[int] = frozenset()) -> list[int]:
    """Tokens between `<bos>` and `<eos>`; those of muted segments as their complement."""
    tokens = []
    for place, (modality, payload) in enumerate(segments):
        if modality == "text":
            own = [7 + byte for byte in payload.encode()]
        else:
            own = [3, *(300 + code for code in payload), 4]
        tokens += [~token for token in own] if place in mute else own
    return tokens


def as_documents(drawn: list[list[tuple[str, Any]]]) -> Iterator[Document]:
    for number, segments in enumerate(drawn):
        made = (Segment(m, p if m == "text" else np.array(p)) for m, p in segments)
        yield Document(tuple(made), str(number))


@settings(max_examples=60, deadline=None)
@given(drawn=documents_of_any_kind, method=st.sampled_from(["best_fit", "greedy"]))
def test_packing_loses_duplicates_and_cuts_nothing(drawn, method):
    seq_len = 64
    encoded = [make_encoder(seq_len).encode(document) for document in as_documents(drawn)]
    sequences = list(Packer(seq_len, method).pack(iter(encoded)))
    assert all(sum(map(len, row)) <= seq_len for row in sequences)
    given_tokens = sorted(p.tolist() for pieces in encoded for p in pieces)
    assert sorted(p.tolist() for row in sequences for p in row) == given_tokens
    for segments, pieces in zip(drawn, encoded, strict=True):
        inner = [token for piece in pieces for token in piece.tolist()[1:-1]]
        assert inner == naive_tokens(segments)
        for piece in pieces:  # no image is cut
            assert (piece == SENTINELS.image_start).sum() == (piece == SENTINELS.image_end).sum()
        if len(naive_tokens(segments)) + 2 <= seq_len:
            assert len(pieces) == 1


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 64), min_size=1, max_size=80))
def test_greedy_packing_is_in_order_until_one_does_not_fit(lengths):
    documents = [[np.full(length, number)] for number, length in enumerate(lengths)]
    rows: list[list[int]] = [[]]
    for number, length in enumerate(lengths):
        if sum(lengths[i] for i in rows[-1]) + length > 64:
            rows.append([])
        rows[-1].append(number)
    made = Packer(64, "greedy").pack(iter(documents))
    assert [[int(doc[0]) for doc in row] for row in made] == rows


@pytest.mark.parametrize("method", ["best_fit", "greedy"])
def test_packer_state_continues_exactly(method):
    rng = random.Random(0)
    lengths = [rng.randint(2, 60) for _ in range(300)]
    stream = [[np.full(length, number)] for number, length in enumerate(lengths)]

    def run(packer: Packer, documents: Iterator) -> Iterator[list[int]]:
        return ([int(doc[0]) for doc in row] for row in packer.pack(documents))

    whole = list(run(Packer(64, method), iter(stream)))
    for cut in (0, 1, 20, 77):
        packer, documents = Packer(64, method), iter(stream)
        first = list(itertools.islice(run(packer, documents), cut))
        state = json.loads(json.dumps(packer.state_dict(), default=np.ndarray.tolist))
        resumed = Packer(64, method)
        resumed.load_state_dict(state)
        assert first + list(run(resumed, documents)) == whole


# --- loss of segments -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(drawn=documents_of_any_kind, seed=st.integers(0, 1000))
def test_segments_without_loss_are_seen_and_not_predicted(drawn, seed):
    """Labels against a naive pass over each document's tokens; inputs do not change."""
    rng = random.Random(seed)
    seq_len = 512
    builder = BatchBuilder(MODALITIES, (1.0, 1.0), SENTINELS.pad, seq_len, False)
    for document, segments in zip(as_documents(drawn), drawn, strict=True):
        mute = {place for place in range(len(segments)) if rng.random() < 0.5}
        muted = tuple(
            Segment(s.modality, s.payload, place not in mute)
            for place, s in enumerate(document.segments)
        )
        pieces = make_encoder(seq_len).encode(Document(muted, "k"))
        arrays, labels = builder.build([pieces])
        plain, _ = builder.build([make_encoder(seq_len).encode(document)])
        for key, array in arrays.items():
            assert (array == plain[key]).all(), key
        inner = naive_tokens(segments, mute)
        eos = ~SENTINELS.eos if len(segments) - 1 in mute else SENTINELS.eos
        targets = [t if t >= 0 else -100 for t in [*inner, eos]]
        assert labels[0, : len(targets)].tolist() == targets
        assert (labels[0, len(targets) :] == -100).all()


def test_pairs_are_in_the_asked_order_and_lose_their_caption_at_the_asked_rate():
    caption, image = Segment("text", "a"), Segment("image", np.zeros(4, np.int64))
    rng = random.Random(0)
    counts = Counter(
        tuple(s.modality for s in PairOrder(0.8, 0.1).arrange(rng, caption, image))
        for _ in range(20_000)
    )
    expected = {("text", "image"): 0.72, ("image",): 0.08, ("image", "text"): 0.2}
    assert counts.keys() == expected.keys()
    for order, share in expected.items():
        assert counts[order] / 20_000 == pytest.approx(share, abs=0.012)
    # Without dropout nothing more is drawn: what a seed gives does not change.
    first, second = random.Random(1), random.Random(1)
    PairOrder().arrange(first, caption, image)
    second.random()
    assert first.random() == second.random()


# --- entries --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{"kind": "jsonl", "path": "x"}], r"multimodal\.sources\[0\] has no 'name'"),
        ([{"name": "a", "path": "x"}], r"multimodal\.sources\[0\] has no 'kind'"),
        ([{"name": "a", "kind": "zip"}], r"sources\[0\]\.kind = 'zip': must be one of 'emoji'"),
        ([{"name": "a", "kind": "jsonl"}], r"sources\[0\]\.path = : must be a file"),
        (
            [{"name": "a", "kind": "emoji", "weights": 1.0}],
            r"sources\[0\]\.weights: unknown key; did you mean multimodal\.sources\[0\]\.weight",
        ),
        ([{"name": "a/b", "kind": "emoji"}], r"sources\[0\]\.name = a/b: must be letters"),
        ([{"name": "a", "kind": "emoji", "weight": 0.0}], r"weight = 0.0: must be a finite number"),
        ([{"name": "a", "kind": "emoji", "max_epochs": -1}], r"max_epochs = -1: must be 0"),
        ([{"name": "a", "kind": "emoji"}] * 2, r"sources\[1\]\.name = 'a': occurs twice"),
        (
            [{"name": "a", "kind": "jsonl", "path": "x", "streaming": True}],
            r"sources\[0\]\.streaming = True: is read of datasets only",
        ),
    ],
)
def test_wrong_entries_are_named(tables, message):
    with pytest.raises(ValueError, match=message):
        parse_entries("multimodal.sources", tables)


def test_lists_of_a_toml_become_tuples():
    table = {"name": "a", "kind": "datasets", "path": "parquet", "data_files": ["x", "y"]}
    assert parse_entries("k", [table]) == [
        SourceEntry("a", "datasets", "parquet", data_files=("x", "y"))
    ]
