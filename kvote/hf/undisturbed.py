"""Running a model without leaving a trace in it: what a trial finds it leaves as it was."""

import contextlib
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

# Hooks of these packages are part of how a model runs; all others belong to the user, and do not see a trial.
_RUNNING = ("accelerate.", "transformers.", "torch.distributed.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Larger buffers are weights of quantised layers, which no pass changes.
_LARGEST_BUFFER = 1 << 20


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no compilation inside; afterwards modes, hooks, buffers, plain attributes and
    the global random state of torch are as before."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    hooks = [{name: getattr(module, name) for name in _HOOKS} for module in modules]
    states = [_state(module) for module in modules]
    verbosity = transformers.logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_gpus(model)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        try:
            for module, own in zip(modules, hooks, strict=True):
                module.training = False
                for name, registered in own.items():
                    if registered:
                        module.__dict__[name] = OrderedDict(
                            (key, hook) for key, hook in registered.items() if _is_running(hook)
                        )
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)
            for module, mode, own, state in zip(modules, modes, hooks, states, strict=True):
                module.training = mode
                module.__dict__.update(own)
                _restore(state)


def _is_running(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_RUNNING)


def _gpus(model: torch.nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _state(module: torch.nn.Module) -> list[tuple[dict[str, Any], str, Any, Tensor | None]]:
    """The place of each plain value and of each tensor that is no weight, with a copy of small tensors."""
    places = itertools.chain(
        ((module._buffers, name) for name in module._buffers),
        ((module.__dict__, name) for name, value in vars(module).items() if _is_plain(name, value)),
    )
    return [(place, name, place[name], _copy(place[name])) for place, name in places]


def _is_plain(name: str, value: Any) -> bool:
    return name != "training" and isinstance(value, int | float | str | tuple | Tensor | None)


def _copy(value: Any) -> Tensor | None:
    small = isinstance(value, Tensor) and not value.is_meta and value.numel() <= _LARGEST_BUFFER
    return value.detach().clone() if small else None


def _restore(state: list[tuple[dict[str, Any], str, Any, Tensor | None]]) -> None:
    for place, name, value, held in state:
        place[name] = value
        if held is not None and not torch.equal(value, held):
            value.detach().copy_(held)
