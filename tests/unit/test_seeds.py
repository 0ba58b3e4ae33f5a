"""Every row of the README's table "from the seed to here", executed."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchtitan.config import ConfigManager
from torchtitan.protocols.train_spec import get_train_spec

from tests.checkpoints import save_tiny_mixdiff
from tests.jobs import ROOT, debug_job
from torchtitan_mixtures.checks import check_arguments
from torchtitan_mixtures.models.mmdit import AdaptiveAttention, MMDiT, MMDiTBlock
from torchtitan_mixtures.models.mone.block import NestedBlock
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.layers import NestedLinearContract, NestedLinearExpand
from torchtitan_mixtures.models.mone.routing import (
    ExpertPreferredRouter,
    compute_capacity_distribution,
)
from torchtitan_mixtures.models.mot import mot_args
from torchtitan_mixtures.models.mot.attention import merge_modalities
from torchtitan_mixtures.models.mot.model import MoTTransformer
from torchtitan_mixtures.sampling import command
from torchtitan_mixtures.train import parse_job

README = (ROOT / "README.md").read_text()


def table_rows() -> list[tuple[str, str]]:
    section = README.split("## From the seed to here")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, flags=re.M)
    return [row for row in rows if row[0] != "seed"]


def small_model():
    torch.manual_seed(0)
    args = mot_args["debugmodel"]
    args.n_layers = 2
    model = MoTTransformer(args)
    model.init_weights()
    return model


def seed_example():
    """Copied from the seed: batch 2, sequence 4, two modalities."""
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    modality_masks = [
        torch.tensor([True, True, False, False, True, False, False, True]),
        torch.tensor([False, False, True, True, False, True, True, False]),
    ]
    return tokens, modality_masks


def run_launch_line(here):
    words = shlex.split(here.strip("`"))
    assert words[0] == "torchrun"
    assert words[2:4] == ["-m", "torchtitan_mixtures.train"]
    config = words[words.index("--config") + 1]
    check_arguments(["--job.config_file", config])
    job = ConfigManager().parse_args(["--job.config_file", config])
    processes = int(words[1].removeprefix("--nproc_per_node="))
    degrees = job.parallelism
    # All processes have a place in the layout; the shard degree takes what is left.
    taken = degrees.tensor_parallel_degree * degrees.data_parallel_replicate_degree
    assert processes % taken == 0
    assert job.model.flavor in get_train_spec(job.model.name).model_args


def run_model_table(here):
    job = debug_job("mot", "--model.name=mot", "--model.flavor=8B_3modality")
    assert get_train_spec(job.model.name).model_args[job.model.flavor].n_modalities == 3


def run_call(here):
    model = small_model()
    tokens, modality_masks = seed_example()
    logits = model(tokens, modality_masks)
    assert logits.shape == (2, 4, 2048)
    stacked = torch.stack([mask.view(2, 4) for mask in modality_masks], dim=1)
    torch.testing.assert_close(model(tokens, stacked), logits, rtol=0, atol=0)


def run_merge(here):
    _, modality_masks = seed_example()
    x = torch.randn(8, 3)
    expert_outputs_xq = [x[mask] for mask in modality_masks]
    xq = merge_modalities(expert_outputs_xq, modality_masks)
    torch.testing.assert_close(xq, x, rtol=0, atol=0)


def run_experts(here):
    model = small_model()
    tokens, modality_masks = seed_example()
    plan = model._plan(tokens, modality_masks)
    local_experts = model.layers["0"].feed_forward.w1
    x = torch.randn(8, 256)
    expected = []
    for modality_id in range(2):
        expert_input = x[modality_masks[modality_id]]
        expected.append(list(local_experts.values())[modality_id](expert_input))
    ours = local_experts(local_experts.split(plan.sort(x.view(2, 4, 256)), plan), plan)
    merged = plan.unsort(plan.merge(ours)).flatten(0, 1)
    torch.testing.assert_close(merged, merge_modalities(expected, modality_masks))


def run_wq(here):
    model = small_model()
    assert model.layers["0"].attention.wq["text"].weight.shape == (256, 256)
    assert "layers.0.attention.wq.text.weight" in model.state_dict()


def run_attention_norm(here):
    assert small_model().layers["0"].attention_norm["image"].weight.shape == (256,)


def run_ffn(here):
    feed_forward = small_model().layers["0"].feed_forward
    assert feed_forward.w1["image"].weight.shape == (768, 256)
    assert feed_forward.w2["image"].weight.shape == (256, 768)
    assert feed_forward.w3["image"].weight.shape == (768, 256)


def run_dataloader(here):
    job = debug_job("mot")
    spec = get_train_spec("mot")
    assert spec.build_dataloader_fn.__name__ == "build_multimodal_dataloader"
    loader = spec.build_dataloader_fn(
        dp_world_size=1, dp_rank=0, tokenizer=spec.build_tokenizer_fn(job), job_config=job
    )
    input_dict, _ = next(iter(loader))
    assert input_dict["modality_masks"].shape == (2, 2, 256)


def image_folder():
    folder = Path(tempfile.mkdtemp())
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(40):
            Image.new("RGB", (40, 50), (number, 0, 99)).save(folder / name / f"{number}.png")
    return folder


def run_mom_launch_line(here):
    words = shlex.split(here.strip("`"))
    words = [str(image_folder()) if word == "P" else word for word in words]
    script = words.index("scripts/train.sh")
    config, *overrides = words[script + 1 :]
    job = parse_job(["--config", str(ROOT / config), *overrides])
    assert job.model.flavor == "MoM-S/4" and job.training.global_batch_size == 256
    args = get_train_spec("mom").model_args[job.model.flavor]
    args.update_from_config(job)
    assert (args.in_channels, args.image_size, args.num_classes) == (3, 32, 2)
    batch, labels = next(iter(get_train_spec("mom").build_dataloader_fn(1, 0, None, job)))
    assert batch["input"].shape == (32, 3, 32, 32) and labels.shape == (32, 64)


def run_slurm(here):
    words = [*shlex.split(here.strip("`")), "--dry-run"]
    words = [str(image_folder()) if word == "P" else word for word in words]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "sbatch" in result.stdout and "train_configs/mom/MoM-S-4.toml" in result.stdout


def run_mom_sample(here):
    # The command itself runs in tests/unit/sampling/test_image_command.py, with a small model.
    words = shlex.split(here.strip("`"))
    assert words[:2] == ["python", "scripts/sample.py"]
    options = command._parser().parse_args(words[2:])
    assert (options.model, options.checkpoint) == ("MoM-S/4", "DIR")


def nested_example():
    """The example of the seed but for the import paths."""
    e_c = 0.6
    E = 3
    delta = 2
    beta = 10
    capacity_distribution = compute_capacity_distribution(e_c, E, delta, beta)
    block = NestedBlock(
        dim=128,
        num_heads=8,
        num_experts=E,
        capacity_distribution=capacity_distribution,
    )
    return capacity_distribution, block


def run_import(here):
    names: dict[str, object] = {}
    exec(here.strip("`"), names)
    name = here.strip("`").split()[-1]
    meant = (NestedBlock, compute_capacity_distribution, MMDiTBlock, MMDiT)
    assert names[name] in meant and names[name].__name__ == name


def run_capacities(here):
    expected = [0.314543, 0.328186, 0.357271]
    assert nested_example()[0] == pytest.approx(expected, abs=1e-6)


def run_nested_block(here):
    _, block = nested_example()
    x = torch.randn(2, 49, 128)
    assert torch.equal(block(x), block(x, Budget((16, 16, 17))))


def run_router(here):
    capacities, block = nested_example()
    router, x = ExpertPreferredRouter(128, 3, capacities), torch.randn(2, 49, 128)
    routing = router(x)
    for experts in routing.experts.tolist():
        assert [experts.count(expert) for expert in range(3)] == [16, 16, 17]
    assert routing.restore(block(routing.sort(x))).shape == x.shape


def run_nested_layers(here):
    budget, x = Budget((16, 16, 17)), torch.randn(2, 49, 128)
    hidden = NestedLinearExpand(128, 512, 3)(x, budget)
    assert hidden.shape == (2, 49, 512)
    y = NestedLinearContract(512, 128, 3)(hidden, budget)
    assert y[:, 33:, :32].all() and not y[:, 33:, 32:].any()


def call_of(here_or_seed):
    """A call as the seed writes it, evaluated with the tensors of its example, but shorter."""
    names = {
        "time_cond": torch.randn(2, 256),
        "text_tokens": torch.randn(2, 5, 768),
        "text_mask": torch.ones(2, 5, dtype=torch.bool),
        "image_tokens": torch.randn(2, 7, 512),
    }
    names["block"] = MMDiTBlock(
        dim_joint_attn=512, dim_cond=256, dim_text=768, dim_image=512, qk_rmsnorm=True
    )
    names["mmdit"] = MMDiT(
        depth=2, dim_modalities=(768, 512, 384), dim_joint_attn=512, dim_cond=256, qk_rmsnorm=True
    )
    video, audio = torch.randn(2, 9, 512), torch.randn(2, 3, 384)
    names["modalities"] = (names["text_tokens"], video, audio)
    return eval(here_or_seed.replace("(...)", "modalities"), names)


def run_mmdit_block(here):
    (seed,) = [seed for seed, _ in table_rows() if seed.startswith("`block(")]
    assert "skip_feedforward_text_tokens=False" in here
    text, image = call_of(seed.strip("`"))
    assert text.shape == (2, 5, 768) and image.shape == (2, 7, 512)
    call_of(seed.strip("`")[:-1] + ", skip_feedforward_text_tokens=False)")


def run_mmdit_trunk(here):
    (seed,) = [seed for seed, _ in table_rows() if seed.startswith("`mmdit(")]
    text, video, audio = call_of(seed.strip("`"))
    assert [x.shape[1:] for x in (text, video, audio)] == [(5, 768), (9, 512), (3, 384)]


def run_adaptive_attention(here):
    attention = AdaptiveAttention(16, heads=2, dim_head=8, num_adaptive_weights=3)
    assert attention(torch.randn(2, 5, 16)).shape == (2, 5, 16)


@cache
def run_written_out_generation():
    """The example in the README of mixdiff, on a small checkpoint and with fewer steps."""
    readme = (ROOT / "torchtitan_mixtures/models/mixdiff/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_mixdiff(Path(folder))
        ready = code.replace("outputs/mixdiff/debugmodel", folder).replace("steps(50)", "steps(3)")
        names = {}
        exec(ready, names)
    assert names["image"].shape == (3, 32, 32) and names["image"].isfinite().all()
    return re.sub(r"\s+", " ", code)


def run_line_of_generation(here):
    line = here.split("`")[1]
    for part in line.split("..."):
        assert part.strip() in run_written_out_generation()


CHECKS = {
    "weights = router.predict_weights": run_line_of_generation,
    "active_experts = get_top_k": run_line_of_generation,
    "latent = initialize_noise": run_line_of_generation,
    "for step in diffusion_steps": run_line_of_generation,
    "noise_pred = sum(": run_line_of_generation,
    "latent = update_latent": run_line_of_generation,
    "return decode": run_line_of_generation,
    "from mmdit import": run_import,
    "from mmdit.mmdit_generalized_pytorch": run_import,
    "block(time_cond": run_mmdit_block,
    "mmdit(modality_tokens": run_mmdit_trunk,
    "mmdit/adaptive_attention.py": run_adaptive_attention,
    "python train.py --data-path": run_mom_launch_line,
    "torchrun --nproc_per_node=2": run_mom_launch_line,
    "sbatch": run_slurm,
    "python sample.py": run_mom_sample,
    "torchrun --nproc_per_node=1": run_launch_line,
    "torchrun --nproc_per_node=4": run_launch_line,
    "[model]": run_model_table,
    "logits = model": run_call,
    "merge_modalities": run_merge,
    "local_experts[modality_id](x": run_experts,
    "local_experts_wq": run_wq,
    "local_experts_attention_norm": run_attention_norm,
    "local_experts[modality_id]` (FFN)": run_ffn,
    "build_text_dataloader": run_dataloader,
    "from mone_pytorch.routing": run_import,
    "from mone_pytorch.block": run_import,
    "compute_capacity_distribution(": run_capacities,
    "NestedBlock(": run_nested_block,
    "mone_pytorch/routing.py": run_router,
    "mone_pytorch/layers.py": run_nested_layers,
}


@pytest.mark.parametrize("start", CHECKS)
def test_each_row_of_the_table_holds(start):
    matching = [here for seed, here in table_rows() if seed.strip("`").startswith(start)]
    assert len(matching) == 1
    CHECKS[start](matching[0])


def test_no_row_goes_unchecked():
    assert len(table_rows()) == len(CHECKS)


def test_the_file_tree_of_the_readme_is_that_of_the_repository():
    tree = README.split("## Files")[1].split("```")[1]
    package = [line for line in tree.splitlines() if line.startswith("  ")]
    named = {line.split()[0].rstrip("/") for line in package}
    for name in named:
        assert (ROOT / "torchtitan_mixtures" / name).exists(), name
    here = {p.name for p in (ROOT / "torchtitan_mixtures").glob("*.py")}
    assert here <= named, here - named


def test_the_batch_table_of_the_readme_is_what_the_loader_yields():
    table = README.split("### Documents and batches")[1].split("\n## ")[0]
    keys = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.M))
    job = debug_job("mot", "--multimodal.image_weight=0.5")
    spec = get_train_spec("mot")
    loader = spec.build_dataloader_fn(
        dp_world_size=1, dp_rank=0, tokenizer=spec.build_tokenizer_fn(job), job_config=job
    )
    assert keys == set(next(iter(loader))[0])
