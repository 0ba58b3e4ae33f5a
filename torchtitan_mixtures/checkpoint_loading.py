"""Models out of checkpoints, for tools that use a model in one process: sample, evaluate.

A checkpoint's tensors lie in TorchTitan's DCP format, whose index file is a pickle. It is read here
by an unpickler that admits nothing but the index's own types, and tensors are read as weights only,
so a checkpoint from elsewhere cannot run code. (Resuming a run does not go this way: TorchTitan
reads its own files then.)
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as HostJobConfig
from torchtitan.protocols import BaseModelArgs, ModelProtocol
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures import checkpoint_config, expert_files
from torchtitan_mixtures.data.codecs import Codecs, build_codecs, tokenizer_fingerprints
from torchtitan_mixtures.ema import STATE
from torchtitan_mixtures.job_config import JobConfig, MixtureJobConfig
from torchtitan_mixtures.models import FAMILIES


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, in one process."""

    path: Path
    """Folder of the step."""

    step: int
    """Training step, -1 if the folder's name does not say."""

    model: ModelProtocol
    """In evaluation mode, float32."""

    model_args: Any
    job_config: MixtureJobConfig
    """That of the run."""

    is_averaged: bool
    """Whether its weights are the average of `[ema]`."""


@dataclass(frozen=True)
class LoadedCheckpoint(LoadedModel):
    """A trained model over tokens, and what it takes to talk to it."""

    codecs: Codecs
    """The tokenizers it was trained with."""


