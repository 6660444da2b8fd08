"""Checkpoints on torch.distributed.checkpoint: atomic, verified when read, written by any layout of ranks and read by any other.

A checkpoint is a folder ``step_00000100`` with the tensors (``state/``), ``model_config.json``, ``trainer.json`` (step, data position)
and ``manifest.json``, which lists every other file with its size. It is written under another name and renamed when complete, so a
folder of this name is whole; the manifest catches what a bad copy did to it afterwards. Ranks share the folder's file system.

State is a nested dictionary of tensors; a rank that has a part of a whole tensor gives a
:class:`~megatron_m2.parallel.box.Box`, and what each rank has for itself (the state of its random numbers) is a :class:`PerRank`.
What several ranks have is written once. No rank ever holds a whole tensor of which it has a part.
"""

from megatron_m2.training.checkpoint.folder import CheckpointError, checkpoints, read_config, remove_unfinished, resolve, verify
from megatron_m2.training.checkpoint.reading import export_hf, load, load_model, newest
from megatron_m2.training.checkpoint.tensors import PerRank
from megatron_m2.training.checkpoint.writing import Saver, save, save_model

__all__ = ["CheckpointError", "PerRank", "Saver", "checkpoints", "export_hf", "load", "load_model", "newest", "read_config",
           "remove_unfinished", "resolve", "save", "save_model", "verify"]
