"""Folders of experts: in and out, changed, and what is wrong with them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import save_tiny_mixdiff
from tests.jobs import debug_job
from torchtitan_mixtures import checkpoint_config, expert_files
from torchtitan_mixtures import expert_folder_edits as edits
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.evaluation.denoising import level_losses
from torchtitan_mixtures.expert_folder import read_mixture, start_from
from torchtitan_mixtures.models.mixdiff import MixtureOfDiffusers

NAMES = ("noto", "noto_v1", "fluent")
SPLIT = "unseen_concept"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run, and its model."""
    folder = tmp_path_factory.mktemp("run")
    return folder, save_tiny_mixdiff(folder)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder of experts that is made of the run."""
    folder = tmp_path_factory.mktemp("exported") / "experts"
    edits.export(str(run[0]), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(exported, tmp_path / "experts")


@pytest.fixture
def expert(folder, tmp_path):
    """A model that could be an expert."""
    shutil.copytree(folder / "experts" / "noto", tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in state.items()}, tmp_path / "other" / "x")
    (tmp_path / "other" / "x").replace(tmp_path / "other" / "model.safetensors")
    return tmp_path / "other"


def batch(seed=0):
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(5, 3, 32, 32, generator=rng)
    return latents, 1000 * torch.rand(5, generator=rng), torch.tensor([0, 5, 9, 22, 24])


@torch.no_grad()
def predict(model):
    latents, times, labels = batch()
    return model(latents, times, class_labels=labels)


def test_a_mixture_comes_back_as_it_was_bit_for_bit(run, folder):
    loaded = load_model(folder)
    expected = run[1].state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(predict(loaded.model).prediction, predict(run[1]).prediction)
    assert loaded.model_args.names == NAMES and loaded.step == -1 and not loaded.is_averaged


def test_an_expert_is_an_ordinary_model_of_its_family(run, folder):
    loaded = load_model(folder / "experts" / "fluent")
    assert loaded.job_config.model.name == "mom"
    assert loaded.job_config.model.flavor == "debugmodel_dit"
    latents, times, labels = batch()
    with torch.no_grad():
        found = loaded.model(latents, times, labels).prediction
        expected = run[1].experts["fluent"](latents, times, labels).prediction
    assert torch.equal(found, expected)


def test_an_added_expert_changes_nothing_until_the_router_knows_it(run, folder, expert):
    mixture = edits.add(folder, edits.read_source("sketch", expert))
    assert mixture.names == (*NAMES, "sketch") and mixture.unrouted == ("sketch",)
    model = load_model(folder).model
    output, expected = predict(model), predict(run[1])
    assert not output.gates[:, 3].any()
    # A product with a matrix of four rows may round differently from one with three.
    torch.testing.assert_close(output.gates[:, :3], expected.gates)
    torch.testing.assert_close(output.prediction, expected.prediction)
    latents, times, labels = batch()
    gates = torch.nn.functional.pad(expected.gates, (0, 1))
    with torch.no_grad():
        same = model(latents, times, class_labels=labels, gates=gates).prediction
    assert torch.equal(same, expected.prediction)


def test_copies_of_a_folder_know_what_the_router_has_not_learned(folder, expert, tmp_path):
    edits.add(folder, edits.read_source("sketch", expert))
    assert edits.export(str(folder), tmp_path / "copy").unrouted == ("sketch",)
    names = ("sketch", *NAMES)
    sources = [edits.read_source(name, folder / "experts" / name) for name in names]
    joined = edits.assemble(tmp_path / "joined", sources, str(folder))
    assert joined.names == names and joined.unrouted == ("sketch",)
    assert not predict(load_model(tmp_path / "joined").model).gates[:, 0].any()


def test_a_removed_expert_is_as_one_that_is_never_likely(run, folder):
    mixture = edits.remove(folder, "noto_v1")
    assert mixture.names == ("noto", "fluent") and mixture.model_args.top_k == 2
    assert not (folder / "experts" / "noto_v1").exists()
    model = run[1]
    latents, times, labels = batch()
    with torch.no_grad():
        logits = model.router(latents, times, labels)
        gates = torch.zeros(5, 3)
        gates[:, [0, 2]] = logits[:, [0, 2]].softmax(1)
        expected = model(latents, times, labels, gates=gates).prediction
    torch.testing.assert_close(predict(load_model(folder).model).prediction, expected)
    assert edits.remove(folder, "fluent").model_args.top_k == 1
    alone = load_model(folder / "experts" / "noto")
    assert torch.equal(level_losses(load_model(folder), SPLIT, 1), level_losses(alone, SPLIT, 1))
    with pytest.raises(ValueError, match="--name noto: is the only expert"):
        edits.remove(folder, "noto")


def test_rows_of_the_router_go_by_name(run, folder):
    config = json.loads((folder / "config.json").read_text())
    order = [2, 0, 1]
    for key in ("experts", "expert_names"):
        config["model_args"][key] = [config["model_args"][key][number] for number in order]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(folder)
    assert loaded.model_args.names == ("fluent", "noto", "noto_v1")
    output, expected = predict(loaded.model), predict(run[1])
    torch.testing.assert_close(output.gates, expected.gates[:, order])
    torch.testing.assert_close(output.prediction, expected.prediction)


def test_an_expert_is_exchanged(run, folder, expert):
    edits.replace(folder, edits.read_source("noto", expert))
    found, expected = load_model(folder).model.state_dict(), run[1].state_dict()
    for name, tensor in expected.items():
        factor = 2 if name.startswith("experts.noto.") else 1
        assert torch.equal(found[name], factor * tensor), name


def test_experts_of_other_jobs_are_put_together(run, folder, tmp_path):
    paths = {name: folder / "experts" / name for name in ("fluent", "noto", "noto_v1")}
    sources = [edits.read_source(name, path) for name, path in paths.items()]
    router = tmp_path / "router"
    alone = save_tiny_mixdiff(router, "--diffusers.training=router")
    edits.assemble(tmp_path / "a", sources, str(router))
    model = load_model(tmp_path / "a").model
    latents, times, labels = batch()
    with torch.no_grad():
        found = model.router(latents, times, labels)
        torch.testing.assert_close(found, alone.router(latents, times, labels)[:, [2, 0, 1]])
    assert torch.equal(
        model.experts["noto"].x_embedder.weight, run[1].experts["noto"].x_embedder.weight
    )
    # Scored is what it predicts, as a run of the same weights is, though the router's run had none.
    assert torch.equal(
        level_losses(load_model(tmp_path / "a"), SPLIT, 1),
        level_losses(load_model(folder), SPLIT, 1),
    )
    edits.assemble(tmp_path / "b", sources, None)
    mixture = read_mixture(tmp_path / "b")
    assert mixture.unrouted == mixture.names
    model, fresh = make_started(tmp_path / "b")
    for name, tensor in model.state_dict().items():
        wanted = fresh[name] if name.startswith("router.") else run[1].state_dict()[name]
        assert torch.equal(tensor, wanted), name
    gates = predict(load_model(tmp_path / "b").model).gates
    assert torch.equal(gates[gates > 0], torch.full((10,), 0.5))
    with pytest.raises(ValueError, match=r"it tells the experts noto, .* name the same"):
        edits.assemble(tmp_path / "c", sources[:2], str(router))


@pytest.mark.parametrize(
    ("domains", "expected"),
    [((["fluent"], ["noto"]), ["fluent", "noto"]), ((["fluent"], []), [])],
)
def test_a_mixture_of_experts_of_domains_is_of_all_their_domains(
    domains, expected, folder, tmp_path
):
    sources = [edits.read_source(name, folder / "experts" / name) for name in ("fluent", "noto")]
    for source, own in zip(sources, domains, strict=True):
        source.job_config.multimodal.train_domains = own
    found = edits.assemble(tmp_path / "out", sources, None).job_config.multimodal.train_domains
    assert found == expected
    assert sources[0].job_config.multimodal.train_domains == ["fluent"]


def test_experts_that_are_told_prompts_come_back_as_they_were(folder, tmp_path):
    model = save_tiny_mixdiff(tmp_path / "run", flavor="debugmodel_mmdit")
    edits.export(str(tmp_path / "run"), tmp_path / "prompted")
    found = load_model(tmp_path / "prompted").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    paths = {name: tmp_path / "prompted" / "experts" / name for name in NAMES[:2]}
    sources = [edits.read_source(f"drawn_{name}", path) for name, path in paths.items()]
    made = edits.assemble(tmp_path / "made", sources, None)
    assert made.model_args.prompts == model.model_args.prompts
    with pytest.raises(ValueError, match="what they are told is 'prompts' and 'classes'"):
        edits.add(folder, sources[0])


# --- runs that begin with a folder ----------------------------------------------------------------


def make_started(folder, *overrides):
    job = debug_job("mixdiff", f"--diffusers.start={folder}", *overrides)
    check_job(job)
    from torchtitan.protocols.train_spec import get_train_spec

    args = get_train_spec("mixdiff").model_args["debugmodel"]
    args.update_from_config(job)
    model = MixtureOfDiffusers(args)
    model.init_weights()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_from(model, args, job.diffusers)
    return model, fresh


def test_a_run_begins_with_the_experts_of_a_folder(run, folder):
    model, _ = make_started(folder)
    expected = run[1].state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    router, _ = make_started(folder, "--diffusers.training=router")
    assert all(torch.equal(t, expected[name]) for name, t in router.state_dict().items())


@pytest.mark.parametrize("copied", ["", "noto"])
def test_a_new_expert_is_a_copy_or_new_and_its_row_zero(run, folder, copied):
    edits.remove(folder, "fluent")
    model, fresh = make_started(folder, f"--diffusers.new_expert_from={copied}")
    expected, found = run[1].state_dict(), model.state_dict()
    for name, tensor in found.items():
        if name.startswith("experts.fluent."):
            source = name.replace("fluent", "noto")
            wanted = expected[source] if copied else fresh[name]
        elif name in ("router.head.weight", "router.head.bias"):
            wanted = expected[name].clone()
            wanted[2] = 0
        else:
            wanted = expected[name]
        assert torch.equal(tensor, wanted), name


def test_a_row_that_the_router_never_learned_begins_at_zero(folder, expert):
    edits.remove(folder, "fluent")
    edits.add(folder, edits.read_source("fluent", expert))
    model, _ = make_started(folder)
    assert not model.router.head.weight[2].any() and model.router.head.bias[2] == 0
    assert torch.equal(
        model.experts["fluent"].x_embedder.weight,
        load_file(expert / "model.safetensors")["x_embedder.weight"],
    )


WRONG_STARTS = [
    (["--diffusers.router=mlp"], r"router = 'transformer', the job's 'mlp'; set diffusers.router"),
    (["--diffusers.router_inputs=time"], r"router_inputs = .* set diffusers.router_inputs"),
    (["--diffusers.experts=mom/DiT-S/4,mom/DiT-S/4,mom/DiT-S/4"], "is mom/debugmodel_dit, the job"),
    (["--multimodal.image_size=16"], "image_size is 16 and 32"),
    (["--multimodal.class_of=style"], "num_classes is 3 and 24"),
    (["--objective.kind=flow"], "objective.kind is 'flow' and 'ddpm'"),
    (["--objective.noise_steps=500"], "objective.noise_steps is 500 and 1000"),
    (["--objective.no_learned_variance"], "learned_variance is False and True"),
    (["--diffusers.new_expert_from=noto"], "has no expert that .* lacks; remove the key"),
    (["--diffusers.new_expert_from=sketch"], "has the experts noto, noto_v1, fluent"),
    (["--multimodal.domains=class", "--multimodal.class_of=style+group",
      "--diffusers.num_experts=24"], "none of them. Names are those of multimodal.domains"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), WRONG_STARTS)
def test_a_job_that_the_folder_does_not_fit_is_refused(overrides, message, folder):
    with pytest.raises(ValueError, match=message) as error:
        make_started(folder, *overrides)
    assert "diffusers." in str(error.value)


# --- broken folders -------------------------------------------------------------------------------


def test_a_missing_expert_is_named_with_the_remedy(folder):
    shutil.rmtree(folder / "experts" / "noto_v1")
    with pytest.raises(ValueError, match=r"the expert 'noto_v1' of .* is missing; .* remove"):
        read_mixture(folder)
    with pytest.raises(ValueError, match="the expert 'noto_v1'"):
        load_model(folder)
    assert edits.remove(folder, "noto_v1").names == ("noto", "fluent")


def test_experts_of_other_shapes_say_which(folder, tmp_path):
    other = tmp_path / "small"
    save_tiny_mixdiff(other, "--multimodal.image_size=16")
    edits.export(str(other), tmp_path / "small_experts")
    source = edits.read_source("sketch", tmp_path / "small_experts" / "experts" / "noto")
    with pytest.raises(ValueError, match=r"'sketch' .* image_size is 16 and 32"):
        edits.add(folder, source)
    shutil.rmtree(folder / "experts" / "noto")
    shutil.copytree(tmp_path / "small_experts" / "experts" / "noto", folder / "experts" / "noto")
    with pytest.raises(ValueError, match=r"experts/noto and .* image_size is 16 and 32"):
        read_mixture(folder)
    sources = [source, edits.read_source("noto", folder / "experts" / "fluent")]
    with pytest.raises(ValueError, match=r"the expert 'sketch' .* and 'noto' .* image_size"):
        edits.assemble(tmp_path / "out", sources, None)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("config.json", "is no folder of experts"),
        ("router/model.safetensors", "is no folder of experts"),
        ("experts/noto/config.json", "'noto' of .* is missing"),
        ("experts/noto/model.safetensors", "'noto' of .* is missing"),
    ],
)
def test_missing_files_are_named(folder, path, message):
    (folder / path).unlink()
    with pytest.raises(ValueError, match=message):
        read_mixture(folder)


@pytest.mark.parametrize("path", ["router/model.safetensors", "experts/noto/model.safetensors"])
def test_broken_and_foreign_weights_are_named(folder, path):
    whole = (folder / path).read_bytes()
    (folder / path).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read as safetensors"):
        read_mixture(folder)
    save_file({"other.weight": torch.zeros(2)}, folder / path)
    with pytest.raises(ValueError, match="they are not of one model"):
        read_mixture(folder)


@pytest.mark.parametrize(
    "rows",
    [None, "", "3", "null", '"abc"', '{"noto": 0, "noto_v1": 1, "fluent": 2}', '["noto"]',
     "[0, 1, 2]", '["noto", "noto", "fluent"]'],
)  # fmt: skip
def test_rows_of_nobody_are_refused(rows, folder):
    path = folder / "router" / "model.safetensors"
    save_file(load_file(path), path, None if rows is None else {"experts": rows})
    with pytest.raises(ValueError, match="does not say which experts its rows are of"):
        read_mixture(folder)


def test_rows_that_are_missing_are_named(folder):
    path = folder / "router" / "model.safetensors"
    tensors, rows = load_file(path), {"experts": json.dumps(NAMES)}
    save_file(tensors | {"head.bias": tensors["head.bias"][:2].clone()}, path, rows)
    with pytest.raises(ValueError, match="does not say which experts its rows are of"):
        read_mixture(folder)
    save_file(tensors, path, {"experts": '["noto", "else", "fluent"]'})
    with pytest.raises(ValueError, match=r'has no row for noto_v1; .* name them in "unrouted"'):
        read_mixture(folder)


def test_names_that_leave_the_folder_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["expert_names"][0] = "../../noto"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expert_names = '../../noto' is not allowed"):
        read_mixture(folder)
    for text in ("a/b=x", "../a=x", "keys=x", "=x", "a=", "a"):
        with pytest.raises(ValueError, match="--expert"):
            edits.parse_expert(text)


def test_what_cannot_be_an_expert_is_refused(run, folder, expert):
    with pytest.raises(ValueError, match="is a mixture itself"):
        edits.read_source("a", run[0])
    with pytest.raises(ValueError, match="has an expert of that name"):
        edits.add(folder, edits.read_source("noto", expert))
    with pytest.raises(ValueError, match=r"sketch: .* has the experts noto"):
        edits.replace(folder, edits.read_source("sketch", expert))
    config = json.loads((expert / "config.json").read_text())
    config["model_args"]["n_layers"] = 5
    (expert / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"--expert a=.*"):
        edits.read_source("a", expert)


def test_a_folder_that_is_there_is_not_written_over(run, folder):
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        edits.export(str(run[0]), folder)


def test_a_kill_while_a_folder_is_written_leaves_none(run, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchtitan_mixtures.expert_folder.write_config", fail)
    with pytest.raises(KeyboardInterrupt):
        edits.export(str(run[0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    edits.export(str(run[0]), tmp_path / "out")  # what was left is no obstacle
    assert read_mixture(tmp_path / "out").names == NAMES


def test_a_kill_while_an_expert_is_added_leaves_the_folder_as_it_was(
    run, folder, expert, monkeypatch
):
    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(edits, "write_config", fail)
    with pytest.raises(KeyboardInterrupt):
        edits.add(folder, edits.read_source("sketch", expert))
    assert read_mixture(folder).names == NAMES
    assert torch.equal(predict(load_model(folder).model).prediction, predict(run[1]).prediction)


def test_a_kill_while_an_expert_is_removed_leaves_no_row_to_its_namesake(
    folder, expert, monkeypatch
):
    def fail(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(expert_files, "write_router", fail)
        with pytest.raises(KeyboardInterrupt):
            edits.remove(folder, "noto")
    assert read_mixture(folder).names == ("noto_v1", "fluent")
    mixture = edits.add(folder, edits.read_source("noto", expert))
    assert mixture.unrouted == ("noto",)
    assert not predict(load_model(folder).model).gates[:, 2].any()


def test_a_folder_is_no_checkpoint_to_begin_with(folder):
    with pytest.raises(ValueError, match=r"begins with a folder of experts by diffusers\.start"):
        check_job(debug_job("mixdiff", f"--checkpoint.initial_load_path={folder}"))


def test_files_say_what_they_are_of(folder):
    saved = checkpoint_config.read(folder)
    assert (saved["family"], saved["unrouted"], saved["weights_only"]) == ("mixdiff", [], True)
    shapes = expert_files.read_shapes(folder / "experts" / "noto" / "model.safetensors")
    assert shapes == checkpoint_config.read(folder / "experts" / "noto")["parameters"]


def test_a_router_that_is_missing_is_named(folder):
    (folder / "router" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the router of this folder of experts is missing"):
        load_model(folder)
