"""What every family must do; a family that is added to FAMILIES is covered at once."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from torchtitan.config import ConfigManager
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseModelArgs, ModelProtocol
from torchtitan.protocols.train_spec import get_train_spec

from tests.jobs import ROOT, TRAIN_CONFIGS, all_configs, debug_job, load_job
from torchtitan_mixtures.checks import check_arguments
from torchtitan_mixtures.models import FAMILIES

GOLDEN = ROOT / "tests" / "contract" / "golden"


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def build_model(job):
    spec = get_train_spec(job.model.name)
    args = spec.model_args[job.model.flavor]
    args.update_from_config(job)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = spec.model_cls(args)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    return model, args


def build_batches(job):
    spec = get_train_spec(job.model.name)
    tokenizer = spec.build_tokenizer_fn(job) if spec.build_tokenizer_fn else None
    return spec.build_dataloader_fn(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=job)


ONE_PROCESS = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)


def prepare(job, model, loss_fn):
    """What the trainer makes of the first batch; `(inputs, targets, keyword arguments)`."""
    batch = next(iter(build_batches(job)))
    inputs, targets, extra, kwargs = loss_fn.prepare(model, None, *batch, ONE_PROCESS, job)
    return inputs, targets, {**extra, **kwargs}


def is_over_tokens(args):
    return hasattr(args, "modality_names")


def is_classifier(args):
    return getattr(args, "is_classifier", False)


def is_prompted(args):
    return getattr(args, "is_prompted", False)


def is_mixture_of_diffusers(args):
    return hasattr(args, "expert_args")


def test_the_spec_is_complete(family):
    spec = get_train_spec(family)
    assert issubclass(spec.model_cls, ModelProtocol)
    assert spec.build_validator_fn and spec.build_metrics_processor_fn
    assert (ROOT / "torchtitan_mixtures" / "models" / family / "README.md").is_file()
    assert (TRAIN_CONFIGS / family / "debugmodel.toml").is_file()


def test_an_unknown_flavour_is_answered_with_the_known_ones(family):
    with pytest.raises(KeyError, match="debugmodel"):
        get_train_spec(family).model_args["no_such_flavor"]


@pytest.mark.parametrize("config", all_configs(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_configuration_parses_and_names_a_flavour(config):
    check_arguments(["--job.config_file", str(config)])
    job = load_job(config)
    assert job.model.name == config.parent.name
    # A recipe may follow: S-16_imagenet21k.
    assert f"{config.stem}_".startswith(job.model.flavor.replace("/", "-") + "_")
    assert job.model.flavor in get_train_spec(job.model.name).model_args
    assert config.read_text().startswith("# ")
    assert "scripts/train.sh" in config.read_text() or "torchrun" in config.read_text()


# Parameters of the flavour alone. Each code of a further modality adds 2 x dim; what models of
# images see (channels, classes) changes embeddings and head. Published counts of MoM and DiT have
# the position table (tokens x dim) in them, which is fixed and no parameter here.
PARAMETERS = {
    "mot/debugmodel": 11_278_592,
    "mot/debugmodel_flex_attn": 11_278_592,
    "mot/debugmodel_varlen_attn": 11_278_592,
    "mot/debugmodel_post_norm": 11_278_592,
    "mot/debugmodel_3modality": 16_393_472,
    "mot/debugmodel_dense": 6_163_712,
    "mot/debugmodel_3modality_dense": 6_163_712,
    "mot/ladder1": 307_632,
    "mot/ladder1_dense": 252_144,
    "mot/ladder2": 1_058_016,
    "mot/ladder2_dense": 725_664,
    "mot/ladder3": 3_197_600,
    "mot/ladder3_dense": 1_926_560,
    "mot/ladder4": 10_688_768,
    "mot/ladder4_dense": 5_868_800,
    "mot/8B_2modality": 15_009_845_248,
    "mot/8B_3modality": 21_989_429_248,
    "mot/8B_2modality_dense": 8_030_261_248,
    "mot/8B_3modality_dense": 8_030_261_248,
    "mot/70B_2modality": 139_006_058_496,
    "mot/70B_3modality": 207_458_410_496,
    "mot/70B_2modality_dense": 70_553_706_496,
    "mot/70B_3modality_dense": 70_553_706_496,
    "mom/debugmodel": 3_666_528,
    "mom/debugmodel_dit": 1_289_824,
    "mom/debugmodel_dit_224": 3_869_920,
    "mom/debugmodel_matched": 1_824_352,
    "mom/MoM-S/4-matched": 48_728_960,
    "mom/MoM-S/2": 107_748_128,
    "mom/MoM-S/4": 84_164_480,
    "mom/MoM-S/8": 82_899_968,
    "mom/MoM-B/2": 353_945_120,
    "mom/MoM-B/4": 330_416_768,
    "mom/MoM-B/8": 329_373_440,
    "mom/MoM-L/2": 1_213_528_096,
    "mom/MoM-L/4": 1_166_397_568,
    "mom/MoM-L/8": 1_164_015_616,
    "mom/MoM-XL/2": 1_774_922_016,
    "mom/MoM-XL/4": 1_719_930_240,
    "mom/MoM-XL/8": 1_717_126_656,
    "mom/DiT-S/2": 32_865_056,
    "mom/DiT-S/4": 32_920_448,
    "mom/DiT-S/8": 33_142_016,
    "mom/DiT-B/2": 130_315_808,
    "mom/DiT-B/4": 130_426_496,
    "mom/DiT-B/8": 130_869_248,
    "mom/DiT-L/2": 457_840_672,
    "mom/DiT-L/4": 457_988_224,
    "mom/DiT-L/8": 458_578_432,
    "mom/DiT-XL/2": 674_834_720,
    "mom/DiT-XL/4": 675_000_704,
    "mom/DiT-XL/8": 675_664_640,
    "mmdit/debugmodel": 2_969_392,
    "mmdit/debugmodel_3modality": 4_465_968,
    "mmdit/debugmodel_dit": 1_996_080,
    "mmdit/d15": 496_070_464,
    "mmdit/d18": 856_164_160,
    "mmdit/d22": 1_562_392_896,
    "mmdit/d24": 2_028_334_144,
    "mmdit/d30": 3_962_400_064,
    "mmdit/d38": 8_056_627_520,
    "mmdit/SD3-medium": 2_028_328_000,
    "mmdit/d15_dit": 259_010_944,
    "mmdit/d24_dit": 1_039_248_448,
    "mixdiff/debugmodel": 4_059_043,
    "mixdiff/debugmodel_mmdit": 9_221_843,
    "mixdiff/S/4x4": 133_080_196,
    "mixdiff/S/2x8": 265_878_984,
    "mixdiff/B/2x8": 1_059_145_608,
    "mixdiff/XL/2x8": 5_527_831_560,
    "mixdiff/d15x4": 2_003_735_684,
    "mone/debugmodel": 809_615,
    "mone/debugmodel_dense": 809_098,
    "mone/debugmodel_dense_64": 207_946,
    "mone/debugmodel_dense_96": 459_370,
    "mone/Ti/16": 5_717_805,
    "mone/S/16": 22_051_437,
    "mone/B/16": 86_569_197,
    "mone/L/16": 304_328_685,
    "mone/G/16": 2_421_234_669,
    "mone/ViT-Ti/16": 5_717_032,
    "mone/ViT-S/16": 22_049_896,
    "mone/ViT-B/16": 86_566_120,
    "mone/ViT-L/16": 304_324_584,
    "mone/ViT-G/16": 2_421_226_472,
    "mone/debugmodel_cls": 809_871,
    "mone/Ti/16-cls": 5_718_189,
    "mone/S/16-cls": 22_052_205,
    "mone/B/16-cls": 86_570_733,
    "mone/L/16-cls": 304_330_733,
    "mone/ViT-Ti/16-cls": 5_717_416,
    "mone/ViT-S/16-cls": 22_050_664,
    "mone/ViT-B/16-cls": 86_567_656,
    "mone/ViT-L/16-cls": 304_326_632,
}


def test_the_table_of_parameter_counts_has_every_flavour():
    flavors = {f"{f}/{flavor}" for f in FAMILIES for flavor in get_train_spec(f).model_args}
    assert flavors == set(PARAMETERS)


@pytest.mark.parametrize("config", all_configs(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_configuration_builds_with_the_counted_parameters(config, tmp_path):
    job = load_job(config)
    if job.multimodal.source == "folder":  # on the user's machine
        for name in ("cat", "dog", "fox"):
            (tmp_path / name).mkdir()
            Image.new("RGB", (40, 40), "red").save(tmp_path / name / "1.png")
        job.multimodal.path = str(tmp_path)
    if job.multimodal.domains == "" and job.model.name == "mixdiff":
        job.multimodal.domains = "class"
    if job.model.name == "mmdit" and job.multimodal.source != "emoji":
        (tmp_path / "metadata.csv").write_text("file_name,caption\ncat/1.png,a cat\n")
        job.multimodal.source, job.multimodal.path = "datasets", str(tmp_path)
    spec = get_train_spec(job.model.name)
    args = spec.model_args[job.model.flavor]
    args.update_from_config(job)
    with torch.device("meta"):
        model = spec.model_cls(args)
    parameters, flops = args.get_nparams_and_flops(model, job.training.seq_len)
    expected = PARAMETERS[f"{job.model.name}/{job.model.flavor}"] + added_parameters(job, args)
    assert parameters == sum(p.numel() for p in model.parameters()) == expected
    if is_over_tokens(args):
        # Training costs six FLOPs per active matmul parameter: never more than 6 per parameter plus
        # attention, which total parameters would exceed.
        attention = 12 * args.n_layers * args.dim * job.training.seq_len
        assert 0 < flops <= 6 * args.num_active_parameters + attention
    elif is_classifier(args):
        assert flops == 6 * args.macs_per_image()
    elif is_prompted(args) or is_mixture_of_diffusers(args):
        assert flops == round(6 * args.macs_per_image() / args.num_tokens)
    else:
        assert 0 < flops < 6 * args.num_active_parameters * 2


def added_parameters(job, args, flavor=None):
    """What a job's data adds to the parameters of its flavour."""
    flavor = flavor or get_train_spec(job.model.name).model_args[job.model.flavor]
    if is_mixture_of_diffusers(args):
        pairs = zip(args.expert_args, flavor.expert_args, strict=True)
        return sum(added_parameters(job, *pair) for pair in pairs) + added_to_router(args, flavor)
    if is_over_tokens(args):
        return (args.total_vocab_size - args.vocab_size) * 2 * args.dim
    if is_classifier(args):
        pixels = args.patch_size**2 * (args.in_channels - flavor.in_channels)
        tokens = args.seq_len - flavor.seq_len
        return (pixels + tokens) * args.dim + (args.num_classes - flavor.num_classes) * (
            args.dim + 1
        )
    if is_prompted(args):
        patch = args.patch_size**2 * (args.in_channels - flavor.in_channels)
        added = patch * args.dim + patch * (args.dim + 1)
        return added + parameters_of_prompts(args) - parameters_of_prompts(flavor)
    values = args.patch_size**2
    more_in, more_out = (
        values * (getattr(args, name) - getattr(flavor, name))
        for name in ("in_channels", "out_channels")
    )
    classes = args.num_classes - flavor.num_classes
    return (classes + more_in) * args.dim + more_out * (args.dim + 1)


