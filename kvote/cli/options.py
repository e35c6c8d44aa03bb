"""Options of generation, as they stand on the command line and as generate() takes them."""

import argparse
from typing import Any

import torch

from kvote.answering import COMPLETING, TALKING
from kvote.errors import InputError

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of ``Document.ask``. Sets the seed. Raises InputError for what generate() would refuse."""
    given = {name: value for name in _NAMES if (value := getattr(args, name, None)) is not None}
    for name in ("top_p", "min_p"):
        if given.get(name, 0) > 1:
            raise InputError(f"--{name.replace('_', '-')} is a probability, at most 1; got {given[name]:g}.")
    if given.get("repetition_penalty") == 0:
        raise InputError("--repetition-penalty must be above 0; 1 changes nothing.")
    if args.stop:
        if "" in args.stop:
            raise InputError("--stop takes a text that ends the answer; got an empty one.")
        given["stop_strings"] = args.stop
    if args.max_new_tokens is not None:
        given["max_new_tokens"] = args.max_new_tokens
    if args.seed is not None:
        if args.seed >= 2**63:
            raise InputError(f"--seed is below 2^63; got {args.seed}.")
        torch.manual_seed(args.seed)
    return given


def most_tokens(args: argparse.Namespace, templated: bool) -> int:
    """New tokens of an answer at most."""
    return args.max_new_tokens or (TALKING if templated else COMPLETING)
