"""StreamingLLM: Efficient Streaming Language Models with Attention Sinks (Xiao et al., ICLR 2024, arXiv 2309.17453)."""

from kvote.errors import MethodError
from kvote.keep.evict import sinks_and_recent
from kvote.method import Method, published
from kvote.read.recent import SinksAndRecent


@published(rooms="keep, read", source="Xiao et al. 2023, arXiv 2309.17453", needs="rotary positions")
def streamingllm(sinks: int = 4, window: int = 1020, burst: int | None = None) -> Method:
    """Keeps the first tokens and a sliding window, at positions within the cache.

    ``sinks`` first tokens of the text and ``window`` last ones, the query's own token among them; together the
    model's trained length in the paper (4 + 1020, 4 + 2044, 4 + 4092). What leaves the window is gone: a fact in the
    middle of a long text cannot be answered. Every query reads its own window, also inside a long prompt, as if the
    text had been fed one token at a time (the paper's evaluation; its demonstration reads a prompt in full). Missing:
    models with ALiBi, and a sink token that was trained for it.

    ``burst``: once a generated token exceeds the window, so many leave it at once (64 at most): what stays is moved
    once in so many steps, and the window of generated tokens is up to ``burst`` - 1 tokens shorter in between. None is
    a 64th of the window, which below 128 tokens is one per step, as in the paper; 1 is that for any window.
    """
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (sinks, window))
    if not whole or sinks < 0 or window < 1:
        raise MethodError(
            f"streamingllm needs whole numbers sinks >= 0 and window >= 1; got sinks={sinks}, window={window}."
        )
    return Method(keep=sinks_and_recent(sinks, window, burst), read=SinksAndRecent(sinks, window))