def added_to_router(args, flavor):
    """Channels of its patches, classes that it may read, and rows of experts."""
    patch = args.router_patch_size**2 * (args.in_channels - flavor.in_channels)
    classes = 0 if args.is_prompted else args.num_classes - flavor.num_classes
    experts = (args.num_experts - flavor.num_experts) * (args.router_dim + 1)
    return (patch + classes) * args.router_dim + experts


def parameters_of_prompts(args):
    """What prompts go through before the blocks: encoder, embedding, and the same of all of it."""
    total, encoder = 0, args.encoder_dim
    for spec in args.prompts:
        channels, pooled = spec.dim, spec.pooled_dim
        if spec.kind == "tokens":
            channels = pooled = encoder
            total += (spec.vocab_size + spec.length + 2) * encoder
            total += args.encoder_layers * (12 * encoder**2 + 13 * encoder)
        total += (channels + 1) * args.dim
        if pooled:
            total += (pooled + 1) * args.dim + args.dim**2 + args.dim
    return total


def test_arguments_survive_json_and_a_second_update(family):
    job = debug_job(family)
    for flavor in get_train_spec(family).model_args:
        args = get_train_spec(family).model_args[flavor]
        assert isinstance(args, BaseModelArgs)
        args.update_from_config(job)
        once = json.dumps(dataclasses.asdict(args))
        args.update_from_config(job)
        assert json.dumps(dataclasses.asdict(args)) == once
    fresh = get_train_spec(family).model_args["debugmodel"]
    assert fresh == get_train_spec(family).model_args["debugmodel"]


