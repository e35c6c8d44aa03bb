"""``kvote train-embedded``: the recipe of the embedded model."""

import argparse
import inspect

from kvote.cli.plain import one_line
from kvote.errors import InputError
from kvote.files import check_folder


def run(args: argparse.Namespace) -> None:
    """Trains, or goes on training, and says where the model is."""
    from safetensors import SafetensorError

    from kvote.models.train import train

    given = {name: value for name, value in vars(args).items() if name in inspect.signature(train).parameters}
    # Where the model cannot be written is found out before it is trained.
    check_folder(args.out_dir)
    if "checkpoints" in given:
        check_folder(given["checkpoints"])
    try:
        out = train(**given)
    except (ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"Cannot train into {args.out_dir}: {error}") from error
    print(one_line(str(out)))
