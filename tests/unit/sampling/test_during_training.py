"""`[sampling]`: what is refused at start-up, and where samples go."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchtitan.components.metrics import LoggerContainer, TensorBoardLogger, WandBLogger

from tests.jobs import debug_job
from tests.unit.sampling.helpers import codecs, tiny_model
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.job_config import Sampling
from torchtitan_mixtures.media import Media
from torchtitan_mixtures.metrics import MixtureMetricsProcessor
from torchtitan_mixtures.sampling import during_training
from torchtitan_mixtures.sampling.during_training import TrainingSampler, build_sampler

ON = ("--sampling.interval=5", "--sampling.prompts=a fox")
WRONG = {
    "temperature": -1.0, "top_k": -1, "top_p": 2.0, "guidance": -1.0, "seed": -1, "interval": -1,
    "num_samples": 0, "max_text_tokens": 0, "max_speech_seconds": 0.0, "into": ["video"],
    "prompts": "a fox",
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_a_value_that_cannot_be_is_named(key):
    with pytest.raises(ValueError, match=rf"^sampling.{key} = .*: must be"):
        Sampling(**{key: WRONG[key]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sampling.into", "speech"), r"\[sampling\]: into = speech: .* it has text, image"),
        (("--sampling.max_text_tokens=255", "--sampling.into", "text"), "the prompt has .* 256"),
    ],
)
def test_what_could_not_be_drawn_is_refused_at_start_up(options, message):
    with pytest.raises(ValueError, match=message):
        check_job(debug_job("mot", *ON, *options))


def test_an_interval_without_prompts_is_refused():
    job = debug_job("mot", "--sampling.interval=5")
    job.sampling.prompts = []
    with pytest.raises(ValueError, match=r"sampling.prompts = \[\]: .* needs at least one"):
        check_job(job)


@pytest.fixture
def args():
    return SimpleNamespace(is_untied=True, modality_names=["text", "image"])


@pytest.mark.parametrize("kind", ["pipeline", "context"])
def test_layouts_that_cannot_sample_train_without(kind, args, monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = debug_job("mot", *ON, f"--parallelism.{kind}_parallel_degree=2")
    check_job(job)
    assert build_sampler(job, args, SimpleNamespace()) is None
    assert f"parallelism.{kind}_parallel_degree = 2; use scripts/sample.py" in caplog.text


def test_a_dense_flavour_under_tensor_parallelism_trains_without(args, caplog):
    job = debug_job("mot", *ON, "--parallelism.tensor_parallel_degree=2")
    assert build_sampler(job, args, SimpleNamespace()) is not None
    dense = SimpleNamespace(is_untied=False, modality_names=["text", "image"])
    assert build_sampler(job, dense, SimpleNamespace()) is None
    assert "cuts the sequences of a dense flavour" in caplog.text


def test_no_sampler_without_an_interval_or_a_place_for_samples(args, caplog):
    processor = SimpleNamespace()
    assert build_sampler(debug_job("mot", "--sampling.interval=0"), args, processor) is None
    assert "No samples" not in caplog.text
    off = debug_job("mot", *ON, "--metrics.no_enable_tensorboard")
    assert build_sampler(off, args, processor) is None
    assert "there is no place for them without metrics.enable_tensorboard" in caplog.text
    sampler = build_sampler(debug_job("mot", *ON), args, processor)
    assert [step for step in range(1, 16) if sampler.is_due(step)] == [5, 10, 15]


@pytest.fixture
def processor(tmp_path):
    """One that writes to TensorBoard and to something that looks like Weights & Biases."""
    processor = MixtureMetricsProcessor.__new__(MixtureMetricsProcessor)
    processor.logger = LoggerContainer()
    processor.logger.add_logger(TensorBoardLogger(str(tmp_path)))
    remote = WandBLogger.__new__(WandBLogger)
    remote.tag, calls = None, []
    remote.wandb = SimpleNamespace(
        Image=lambda image: ("image", image.shape),
        Html=lambda text: ("html", text),
        Audio=lambda waveform, sample_rate: ("audio", len(waveform), sample_rate),
        log=lambda entries, step: calls.append((entries, step)),
    )
    processor.logger.add_logger(remote)
    processor.remote_calls = calls
    return processor


def events_of(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_media_are_written_to_every_logger(processor, tmp_path):
    image = np.zeros((3, 5, 3), np.uint8)
    media = Media({"i": image}, {"t": "a < b"}, {"s": (np.zeros(80, np.float32), 8000)})
    processor.log_media(media, 4)
    events = events_of(tmp_path)
    (picture,) = events.Images("i")
    assert (picture.step, picture.height, picture.width) == (4, 3, 5)
    (sound,) = events.Audio("s")
    assert (sound.step, sound.sample_rate, sound.length_frames) == (4, 8000, 80)
    assert events.Tensors("t/text_summary")[0].tensor_proto.string_val == [b"a < b"]
    expected = {"i": ("image", (3, 5, 3)), "t": ("html", "<pre>a &lt; b</pre>"),
                "s": ("audio", 80, 8000)}  # fmt: skip
    assert processor.remote_calls == [(expected, 4)]


def test_all_modalities_are_sampled_and_the_clock_starts_anew(processor, tmp_path, monkeypatch):
    job = debug_job("mot", *ON, "--sampling.into", "text", "image", "speech",
                    "--sampling.max_text_tokens=3", "--sampling.max_speech_seconds=0.5",
                    "--sampling.num_samples=3")  # fmt: skip
    monkeypatch.setattr(during_training, "build_codecs", lambda job: codecs())
    monkeypatch.setattr(during_training.dist, "get_world_size", lambda: 1)
    restarts = []
    processor.restart_clock = restarts.append
    model = tiny_model().train()
    TrainingSampler(job, processor).sample(model, 10)
    assert all(module.training for module in model.modules())
    assert restarts == [10]
    events = events_of(tmp_path)
    assert events.Tags()["images"] == ["samples/images"]
    assert events.Tags()["audio"] == [f"samples/speech_{number}_2" for number in range(3)]
    ((entries, _),) = processor.remote_calls
    listed = entries["samples/texts"][1]
    assert listed.count("&#x27;a fox&#x27; -&gt; ") == 3 + 3  # texts and sounds
    for number in range(3):  # the sounds have no label of their own
        assert f"&#x27;a fox&#x27; -&gt; samples/speech_{number}_2" in listed
    sheet = entries["samples/images"][1]
    assert sheet == (96 + 8, 180 + 3 * 100 + 4, 3)


def test_a_run_that_diverged_goes_on_and_is_warned_of_once(processor, monkeypatch, caplog):
    job = debug_job("mot", *ON, "--sampling.into", "text", "image", "speech",
                    "--sampling.max_text_tokens=3", "--sampling.max_speech_seconds=0.5",
                    "--sampling.guidance=2")  # fmt: skip
    monkeypatch.setattr(during_training, "build_codecs", lambda job: codecs())
    monkeypatch.setattr(during_training.dist, "get_world_size", lambda: 1)
    processor.restart_clock = lambda step: None
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    sampler = TrainingSampler(job, processor)
    for step in (5, 10):
        sampler.sample(model, step)
    assert [step for _, step in processor.remote_calls] == [5, 10]
    assert caplog.text.count("logits are not finite (did the run diverge?)") == 1
