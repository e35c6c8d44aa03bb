"""What a folder of results says about itself."""

import datetime
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvote import __version__
from kvote.env import environment
from kvote.eval import prose
from kvote.eval.folder import FORMAT
from kvote.eval.plan import Plan
from kvote.eval.subject import Subject, model_digest, tokenizer_digest

# When questions are asked, without ``question_first`` and with it.
WAYS = ("after the document was read", "in one prompt with the document, which is read anew for each")
_GIT_SECONDS = 10


def manifest_of(plan: Plan, subject: Subject, workers: int) -> dict[str, Any]:
    """What must be equal in all runs of a folder, and under ``run`` what this one is."""
    found = environment()
    config = subject.model.config.get_text_config(decoder=True)
    return {
        "format": FORMAT,
        "model": Path(subject.name).name,
        "model_sha256": model_digest(subject.model),
        "tokenizer_sha256": tokenizer_digest(subject.tokenizer),
        "trained_tokens": getattr(config, "max_position_embeddings", None),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "template": asdict(subject.template),
        "stop_ids": sorted(subject.stops),
        "asked": WAYS[plan.question_first],
        "text_sha256": prose.digest(),
        "seed": plan.seed,
        "run": {
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "kvote": __version__,
            "commit": commit(),
            "versions": {**found.versions, "python": sys.version.split()[0]},
            "platform": found.platform,
            "cpu": found.cpu,
            "threads": torch.get_num_threads(),
            "device": str(subject.model.device),
            "workers": workers,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(plan).items()},
            "files": {name: task.sha256 for name, task in plan.file_tasks().items()},
            "chosen": {
                name: sum(len(held) for each, _, held in plan.chosen if each == name) for name, *_ in plan.chosen
            },
        },
    }


def commit() -> str | None:
    """The commit of the source tree that kvote runs from, marked if files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    said = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        said.append(done.stdout.strip())
    return f"{said[0]}{'+changes' if said[1] else ''}"
