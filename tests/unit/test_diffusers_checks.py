"""What cannot be asked of a mixture of diffusers: one message that names key and remedy."""

from __future__ import annotations

import pytest

from tests.jobs import TRAIN_CONFIGS, debug_job, load_job
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.diffusers_config import Diffusers

DECENTRALISED = "with diffusers.training = 'decentralised'"

WRONG = [
    (["--mixture.top_k=4"], r"mixture.top_k = 4 is not allowed; allowed: from 1 to 3"),
    (["--diffusers.experts=mom/DiT-S/3"], r"'mom/DiT-S/3': .*known flavours: .*DiT-S/4"),
    (["--diffusers.experts=mot/debugmodel"], "must be family/flavour of one of mom, mmdit"),
    (["--diffusers.experts=mixdiff/debugmodel"], "must be family/flavour of one of mom, mmdit"),
    (["--diffusers.experts=DiT-S/4"], "must be family/flavour"),
    (["--diffusers.experts=mom/MoM-S/4"], "has routers of its own; take a DiT or MMDiT"),
    (
        ["--diffusers.experts=mom/debugmodel_dit,mmdit/debugmodel"],
        "told different things .* must take classes, or the same prompts",
    ),
    (["--diffusers.num_experts=4"], "is 4 and that of domains 3 .* diffusers.num_experts = 3"),
    (["--multimodal.train_domains=noto,xx"], 'there is no domain "xx"'),
    (["--multimodal.domains="], r'multimodal.domains = "": .* needs to know the domain'),
    (["--mixture.router_noise=0.5"], "is read with diffusers.training = 'joint'"),
    (["--objective.balance_weight=0.5"], f"domains decide .* {DECENTRALISED}"),
    (["--objective.z_weight=0.5"], f"domains decide .* {DECENTRALISED}"),
    (["--diffusers.training=joint", "--mixture.top_k=1"], "the router would learn nothing"),
    (["--diffusers.training=joint", "--diffusers.router_weight=2"], "'decentralised'; remove"),
    (["--diffusers.training=router", "--diffusers.router_weight=2"], "no other loss"),
    (["--diffusers.training=router", "--mixture.frozen_towers=router"], "nothing is left to train"),
    (["--mixture.frozen_towers=noto,blob"], "'blob' is not a tower .* noto, noto_v1, fluent"),
    (["--mixture.routing=typed"], "has no modalities or mixers; remove the key"),
    (["--mixture.dispatch=split"], "remove the key"),
    (["--multimodal.image_size=64", "--diffusers.experts=mom/DiT-S/8,mom/DiT-S/8,mom/DiT-S/8",
      "--parallelism.expert_parallel_degree=2"], "expert_parallel_degree = 2"),
    (["--parallelism.pipeline_parallel_degree=2"], "pipeline_parallel_degree = 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 2, "experts": ["mom/DiT-S/4"]}, "says it already"),
        ({"num_experts": -1}, r"diffusers.num_experts = -1: must be 1 or more"),
        ({"router_inputs": ["time", "time"]}, "some of prompt, latent, time, each once"),
        ({"router_inputs": ["noise"]}, r"diffusers.router_inputs = \['noise'\]: must be some of"),
        ({"router_weight": 0.0}, "must be a finite number > 0"),
        ({"new_expert_from": "noto"}, "diffusers.start, which is empty"),
        ({"training": "apart"}, "must be one of 'joint', 'decentralised', 'router'"),
    ],
)
def test_a_key_alone_is_checked_by_the_section(values, message):
    with pytest.raises(ValueError, match=message):
        Diffusers(**values)


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_what_does_not_work_is_said_before_work_begins(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_job(debug_job("mixdiff", f"--job.dump_folder={tmp_path}", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["--diffusers.training=joint", "--mixture.top_k=1", "--diffusers.renormalize=no"],
        ["--diffusers.training=joint", "--multimodal.domains=", "--mixture.router_noise=0.1"],
        ["--diffusers.training=router"],
        ["--diffusers.experts=mom/DiT-S/8,mom/DiT-S/2,mom/debugmodel_dit"],
        ["--mixture.frozen_towers=noto,fluent", "--diffusers.router_weight=2"],
        ["--mixture.top_k=3", "--diffusers.router=linear", "--diffusers.router_inputs=prompt"],
    ],
)
def test_what_works_is_let_through(overrides, tmp_path):
    check_job(debug_job("mixdiff", f"--job.dump_folder={tmp_path}", *overrides))


@pytest.mark.parametrize(
    ("degree", "experts", "message"),
    [
        (2, "mom/DiT-S/8,mom/DiT-S/2,mom/debugmodel_dit", "experts with different patches"),
        (2, "", "a router alone has no tokens"),
        (3, "mom/debugmodel_dit,mom/debugmodel_dit,mom/debugmodel_dit", "does not divide"),
    ],
)
def test_ranks_that_cannot_share_tokens_are_refused(degree, experts, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(degree))
    overrides = [f"--parallelism.context_parallel_degree={degree}"]
    overrides += [f"--diffusers.experts={experts}"] if experts else ["--diffusers.training=router"]
    with pytest.raises(ValueError, match=message):
        check_job(debug_job("mixdiff", *overrides))


def test_tensor_parallelism_must_divide_what_experts_have(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"tensor_parallel_degree = 3: .* does not divide"):
        check_job(debug_job("mixdiff", "--parallelism.tensor_parallel_degree=3"))


@pytest.mark.parametrize("family", ["mot", "mom", "mone", "mmdit"])
def test_other_families_refuse_the_section(family):
    with pytest.raises(ValueError, match=rf"diffusers\.num_experts = 2: model.name = '{family}'"):
        check_job(debug_job(family, "--diffusers.num_experts=2"))


def test_experts_with_prompts_refuse_keys_of_classes():
    config = TRAIN_CONFIGS / "mixdiff" / "debugmodel_mmdit.toml"
    check_job(load_job(config))
    with pytest.raises(ValueError, match=r"objective\.class_dropout"):
        check_job(load_job(config, "--objective.class_dropout=0.2"))
    with pytest.raises(ValueError, match=r"mixture\.untie"):
        check_job(load_job(config, "--mixture.untie=ffn"))
