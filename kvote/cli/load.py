"""The model that answers, from a hub name or a folder, and whether a document fits into memory beside it."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvote.document import TOKENS_PER_PASS
from kvote.env import memory
from kvote.errors import InputError
from kvote.method import Method
from kvote.models import embedded
from kvote.peak import peak_bytes, shape_of

# Its weights are stored in bfloat16, which is slow on CPUs without instructions for it.
_EMBEDDED_DTYPE = torch.float32


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


def load(name: str | None) -> Loaded:
    """Loads safetensors weights and never runs code that comes with a model. Raises InputError where that fails."""
    is_embedded = name is None or Path(name).resolve() == Path(embedded()).resolve()
    source = embedded() if is_embedded else str(name)
    _quiet(bars=not is_embedded)
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise InputError(f"There is no model folder {source}.")
    source = str(Path(source).expanduser()) if source.startswith("~") else source
    safe = {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        dtype = _EMBEDDED_DTYPE if is_embedded else "auto"
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **safe)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"Cannot load a model from {source!r}: {reason}") from error
    return Loaded("embedded" if is_embedded else source, model.eval(), tokenizer, is_embedded)


def _quiet(*, bars: bool) -> None:
    transformers.logging.set_verbosity_error()
    if bars:
        transformers.logging.enable_progress_bar()
    else:
        transformers.logging.disable_progress_bar()


def check_memory(loaded: Loaded, method: Method, tokens: int) -> None:
    """Raises InputError if the keys and values of ``tokens`` tokens cannot fit into the memory that is free."""
    shape = shape_of(loaded.model)
    needed = 0 if shape is None else peak_bytes(method, shape, tokens, tokens_per_pass=TOKENS_PER_PASS)
    free = memory()[1]
    if loaded.model.device.type == "cpu" and free and needed > free:
        gib = 2**30
        raise InputError(
            f"The document's {tokens:,} tokens need {needed / gib:,.1f} GiB for keys and values with {method.spec}, "
            f"and {free / gib:,.1f} GiB are free; give fewer tokens or a method that drops some, such as streamingllm."
        )
