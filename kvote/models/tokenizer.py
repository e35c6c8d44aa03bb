"""The world's tokenizer: one word, one token, in plain Hugging Face files."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvote.models import world

PAD, BOS, EOT, UNK = world.SPECIALS


def build() -> PreTrainedTokenizerFast:
    """A tokenizer with the ids of ``world.WORDS``; it puts ``<s>`` first, and pads on the left."""
    core = Tokenizer(models.WordLevel(world.ID, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,:;?=]"), behavior="isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, world.BOS)]
    )
    # WordPiece puts a space before every word (no word starts with its prefix); then punctuation loses it again.
    glue = [decoders.Replace(f" {mark}", mark) for mark in world.GLUED]
    core.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), *glue])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOT,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2**30,
    )


def save(directory: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the latter with the class name every release knows."""
    build().save_pretrained(directory)
    path = Path(directory) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")
