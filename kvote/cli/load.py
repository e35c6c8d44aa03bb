"""The model that answers, from a hub name or a folder."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvote.cli.place import place_of, rounding
from kvote.cli.source import source_of
from kvote.cli.weights import misfit, not_floating
from kvote.errors import InputError
from kvote.models import embedded
from kvote.models.presets import fitted, with_presets

# Its weights are stored in bfloat16, which is slow on CPUs without instructions for it.
_EMBEDDED_DTYPE = torch.float32
_SAFE = {"trust_remote_code": False}
_LARGEST = {
    "num_hidden_layers": 10**4,
    "num_local_experts": 10**5,
    "num_experts": 10**5,
    "head_dim": 10**5,
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
}
_NO_TOKENIZER = "there is no tokenizer that transformers can read; add its tokenizer.json"
# Beginnings of what transformers says in paragraphs, in a clause.
_SHORT = {
    "Couldn't instantiate the backend tokenizer": _NO_TOKENIZER,
    "Unrecognized configuration class": "it is not a decoder-only language model",
}
# What says little without the kind of the error.
_TERSE = (KeyError, IndexError, AttributeError, TypeError, AssertionError, ZeroDivisionError)
_LONGEST = 400


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer. ``trained`` is the longest text it was made for, None where its config is silent."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_embedded: bool

    @property
    def trained(self) -> int | None:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    def spec(self, method: str) -> str:
        """``method`` with parameters that fit the trained length where it has none of its own."""
        return with_presets(method) if self.is_embedded else fitted(method, self.trained)

    def ids(self, text: str) -> list[int]:
        """Tokens of ``text``. Raises InputError for those that the model has no embedding of."""
        try:
            ids: list[int] = self.tokenizer(text).input_ids
        except Exception as error:
            raise InputError(f"The tokenizer of {self.name!r} cannot read this: {sentence(error)}") from error
        known = self.model.get_input_embeddings().weight.shape[0]
        if ids and max(ids) >= known:
            raise InputError(
                f"The tokenizer of {self.name!r} is another model's: it gives token {max(ids):,}, and this model knows "
                f"{known:,}."
            )
        return ids


def load(name: str | None, *, dtype: str | None = None, device: str = "cpu", load_in: str | None = None) -> Loaded:
    """Loads weights in safetensors or GGUF, and never runs code that comes with a model.

    Raises InputError where that fails.
    """
    place = place_of(device)
    is_embedded = names_embedded(name)
    source, gguf = (embedded(), None) if is_embedded else source_of(str(name))
    told = source if gguf is None else os.path.join(source, gguf)
    file = {} if gguf is None else {"gguf_file": gguf}
    kind: Any = dtype or (_EMBEDDED_DTYPE if is_embedded else "auto")
    rounded = rounding(load_in, place, is_gguf=gguf is not None)
    with quiet(bars=not is_embedded):
        try:
            config = AutoConfig.from_pretrained(source, **file, **_SAFE)
            _check_sizes(config)
            tokenizer = AutoTokenizer.from_pretrained(source, **file, **_SAFE)
            with _without_bars() if gguf else nullcontext():
                model, report = _model(source, config, kind, place, file | rounded)
        except Exception as error:
            # Files of others can break transformers anywhere.
            raise InputError(f"Cannot load a model from {told!r}: {sentence(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"Cannot load a model from {told!r}: {_NO_TOKENIZER}.")
    # A quantisation that transformers does not know is skipped without a quantiser.
    quantised = gguf is not None or getattr(model, "hf_quantizer", None) is not None
    why = None if quantised else not_floating(source)
    if why := misfit(model, report) or why:
        raise InputError(f"The weights in {told!r} are not those of its config: {why}.")
    return Loaded("embedded" if is_embedded else told, model.eval(), tokenizer, is_embedded)


def names_embedded(name: str | None) -> bool:
    """Whether it is the embedded model that is asked for."""
    try:
        return name is None or os.path.samefile(os.path.expanduser(name), embedded())
    except (OSError, ValueError):
        return False


def _check_sizes(config: PreTrainedConfig) -> None:
    """A model of absurd sizes would be built for hours, or until memory runs out."""
    text = config.get_text_config(decoder=True)
    for name, most in _LARGEST.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and value > most:
            raise ValueError(f"its config asks for {name} {value:,}, and no model has more than {most:,}")


def _model(
    source: str, config: PreTrainedConfig, dtype: Any, device: torch.device, more: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    model, report = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        # Weights of another shape are named in the report, where transformers would only say that there are some.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **more,
        **_SAFE,
    )
    return model if device.type == "cpu" else model.to(device), report


@contextmanager
def quiet(*, bars: bool) -> Iterator[None]:
    """Silences transformers' warnings while a model loads: each is either refused here or of no consequence."""
    transformers.logging.set_verbosity_error()
    if bars and sys.stderr is not None and sys.stderr.isatty():
        transformers.logging.enable_progress_bar()
    else:
        transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _without_bars() -> Iterator[None]:
    """Bars that no setting of transformers turns off are shown where somebody looks."""
    if sys.stderr is not None and sys.stderr.isatty():
        yield
        return
    with redirect_stderr(StringIO()):
        yield


def sentence(error: Exception) -> str:
    """The first line of what it says, and the next where that only introduces it."""
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    said = next((short for long, short in _SHORT.items() if said.startswith(long)), said)
    if not said or isinstance(error, _TERSE):
        said = f"its files make no sense to transformers ({type(error).__name__}: {said})".replace(": )", ")")
    return said if len(said) <= _LONGEST else said[:_LONGEST].rstrip() + " …"