def find_checkpoint(folder: str | Path) -> Path:
    """Find the newest complete checkpoint of what may be a run, its checkpoints, or one of them.

    Args:
        folder: A run's `job.dump_folder`, its checkpoint folder, or the folder of one step; or a
            folder of experts, or of one, see `expert_files.py`.

    Raises:
        ValueError: There is none; names the folder and what is in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name a run's job.dump_folder or a checkpoint.")
    if (folder / checkpoint_config.METADATA).is_file():
        return folder
    if expert_files.is_single(folder) or expert_files.is_mixture(folder):
        return folder
    for candidate in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        latest = checkpoint_config.latest_checkpoint(candidate)
        if latest is not None:
            return latest
    if (folder / expert_files.EXPERTS).is_dir() and (folder / expert_files.CONFIG).is_file():
        raise ValueError(
            f"{folder}: the router of this folder of experts is missing ({expert_files.ROUTER}/"
            f"{expert_files.WEIGHTS}); put it back, or assemble the experts anew."
        )
    raise ValueError(
        f"{folder} holds no complete checkpoint (a folder step-N with {checkpoint_config.METADATA} "
        "in it); train with checkpoint.enable = true, or name another folder."
    )


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", *, averaged: bool = True
) -> LoadedModel:
    """Build the model of a checkpoint and load its weights.

    Args:
        folder: See `find_checkpoint`.
        device: Where the model is to be.
        averaged: Take the average of the parameters if the checkpoint has one.

    Raises:
        ValueError: No checkpoint, no `config.json`, of another version, or files missing or broken.
    """
    path = find_checkpoint(folder)
    saved = checkpoint_config.read(path)
    job_config, model_args = rebuild(path, saved)
    with torch.device("meta"):
        model = get_train_spec(saved["family"]).model_cls(model_args)
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device(device))  # buffers are not in checkpoints
    state = {name: parameter.data for name, parameter in model.named_parameters()}
    is_averaged = averaged and has_average(path)
    load_tensors(path, {f"{STATE}.{k}": v for k, v in state.items()} if is_averaged else state)
    step = path.name.removeprefix("step-")
    return LoadedModel(
        path=path,
        step=int(step) if step.isdigit() else -1,
        model=model.eval(),
        model_args=model_args,
        job_config=job_config,
        is_averaged=is_averaged,
    )


def load_checkpoint(folder: str | Path, device: torch.device | str = "cpu") -> LoadedCheckpoint:
    """Load a model over tokens with its tokenizers; see `load_model`.

    Raises:
        ValueError: As `load_model`, or a model of something else, or other tokenizers than its own.
    """
    path = find_checkpoint(folder)
    saved = checkpoint_config.read(path)
    job_config, model_args = rebuild(path, saved)
    if not hasattr(model_args, "modality_names"):
        raise ValueError(f"{path}: {saved['family']} is no model over tokens.")
    codecs = build_codecs(job_config)
    modalities = codecs.modalities
    ranges = saved.get("vocab_ranges")
    if ranges != {
        name: list(limits)
        for name, limits in zip(modalities.names, modalities.vocab_ranges, strict=True)
    }:
        raise ValueError(
            f"{path}: its vocabulary ranges are {ranges}, but the tokenizers of its "
            f"[multimodal] section now give {modalities.vocab_ranges}; restore the tokenizer files."
        )
    current = tokenizer_fingerprints(job_config.multimodal, modalities.names)
    for key, content in saved.get("tokenizers", {}).items():
        if content != current.get(key):
            raise ValueError(
                f"{path}: multimodal.{key} = {getattr(job_config.multimodal, key)!r} is not what "
                "the model was trained with: its content has changed. Restore the file."
            )
    return LoadedCheckpoint(**vars(load_model(path, device)), codecs=codecs)


def rebuild(path: Path, saved: dict[str, Any]) -> tuple[MixtureJobConfig, BaseModelArgs]:
    """Turn the tables of `config.json` into the objects they were written from."""
    family = saved.get("family")
    if family not in FAMILIES:
        raise ValueError(
            f"{path / checkpoint_config.FILE_NAME}: family = {family!r} is none of this version's "
            f"({', '.join(FAMILIES)})."
        )
    try:
        merged = ConfigManager._merge_configs(HostJobConfig, JobConfig)
        job_config = ConfigManager()._dict_to_dataclass(merged, saved["job_config"])
        args_class = type(next(iter(get_train_spec(family).model_args.values())))
        model_args = args_class(**saved["model_args"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path / checkpoint_config.FILE_NAME} does not fit this version: {error}"
        ) from None
    return cast(MixtureJobConfig, job_config), model_args


def has_average(path: Path) -> bool:
    """Say whether a checkpoint has an average of the parameters."""
    if _is_exchanged(path):
        return False
    index = _read_index(_WeightsReader(path), path)
    return any(name.startswith(f"{STATE}.") for name in index.state_dict_metadata)


def load_tensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Fill tensors with those of the same names in a checkpoint.

    Raises:
        ValueError: One is missing or of another shape, or files are missing or broken.
    """
    if _is_exchanged(path):
        _load_exchanged(path, state)
        return
    try:
        with warnings.catch_warnings():
            # One process is what is meant; DCP finds that worth a warning.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_state(state, storage_reader=_WeightsReader(path), no_dist=True)
    except (CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from error


def _is_exchanged(path: Path) -> bool:
    """Say whether a folder has safetensors in place of a checkpoint's files."""
    has_index = (path / checkpoint_config.METADATA).is_file()
    return not has_index and (expert_files.is_single(path) or expert_files.is_mixture(path))


def _load_exchanged(path: Path, state: dict[str, torch.Tensor]) -> None:
    """See `load_tensors`; of a folder that `expert_files.py` describes."""
    names, unrouted = (), ()
    if expert_files.is_mixture(path):
        # Imported late: it builds on this module.
        from torchtitan_mixtures.expert_folder import read_mixture

        mixture = read_mixture(path)
        names, unrouted = mixture.names, mixture.unrouted
    found = expert_files.read_state(path, names, unrouted)
    for name, tensor in state.items():
        shape = list(found[name].shape) if name in found else "absent"
        if shape != list(tensor.shape):
            raise ValueError(f"{path}: {name} is {shape}, the model has {list(tensor.shape)}.")
        tensor.copy_(found[name])


def _read_index(reader: FileSystemReader, path: Path) -> Metadata:
    try:
        return reader.read_metadata()
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> ValueError:
    cause = error
    if isinstance(error, CheckpointException) and error.failures:
        cause = next(iter(error.failures.values()))[0]
    reason = str(cause) or f"{type(cause).__name__}; was a file cut off?"
    return ValueError(f"{path}: its weights cannot be read: {reason}")


class _WeightsReader(FileSystemReader):
    """DCP's reader, for tensors only, with a harmless way of reading the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index; arguments as for DCP's reader, for which one process has no use."""
        with open(self._get_metadata_path(), "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{checkpoint_config.METADATA} is not a DCP index")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


_ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
}


class _IndexUnpickler(pickle.Unpickler):
    """Admits the types a DCP index consists of: records, sizes, dtypes, layouts and paths."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Look up a type by name; refuse any that an index has no use for."""
        is_dtype = module_name == "torch" and isinstance(
            getattr(torch, global_name, None), torch.dtype
        )
        if is_dtype or global_name in _ADMITTED.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(
            f"{checkpoint_config.METADATA} refers to {module_name}.{global_name}, which has no "
            "place in it"
        )
