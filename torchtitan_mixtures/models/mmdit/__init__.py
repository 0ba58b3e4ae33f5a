"""MMDiT: diffusion transformers with weights of their own for each modality."""

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.protocols.train_spec import TrainSpec

from torchtitan_mixtures.data.prompt_loader import build_prompt_dataloader
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.prompts import SPEECH_UNITS
from torchtitan_mixtures.metrics import build_metrics_processor
from torchtitan_mixtures.models.common.flavors import Flavors
from torchtitan_mixtures.models.mmdit.args import MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.block import MMDiTBlock
from torchtitan_mixtures.models.mmdit.joint_attention import AdaptiveAttention
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser
from torchtitan_mixtures.models.mmdit.parallelize import parallelize_mmdit
from torchtitan_mixtures.models.mmdit.trunk import MMDiT
from torchtitan_mixtures.objectives.denoising import build_denoising_loss
from torchtitan_mixtures.optimizer import build_tower_optimizers
from torchtitan_mixtures.validate_denoising import build_denoising_validator

__all__ = ["AdaptiveAttention", "MMDiT", "MMDiTBlock", "get_train_spec", "mmdit_args"]

_TEXT = PromptSpec("text", "tokens", length=40, vocab_size=2048)
_SPEECH = PromptSpec(
    "speech", "tokens", length=88, vocab_size=SPEECH_UNITS + 1, null_token=SPEECH_UNITS
)

mmdit_args = Flavors(
    "mmdit",
    {
        "debugmodel": MMDiTModelArgs(
            dim=128, n_layers=4, n_heads=4, patch_size=4, in_channels=3, prompts=(_TEXT,)
        ),
        "debugmodel_3modality": MMDiTModelArgs(
            dim=128,
            n_layers=4,
            n_heads=4,
            patch_size=4,
            in_channels=3,
            prompt_names=("text", "speech"),
            prompts=(_TEXT, _SPEECH),
        ),
        # All tokens in one stream: a DiT. It has 5 % more multiply-adds than debugmodel, whose last
        # block leaves out what nobody reads of the text; with more layers less.
        "debugmodel_dit": MMDiTModelArgs(
            dim=128,
            n_layers=4,
            n_heads=4,
            patch_size=4,
            in_channels=3,
            prompts=(_TEXT,),
            single_stream=True,
        ),
        # Stable Diffusion 3: the depth decides width (64 times it) and heads.
        "d15": MMDiTModelArgs(dim=960, n_layers=15, n_heads=15, position_grid=16),
        "d18": MMDiTModelArgs(dim=1152, n_layers=18, n_heads=18, position_grid=16),
        "d22": MMDiTModelArgs(dim=1408, n_layers=22, n_heads=22, position_grid=16),
        "d24": MMDiTModelArgs(dim=1536, n_layers=24, n_heads=24, position_grid=16),
        "d30": MMDiTModelArgs(dim=1920, n_layers=30, n_heads=30, position_grid=16),
        "d38": MMDiTModelArgs(dim=2432, n_layers=38, n_heads=38, position_grid=16),
        # The published weights' architecture; that of SD3.5-large is d38.
        "SD3-medium": MMDiTModelArgs(
            dim=1536, n_layers=24, n_heads=24, position_grid=16, qk_norm="none"
        ),
        "d15_dit": MMDiTModelArgs(
            dim=960, n_layers=15, n_heads=15, position_grid=16, single_stream=True
        ),
        "d24_dit": MMDiTModelArgs(
            dim=1536, n_layers=24, n_heads=24, position_grid=16, single_stream=True
        ),
    },
)


def get_train_spec() -> TrainSpec:
    """Say how TorchTitan trains an MMDiT."""
    return TrainSpec(
        model_cls=MMDiTDenoiser,
        model_args=mmdit_args,
        parallelize_fn=parallelize_mmdit,
        pipelining_fn=None,
        build_optimizers_fn=build_tower_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_prompt_dataloader,
        build_tokenizer_fn=None,
        build_loss_fn=build_denoising_loss,
        build_validator_fn=build_denoising_validator,
        build_metrics_processor_fn=build_metrics_processor,
    )