def test_initialisation_reaches_every_parameter_and_buffer(family):
    spec, job = get_train_spec(family), debug_job(family)
    args = spec.model_args["debugmodel"]
    args.update_from_config(job)
    with torch.device("meta"):
        model = spec.model_cls(args)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(math.nan)
        model.init_weights(buffer_device=torch.device("cpu"))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(tensor).all(), name


def test_names_and_shapes_of_the_state_dict_are_the_golden_ones(family):
    model, _ = build_model(debug_job(family))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    golden = json.loads((GOLDEN / f"{family}_debugmodel.json").read_text())
    assert shapes == golden


def test_batches_of_the_loader_are_what_forward_takes(family):
    job = debug_job(family)
    model, _ = build_model(job)
    inputs, _, extra = prepare(job, model, get_train_spec(family).build_loss_fn(job))
    parameters = list(inspect.signature(model.forward).parameters)
    assert set(extra) <= set(parameters)
    assert inputs.shape[0] == job.training.local_batch_size
    leaves = tree_leaves({name: value for name, value in extra.items() if name != "budget"})
    assert all(isinstance(v, torch.Tensor) and v.shape[0] == len(inputs) for v in leaves)


ENOUGH = {"mixdiff": ("--training.local_batch_size=12",)}
"""What lets every part of a model have something to learn from; mostly two samples do."""

