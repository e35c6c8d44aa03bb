"""Memory of a long prefill: the most that the process grows while a document goes through the embedded model.

python bench/memory.py --tokens 131072
"""

import argparse
import resource
from pathlib import Path

from common import load_embedded, save

import kvote
from kvote.models import world
from kvote.models.presets import preset


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--method", default="tokenselect")
    options = parser.parse_args()
    model, tokenizer = load_embedded()
    warm = world.sample("needle", 2048, seed=1)
    kvote.Document(model, tokenizer, warm.document, preset(options.method))
    sample = world.sample("needle", options.tokens, seed=7)
    before = resident()
    document = kvote.Document(model, tokenizer, sample.document, preset(options.method))
    after, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer = document.ask(sample.questions[0].prompt, max_new_tokens=4)
    result = {
        "tokens": options.tokens,
        "method": document.cache.method.spec,
        "kv_bytes": document.cache.nbytes(),
        "growth_bytes": after - before,
        "peak_over_baseline_bytes": peak - before,
        "prefill_seconds": document.prefill_seconds,
        "right": answer.text == sample.questions[0].answer,
    }
    print(result)
    save(f"memory-{options.tokens}", result)


if __name__ == "__main__":
    main()
