"""What every bench script shares: the embedded model, the machine's name, tables, results on disk."""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from kvote.env import environment
from kvote.files import write_whole
from kvote.kernels import backend
from kvote.models import embedded

RESULTS = Path(__file__).parent / "results"


def load_embedded(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The embedded model, silent and in evaluation mode, and its tokenizer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(embedded(), dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(embedded())


def machine() -> dict[str, Any]:
    """Where the figures were measured."""
    found = environment()
    return {"cpu": found.cpu, "threads": found.threads, "backend": backend(), **found.versions}


def command() -> str:
    """The command line that reproduces this run."""
    return " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def save(name: str, result: dict[str, Any], by_record: bool = False) -> Path:
    """Writes ``results/name.json`` in one step, so that a stopped run leaves the last whole one; ``by_record``: each
    entry of a list in one line."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {"command": command(), "machine": machine(), **result}
    write_whole(path, lines_of(whole) if by_record else json.dumps(whole, indent=1) + "\n")
    return path


def lines_of(whole: dict[str, Any]) -> str:
    """JSON in which each entry of a list has a line."""

    def told(part: Any) -> str:
        if not isinstance(part, list) or not part:
            return json.dumps(part)
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in part) + "\n ]"

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {told(part)}" for name, part in whole.items()) + "\n}\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


class TokenClock(BaseStreamer):
    """Notes when ``generate()`` hands a token over; the first that it hands over is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def steps(self) -> list[float]:
        """Seconds of every token, the first with the prompt's handling."""
        return [after - before for before, after in pairwise(self.times)]
