"""A checkpoint for images of another size, out of one whose weights depend on the size.

Token mixers have a weight for every pair of positions, vision transformers a vector for each; a
model of another resolution starts from them resized. The result holds weights only, to be loaded
with `checkpoint.initial_load_path`.
"""

from __future__ import annotations

import copy
from pathlib import Path

from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.checkpoint_writing import check_out, write_weights


def resize_checkpoint(source: Path, image_size: int, out: Path, *, averaged: bool = True) -> Path:
    """Write a checkpoint of the same model for images of another size.

    Args:
        source: A run's folder, its checkpoints, or one of them.
        image_size: What `multimodal.image_size` is to be.
        out: A new or empty folder.
        averaged: Take the average of the parameters if the checkpoint has one.

    Returns:
        The checkpoint, `out`.

    Raises:
        ValueError: The model's weights do not depend on the size of images, the size does not fit
            the model, or `out` is not empty.
    """
    check_out(out)
    loaded = load_model(source, averaged=averaged)
    model_cls = get_train_spec(loaded.job_config.model.name).model_cls
    resize = getattr(model_cls, "resize_state_dict", None)
    if resize is None:
        raise ValueError(
            f"{loaded.path}: weights of {loaded.job_config.model.name} do not depend on the size "
            "of images; load the checkpoint as it is."
        )
    args = copy.deepcopy(loaded.model_args)
    args.image_size = image_size
    args.check()
    state = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    state = resize(state, loaded.model_args, args)
    job_config = copy.deepcopy(loaded.job_config)
    job_config.multimodal.image_size = image_size
    write_weights(out, job_config, args, state)
    return out
