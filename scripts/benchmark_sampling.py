"""What `scripts/benchmark.py mot --rows sampling` measures: images drawn by the debug model."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import benchmark_mot  # pyrefly: ignore [missing-import]  # beside this script
import torch
from torch import Tensor, nn

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.benchmark import Table
from torchtitan_mixtures.data.codecs import Codecs, build_codecs
from torchtitan_mixtures.data.sources import Segment
from torchtitan_mixtures.sampling.generate import encode_prompts, generate
from torchtitan_mixtures.sampling.settings import SamplingSettings

IMAGES = 8
PROMPT = (Segment("text", "two foxes above a red apple"),)


@torch.no_grad()
def draw_without_cache(model: nn.Module, prompt: Tensor, codecs: Codecs) -> Tensor:
    """Draw greedily, each code by a forward pass over the whole document.

    Args:
        model: The model.
        prompt: Tokens of the prompt, `(tokens,)` int64.
        codecs: Its tokenizers.

    Returns:
        Codes, `(images, codes of an image)` int64.
    """
    low, high = codecs.modalities.vocab_ranges[codecs.modalities.names.index("image")]
    start = prompt.new_tensor([codecs.text.sentinels.image_start])
    tokens = torch.cat((prompt, start)).expand(IMAGES, -1)
    for _ in range(codecs.image.codes_per_image):
        code = model(tokens)[:, -1, low:high].argmax(-1)
        tokens = torch.cat((tokens, low + code[:, None]), dim=1)
    return tokens[:, -codecs.image.codes_per_image :] - low


def measure_images(name: str, rounds: int, device: torch.device) -> Table:
    """Time the drawing of images of one tokenizer."""
    job = benchmark_mot.debug_job("--multimodal.image_tokenizer", name)
    codecs = build_codecs(job)
    model = benchmark_mot.debug_model(job).to(device).eval()

    def draw(guidance: float) -> Tensor:
        settings = SamplingSettings(temperature=0, guidance=guidance)
        samples = generate(model, [PROMPT] * IMAGES, ["image"], settings, codecs)
        return torch.tensor([list(sample.segments[0].payload) for sample in samples])

    settings = SamplingSettings()
    (prompt,) = encode_prompts(model.model_args, [PROMPT], ["image"], settings, codecs)
    uncached = partial(draw_without_cache, model, prompt.to(device), codecs)
    cached = partial(draw, 1.0)
    runs: dict[str, measure.Run] = {
        "no cache": uncached,
        "no cache again": uncached,
        "cache": cached,
        "cache, guidance": partial(draw, 2.0),
    }
    seconds = measure.time_interleaved(runs, rounds, limit=60, timer=measure.timer_for(device))
    codes = codecs.image.codes_per_image
    title = f"mot sampling: debugmodel, {IMAGES} images of {codes} codes together, fp32, eager"
    table = Table(title, ["variant", "s", "images/s", "time to no cache [quartiles]", "speed-up"])
    for variant, values in seconds.items():
        median = measure.Spread.of(values).median
        spread = measure.ratio(seconds, variant, "no cache")
        table.add(
            *(
                variant,
                f"{median:.2f}",
                f"{IMAGES / median:.2f}",
                spread,
                f"{1 / spread.median:.1f}",
            ),
            variant=variant,
            seconds=median,
            images_per_second=IMAGES / median,
            ratio=[spread.low, spread.median, spread.high],
        )
    same = (cached() == uncached().cpu()).float().mean().item()
    table.notes.append(
        f"{len(seconds['cache'])} rounds, greedy; {same:.1%} of the codes are the same with and "
        "without cache; guidance has twice the rows"
    )
    return table


def measure_sampling(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Time images of both embedded tokenizers."""
    rounds = options.rounds or (1 if options.quick else 3)
    for name in ["emoji_32px"] if options.quick else ["emoji_32px", "emoji_64px"]:
        yield measure_images(name, rounds, device)


ROWS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[Table]]] = {
    "sampling": measure_sampling
}
