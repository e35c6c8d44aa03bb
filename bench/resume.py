"""A document that was read once: how much sooner does it answer from its file than when it is read again?

One run: for each method a document of the embedded model is read and asked, saved, and then loaded and asked again,
with the file in the system's page cache (warm) and without (cold; how much of the file was still cached is measured and
told). Every byte of the file is checked before the answer. The answers must be the same tokens.

    python bench/resume.py --tokens 65536 --rounds 3
"""

import argparse
import errno
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import load_embedded, save, table

from kvote import Document
from kvote.models import world
from kvote.models.presets import preset

METHODS = ("dense", "tokenselect", "kivi")
PAGE = 4096


def forget(path: Path) -> float:
    """Asks the system to let go of the file, and says which part of it is cached all the same."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        # Every 64th page is enough to tell.
        places = range(0, os.fstat(descriptor).st_size, 64 * PAGE)
        return sum(is_cached(descriptor, place) for place in places) / len(places)
    finally:
        os.close(descriptor)


def is_cached(descriptor: int, place: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) == 1
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return False
        raise


def first_answer(make: Any, question: str) -> tuple[float, list[int], Document]:
    """Seconds until the first token of the first answer, the answer, and the document."""
    begin = time.perf_counter()
    document = make()
    ready = time.perf_counter() - begin
    answer = document.ask(question, max_new_tokens=8)
    return ready + answer.first_token_seconds, answer.token_ids, document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the files lie (default: that of temporary files)")
    options = parser.parse_args()
    model, tokenizer = load_embedded()
    sample = world.sample("needle", options.tokens, seed=7)
    question = sample.questions[0].prompt
    rows, results = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in METHODS:
            path, spec = Path(folder) / f"{name}.kv", preset(name)
            Document(model, tokenizer, sample.document[:20_000], spec).ask(question, max_new_tokens=1)
            reading, tokens, document = first_answer(
                lambda spec=spec: Document(model, tokenizer, sample.document, spec), question
            )
            begin = time.perf_counter()
            document.save(path)
            saving = time.perf_counter() - begin
            del document
            warm, cold, cached, load = [], [], [], lambda path=path: Document.load(path, model, tokenizer)
            for _ in range(options.rounds):
                cached.append(forget(path))
                for times in (cold, warm):
                    seconds, again, _ = first_answer(load, question)
                    if again != tokens:
                        raise SystemExit(f"{name}: the loaded document answers otherwise: {again}, not {tokens}")
                    times.append(seconds)
            result = {
                "method": spec,
                "reading_s": reading,
                "save_s": saving,
                "file_mib": path.stat().st_size / 2**20,
                "cold_s": median(cold),
                "warm_s": median(warm),
                "cold_ratio": reading / median(cold),
                "warm_ratio": reading / median(warm),
                "still_cached": max(cached),
            }
            results.append({**result, "cold": cold, "warm": warm})
            rows.append([name, *(f"{cell:.2f}" for cell in list(result.values())[1:])])
    header = [
        "method",
        "reading s",
        "save s",
        "file MiB",
        "cold s",
        "warm s",
        "cold ratio",
        "warm ratio",
        "still cached",
    ]
    print(table(header, rows))
    save(f"resume-{options.tokens}", {"tokens": options.tokens, "rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()
