"""VQ models of other libraries as image tokenizers, against the libraries' own calls."""

import importlib
import json
import multiprocessing
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from torchtitan_mixtures.data import vq_tokenizer
from torchtitan_mixtures.data.tokenizers import build_image_tokenizer
from torchtitan_mixtures.data.vq_tokenizer import VQTokenizer

SIZE, CODES, GRID = 16, 32, 8


def spread(model: nn.Module) -> nn.Module:
    """Give a model a codebook as wide as what it encodes, so that many codes occur."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def save_diffusers(folder: Path, lookup: bool = False, **values: int) -> Path:
    model = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        vq_embed_dim=3,
        lookup_from_codebook=lookup,
        **{"sample_size": SIZE, "num_vq_embeddings": CODES, **values},
    )
    spread(model).save_pretrained(folder)
    return folder


SMALL = {
    "embed_dim": 4,
    "num_embeddings": CODES,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}


def save_chameleon(folder: Path) -> Path:
    model = ChameleonVQVAE(ChameleonVQVAEConfig(resolution=SIZE, **SMALL))
    spread(model).save_pretrained(folder)
    return folder


def save_janus(folder: Path) -> Path:
    model = JanusVQVAE(JanusVQVAEConfig(num_patches=GRID, **SMALL))
    spread(model).save_pretrained(folder)
    return folder


SAVERS = {"VQModel": save_diffusers, "Chameleon": save_chameleon, "Janus": save_janus}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVERS.items()}


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)


def change_config(folder: Path, *removed: str, **values: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: config[key] for key in config if key not in removed}))


def to_bytes(pixels: Tensor, low: float) -> NDArray[np.float32]:
    """Pixels as numbers from 0 to 255, not rounded."""
    scaled = (pixels.permute(0, 2, 3, 1) - low) / (1 - low)
    return scaled.clamp(0, 1).numpy() * 255


@pytest.mark.parametrize("name", SAVERS)
def test_shapes_follow_from_the_configuration(folders, images, name: str):
    tokenizer = build_image_tokenizer(str(folders[name]))
    assert isinstance(tokenizer, VQTokenizer)
    assert (tokenizer.image_size, tokenizer.num_codes) == (SIZE, CODES)
    assert tokenizer.codes_per_image == GRID**2
    codes = tokenizer.encode(images)
    assert codes.dtype == np.int64 and codes.shape == (3, GRID**2)
    assert codes.min() >= 0 and codes.max() < CODES and len(np.unique(codes)) > 4
    assert (codes == tokenizer.encode(images)).all()
    assert tokenizer.encode(images[:0]).shape == (0, GRID**2)


@pytest.mark.parametrize("lookup", [False, True])
@torch.no_grad()
def test_a_model_of_diffusers_agrees_with_its_own_calls(tmp_path, images, lookup: bool):
    tokenizer = VQTokenizer(save_diffusers(tmp_path, lookup))
    model = VQModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    low = 0 if lookup else -1
    pixels = torch.tensor(images).permute(0, 3, 1, 2) / 255 * (1 - low) + low
    latents = model.encode(pixels).latents
    # By hand: the entry that is nearest to each place, in row-major order.
    places = latents.permute(0, 2, 3, 1).reshape(3, GRID**2, 1, 3).double()
    distances = (places - model.quantize.embedding.weight.double()).square().sum(-1)
    codes = tokenizer.encode(images)
    assert (codes == distances.argmin(-1).numpy()).all()
    if lookup:
        flat = torch.tensor(codes).flatten()
        shape = (3, GRID, GRID, 3)
        expected = model.decode(flat, force_not_quantize=True, shape=shape).sample
    else:
        expected = model.decode(latents).sample
    decoded = tokenizer.decode(codes)
    assert decoded.dtype == np.uint8 and decoded.shape == images.shape
    assert np.abs(decoded - to_bytes(expected, low)).max() < 0.51
    assert decoded.std() > 5


@torch.no_grad()
def test_chameleon_agrees_with_its_own_call_and_says_that_it_has_no_decoder(folders, images):
    tokenizer = VQTokenizer(folders["Chameleon"])
    model = ChameleonVQVAE.from_pretrained(folders["Chameleon"])
    pixels = torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1
    codes = tokenizer.encode(images)
    assert (codes.flatten() == model.encode(pixels).image_tokens.numpy()).all()
    # The model of transformers has no decoder: that is said, and nothing is drawn in its place.
    with pytest.raises(NotImplementedError, match=r"ChameleonVQVAE.*multimodal\.image_tokenizer"):
        tokenizer.decode(codes)


@torch.no_grad()
def test_janus_agrees_with_its_own_calls(folders, images):
    tokenizer = VQTokenizer(folders["Janus"])
    model = JanusVQVAE.from_pretrained(folders["Janus"])
    pixels = torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1
    codes = tokenizer.encode(images)
    expected = model.encode(pixels).image_tokens
    assert (codes.flatten() == expected.numpy()).all()
    decoded = tokenizer.decode(codes)
    assert np.abs(decoded - to_bytes(model.decode(expected.view(3, -1)), -1)).max() < 0.51


def test_codes_do_not_depend_on_the_other_images(folders, images):
    for folder in folders.values():
        tokenizer = VQTokenizer(folder)
        alone = [tokenizer.encode(image[None])[0] for image in images]
        assert (np.stack(alone) == tokenizer.encode(images)).all()


def test_an_image_size_of_ones_own_goes_first(tmp_path):
    save_diffusers(tmp_path)
    change_config(tmp_path, image_size=24)
    tokenizer = VQTokenizer(tmp_path)
    assert (tokenizer.image_size, tokenizer.codes_per_image) == (24, 144)
    codes = tokenizer.encode(np.zeros((1, 24, 24, 3), np.uint8))
    assert tokenizer.decode(codes).shape == (1, 24, 24, 3)


def test_images_and_codes_that_do_not_fit_are_refused(folders):
    tokenizer = VQTokenizer(folders["VQModel"])
    with pytest.raises(ValueError, match=r"expected \(batch, 16, 16, 3\) uint8"):
        tokenizer.encode(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="dtype float64"):
        tokenizer.encode(np.zeros((1, 16, 16, 3)))
    with pytest.raises(ValueError, match=r"expected \(batch, 64\)"):
        tokenizer.decode(np.zeros((1, 65), np.int64))
    with pytest.raises(ValueError, match="codes 0 to 31"):
        tokenizer.decode(np.full((1, 64), 32))


# --- processes ------------------------------------------------------------------------------------


def test_a_pickled_tokenizer_carries_the_folder_and_no_weights(folders, images):
    tokenizer = VQTokenizer(folders["VQModel"])
    codes = tokenizer.encode(images)
    content = pickle.dumps(tokenizer)
    assert len(content) < 500
    assert (pickle.loads(content).encode(images) == codes).all()


class Encoded(torch.utils.data.Dataset):
    """Codes of images, encoded by whoever asks."""

    def __init__(self, tokenizer: VQTokenizer, images: NDArray[np.uint8]) -> None:
        self.tokenizer, self.images = tokenizer, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.tokenizer.encode(self.images[index : index + 1])[0]


@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
)  # the latter imports everything again
def test_workers_encode_as_this_process_does(folders, images, method: str):
    tokenizer = VQTokenizer(folders["VQModel"])
    codes = tokenizer.encode(images)  # so that forked workers inherit a model
    context = multiprocessing.get_context(method)
    loader = DataLoader(
        Encoded(tokenizer, images), batch_size=None, num_workers=1, multiprocessing_context=context
    )
    assert (np.stack(list(loader)) == codes).all()


def test_workers_compute_on_the_cpu_and_others_on_the_accelerator(monkeypatch):
    monkeypatch.setattr(vq_tokenizer, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert vq_tokenizer._device() == torch.device("cuda")
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    assert vq_tokenizer._device() == torch.device("cpu")


def test_a_model_is_loaded_once_and_again_in_another_process(folders, images, monkeypatch):
    tokenizer, loaded = VQTokenizer(folders["VQModel"]), []
    load = vq_tokenizer._load

    def count(folder, family):
        loaded.append(folder)
        return load(folder, family)

    monkeypatch.setattr(vq_tokenizer, "_load", count)
    assert not loaded
    for _ in range(2):
        tokenizer.encode(images[:1])
    assert len(loaded) == 1
    monkeypatch.setattr(vq_tokenizer.os, "getpid", lambda: -1)
    tokenizer.encode(images[:1])
    assert len(loaded) == 2


# --- fingerprints ---------------------------------------------------------------------------------


def test_the_fingerprint_is_of_configuration_and_weights(folders, tmp_path):
    prints = [VQTokenizer(folder).fingerprint() for folder in folders.values()]
    tokenizer = VQTokenizer(save_diffusers(tmp_path))
    assert tokenizer.fingerprint() == prints[0]  # the same model elsewhere
    change_config(tmp_path, image_size=24)
    assert tokenizer.fingerprint() == prints[0]  # of this process, once
    prints.append(VQTokenizer(tmp_path).fingerprint())
    save_diffusers(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    prints.append(VQTokenizer(tmp_path).fingerprint())
    assert len(set(prints)) == 5 and all(len(digest) == 64 for digest in prints)


# --- what is refused ------------------------------------------------------------------------------


def test_folders_without_a_model_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json; name a folder.*downloaded"):
        build_image_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"'org/vq' is unknown.*folder with the config\.json"):
        build_image_tokenizer("org/vq")
    with pytest.raises(ValueError, match="is not a local folder"):
        VQTokenizer("org/vq")
    for content in ("{", "[]", '"VQModel"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json: "):
            VQTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "describes AutoencoderKL; name a folder"),
        ({"architectures": ["Emu3VQVAE"], "model_type": "emu3_vqgan"}, "describes .*Emu3VQVAE"),
        (
            {"architectures": ["ChameleonForConditionalGeneration"], "model_type": "chameleon"},
            r"describes .*Chameleon.*model\.vqmodel\.save_pretrained",
        ),
        ({}, "describes nothing"),
        ({"model_type": ["x"], "architectures": {"a": 1}}, "describes"),
        ({"_class_name": "VQModel", "sample_size": 16}, "cannot be used .*num_vq_embeddings"),
        ({"model_type": "janus_vqgan", "num_embeddings": 4}, "cannot be used"),
    ],
)
def test_configurations_of_other_models_are_refused(tmp_path, config: dict, message: str):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        VQTokenizer(tmp_path)


def test_image_sizes_that_do_not_fit_are_refused(tmp_path):
    save_diffusers(tmp_path / "a")
    change_config(tmp_path / "a", "sample_size")
    with pytest.raises(ValueError, match=r'no image size that is .* of 2 \(0\); add "image_size"'):
        VQTokenizer(tmp_path / "a")
    for size, message in ((15, "of 2"), (-2, "cannot be used"), ("16", "cannot be used")):
        change_config(tmp_path / "a", image_size=size)
        with pytest.raises(ValueError, match=message):
            VQTokenizer(tmp_path / "a")
    save_janus(tmp_path / "b")
    change_config(tmp_path / "b", image_size=32)
    with pytest.raises(ValueError, match="image_size = 32, but num_patches fixes it at 16"):
        VQTokenizer(tmp_path / "b")


def test_pickled_weights_are_not_read(tmp_path):
    save_diffusers(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors but diffusion_pytorch_model\.bin"):
        VQTokenizer(tmp_path)


@pytest.mark.parametrize("name", SAVERS)
def test_broken_weights_are_refused(tmp_path, images, name: str):
    (weights,) = SAVERS[name](tmp_path).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r'^multimodal\.image_tokenizer = ".*": cannot be loaded'):
        VQTokenizer(tmp_path).encode(images)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("VQModel", {"layers_per_block": 2}),
        ("VQModel", {"num_vq_embeddings": 40}),
        ("Chameleon", {"num_res_blocks": 2}),
        ("Janus", {"num_embeddings": 40}),
    ],
)
def test_weights_of_another_configuration_are_refused(tmp_path, images, name: str, values: dict):
    change_config(SAVERS[name](tmp_path), **values)
    with pytest.raises(
        ValueError, match=r"^multimodal\.image_tokenizer = .*(cannot be loaded|its weights lack)"
    ):
        VQTokenizer(tmp_path).encode(images)


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("VQModel", "diffusers", "vae"), ("Janus", "transformers", "text")],
)
def test_a_missing_extra_is_named(folders, images, monkeypatch, name, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    message = rf'multimodal\.image_tokenizer = .* needs .*install "torchtitan_mixtures\[{extra}\]"'
    with pytest.raises(ValueError, match=message):
        VQTokenizer(folders[name]).encode(images)


def test_progress_bars_are_as_before(folders, images):
    for library, name in (("diffusers", "VQModel"), ("transformers", "Janus")):
        logging = importlib.import_module(f"{library}.utils.logging")
        had_bars = logging.is_progress_bar_enabled()
        VQTokenizer(folders[name]).encode(images)
        assert logging.is_progress_bar_enabled() == had_bars
