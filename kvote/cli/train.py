"""``kvote train-embedded``: the recipe of the embedded model."""

import argparse
import inspect

from kvote.errors import InputError


def run(args: argparse.Namespace) -> None:
    """Trains, or goes on training, and says where the model is."""
    from kvote.models.train import train

    given = {name: value for name, value in vars(args).items() if name in inspect.signature(train).parameters}
    try:
        out = train(**given)
    except (ValueError, OSError) as error:
        raise InputError(f"Cannot train into {args.out_dir}: {error}") from error
    print(out)
