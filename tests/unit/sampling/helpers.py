"""Tiny models with tiny tokenizers, and generation written out one document at a time."""

import math

import numpy as np
import torch

from tests.unit.data.fakes import SENTINELS, ByteTokenizer, GreyTokenizer
from tests.unit.models.mot.helpers import build, tiny_args
from torchtitan_mixtures.data.codecs import Codecs
from torchtitan_mixtures.data.encoding import Modalities
from torchtitan_mixtures.data.sources import Segment
from torchtitan_mixtures.sampling.decoding import draw_uniforms

CODES, UNITS = 16, 8
NAMES = ("text", "image", "speech")
RANGES = ((0, 300), (300, 316), (316, 324))
TEXT = list(range(7, 263))


class LenientBytes(ByteTokenizer):
    """Text as bytes, some of which may be no character."""

    def decode(self, ids, skip_special=True):
        return bytes(i - 7 for i in ids).decode("latin-1")


class Greys(GreyTokenizer):
    """Which also draws the quarters."""

    def decode(self, codes):
        quarters = (np.asarray(codes) * 16).astype(np.uint8).reshape(-1, 2, 2, 1)
        return quarters.repeat(4, 1).repeat(4, 2).repeat(3, 3)


class Clicks:
    """A waveform as one unit for each tenth of a second."""

    num_codes = UNITS
    sample_rate = 80
    units_per_second = 10.0

    def encode(self, waveform):
        return (np.abs(waveform.reshape(-1, 8)).mean(1) * UNITS).astype(np.int64)

    def decode(self, units):
        return np.repeat(np.asarray(units, np.float32) / UNITS, 8)


def codecs(n_modalities=3):
    modalities = Modalities(NAMES[:n_modalities], RANGES[:n_modalities])
    speech = Clicks() if n_modalities > 2 else None
    return Codecs(modalities, LenientBytes(), Greys(), speech)


def tiny_model(n_modalities=3, dtype=torch.float64, **fields):
    sizes = {"vocab_size": 300, "code_vocab_sizes": [CODES, UNITS][: n_modalities - 1]}
    return build(tiny_args(n_modalities, **{"max_seq_len": 64, **sizes, **fields}), dtype).eval()


def text(words):
    return (Segment("text", words),)


def image(*codes):
    return (Segment("image", np.array(codes)),)


def speech(*units):
    return (Segment("speech", np.array(units)),)


def prompt_tokens(prompt):
    tokens = [SENTINELS.bos]
    for segment in prompt:
        if segment.modality == "text":
            tokens += [7 + byte for byte in segment.payload.encode()]
            continue
        number = NAMES.index(segment.modality)
        tokens.append((None, SENTINELS.image_start, SENTINELS.speech_start)[number])
        tokens += [RANGES[number][0] + code for code in segment.payload.tolist()]
        tokens.append((None, SENTINELS.image_end, SENTINELS.speech_end)[number])
    return tokens


def last_logits(model, tokens):
    """Of the token after `tokens`, by a forward pass over all of them."""
    with torch.no_grad():
        documents = torch.zeros(1, len(tokens), dtype=torch.int64)
        return model(torch.tensor([tokens]), None, documents)[0, -1].tolist()


def naive_choice(logits, allowed, uniform, settings):
    """One token out of a list of logits."""
    order = sorted(allowed, key=lambda token: (-logits[token], token))
    if settings.temperature == 0:
        return order[0]
    best = logits[order[0]]
    weights = [math.exp((logits[token] - best) / settings.temperature) for token in order]
    if settings.top_k:
        order, weights = order[: settings.top_k], weights[: settings.top_k]
    total = sum(weights)
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass < settings.top_p * total:
            kept.append((token, weight))
        mass += weight
    kept.sort()  # by token id
    target = uniform * sum(weight for _, weight in kept)
    for token, weight in kept:
        target -= weight
        if target < 0:
            return token
    return kept[-1][0]


def naive_generate(model, prompt, into, settings, number):
    """Continue one document token by token, each by a forward pass over the whole document.

    Returns:
        The tokens of each segment, without sentinels.
    """
    tokens = prompt_tokens(prompt)
    uniforms = iter(draw_uniforms(settings.seed, [number], 200)[0].tolist())
    max_units = int(settings.max_speech_seconds * 10)
    names = NAMES[: model.model_args.n_modalities]
    closers = [SENTINELS.eos, SENTINELS.image_start]
    closers += [SENTINELS.speech_start] if len(names) == 3 else []
    segments = []
    is_drawn = False  # whether the number for the next sentinel went into the end of what precedes
    for name in into:
        start, stop = RANGES[NAMES.index(name)]
        content = TEXT if name == "text" else list(range(start, stop))
        ends = {"text": closers, "speech": [SENTINELS.speech_end], "image": []}[name]
        longest = {"text": settings.max_text_tokens, "image": 4, "speech": max_units}[name]
        found = []
        twin = [SENTINELS.bos]
        if name != "text":
            sentinel = getattr(SENTINELS, f"{name}_start")
            tokens.append(sentinel)
            twin.append(sentinel)
            if not is_drawn:
                next(uniforms)
        is_drawn = False
        while len(found) < longest:
            logits = last_logits(model, tokens)
            if name == "image" and settings.guidance != 1:
                without = last_logits(model, twin)
                logits = [
                    u + settings.guidance * (c - u) for c, u in zip(logits, without, strict=True)
                ]
            allowed = content + (ends if found else [])
            if name == "image":
                allowed = content
            token = naive_choice(logits, allowed, next(uniforms), settings)
            if token in ends:
                is_drawn = True
                break
            found.append(token)
            tokens.append(token)
            twin.append(token)
        if name != "text":
            tokens.append(getattr(SENTINELS, f"{name}_end"))
            if not is_drawn:
                next(uniforms)
            is_drawn = False
        segments.append(found)
    return segments
