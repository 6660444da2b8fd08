#!/usr/bin/env python3
"""Converts a checkpoint: native or Hugging Face (bf16, fp32, block-FP8) to either.

    python tools/convert.py runs/quickstart export            # the newest checkpoint of a run, whatever layout wrote it
    python tools/convert.py MiniMax-M2 MiniMax-M2-bf16 --dtype bfloat16       # FP8 release to bf16, one shard in memory at a time
    python tools/convert.py MiniMax-M2 start --to native      # to train from
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

import megatron_m2
from megatron_m2.model.hf import convert_shards
from megatron_m2.training import checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Hugging Face folder, native checkpoint, or run folder (its newest checkpoint)")
    parser.add_argument("destination", type=Path, help="folder to make; it must not exist or be empty")
    parser.add_argument("--to", choices=("hf", "native"), default="hf", help="format to write (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES),
                        help="of the weights (default: as stored, bfloat16 for FP8); the router stays fp32")
    parser.add_argument("--fp8", action="store_true", help="attention projections and experts as block-FP8, as MiniMax releases them")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer goes into the export (a Hugging Face source brings its own)")
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="size of one shard, GiB (default: %(default)s)")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Does what the command line says.

    Raises:
        ValueError: options that exclude each other, a destination in use, or a checkpoint that cannot be read or written.
    """
    if not args.source.is_dir():
        raise ValueError(f"{args.source}: no such folder")
    if args.destination.exists() and not (args.destination.is_dir() and not any(args.destination.iterdir())):
        raise ValueError(f"{args.destination}: exists; give a new folder")
    if args.max_shard_gib <= 0:
        raise ValueError(f"--max-shard-gib {args.max_shard_gib}: must be above 0")
    if args.to == "native" and (args.fp8 or args.tokenizer):
        raise ValueError("--fp8 and --tokenizer: only for --to hf")
    dtype = DTYPES.get(args.dtype)
    shard_bytes = int(args.max_shard_gib * 2**30)
    if args.to == "native":
        checkpoint.save_model(megatron_m2.load(args.source, dtype=dtype), args.destination)
        return
    from_hf = (args.source / "config.json").is_file()
    write = convert_shards if from_hf else checkpoint.export_hf
    write(args.source, args.destination, args.tokenizer, dtype=dtype, fp8=args.fp8, max_shard_bytes=shard_bytes)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args(argv)
    try:
        convert(args)
    except ValueError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(args.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