WITHOUT_GRADIENT = {"mmdit": {"layers.3.attention.q_norm.text.weight"}}
"""Stable Diffusion 3 has queries of text in the last block, from which nothing is read."""


def test_a_step_has_a_finite_loss_and_a_gradient_everywhere(family):
    job = debug_job(family, *ENOUGH.get(family, ()))
    model, args = build_model(job)
    if not is_over_tokens(args):  # branches and head start at zero and would stop gradients
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    loss_fn = get_train_spec(family).build_loss_fn(job, parallel_dims=None)
    inputs, targets, extra = prepare(job, model, loss_fn)
    loss = loss_fn(model(inputs, **extra), targets)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        is_read = name not in WITHOUT_GRADIENT.get(family, ())
        assert (parameter.grad.abs().sum() > 0) == is_read, name


def test_the_loss_at_the_start_is_that_of_guessing(family):
    job = debug_job(family)
    model, args = build_model(job)
    loss_fn = get_train_spec(family).build_loss_fn(job, parallel_dims=None)
    inputs, targets, extra = prepare(job, model, loss_fn)
    with torch.no_grad():
        loss = loss_fn(model(inputs, **extra), targets)
    count = (targets.labels != -100).sum()
    # A token or class guessed evenly; or noise guessed to be zero, and the bound of its variance.
    guess = math.log(args.total_vocab_size) if is_over_tokens(args) else 1.0
    if is_classifier(args):
        guess = math.log(args.num_classes)
    if is_prompted(args):  # the velocity of noise that starts at the image
        guess += float(targets.clean.square().mean())
    if is_mixture_of_diffusers(args):  # and the domain
        guess += math.log(args.num_experts)
    assert abs(float(loss / count) - guess) < 0.7


def test_the_configuration_manager_of_the_host_is_unchanged():
    # Registration happens through `custom_config_module` alone.
    assert ConfigManager().parse_args([]).model.name == "llama3"
