"""SentenceKV: efficient LLM inference via sentence-level semantic KV caching (Zhu et al., COLM 2025)."""

from kvote.errors import MethodError
from kvote.keep.budget import Budget
from kvote.keep.evict import Evict
from kvote.keep.score.last_queries import LastQueries
from kvote.method import Method, published
from kvote.numbers import is_number
from kvote.read.best_sentences import BestSentences


@published(rooms="keep, read", source="Zhu et al. 2025, arXiv 2504.00970", needs="ids of tokens that end a sentence")
def sentencekv(
    ends: tuple[int, ...] = (),
    tokens: int = 1024,
    factor: float = 3.0,
    window: int = 32,
    kernel: int = 7,
    first: int = 32,
    last: int = 32,
    longest: int = 256,
) -> Method:
    """Keeps what a prompt's end looks at; generated tokens read the sentences of it that resemble their own sentence.

    Of a prompt, ``tokens`` times ``factor`` tokens stay, as in ``snapkv(pooling='max')``: by the votes of the last
    ``window`` queries, each query head's pooled over ``kernel`` neighbours. A sentence ends with a token of one of the
    ids ``ends``, which ``kvote.sentences.sentence_ends(tokenizer)`` finds, or with a prompt; what goes on for more than
    ``longest`` tokens is cut. In each key head the mean of the keys that it holds of a sentence, as the model rotated
    them, stands for it; a sentence of which it holds nothing has a mean of zero.

    Once a generated sentence has two tokens, the next of each query head read the ``first`` and ``last`` tokens held,
    and between them whole sentences, those first whose mean has the largest product with the mean of the queries of the
    generated sentence, until ``tokens`` are read; the last of these is cut. A generated sentence is among these once it
    has ended; before that only its last tokens are read. The token that ends a sentence and the first of the next read
    everything: count them, one or two a sentence, in any claim about what is read. So do prompts and further turns,
    and all while no more than ``tokens`` are held.

    Differs from the published code: heads that share keys vote together on what stays, so that keys are held once (the
    code repeats them for every query head first); tokens of a sentence can be chosen however long it is (the code
    forgets those behind a cap, and all of a long generated one). ``longest`` is kvote's. The code's ``factor`` is 2, 3
    or 5, by script. After a rollback to before the running sentence, that begins anew.

    Missing: sentences in host memory. All that is kept stays where the model's keys are.
    """
    read = BestSentences(ends, tokens, first, last, longest)
    if not is_number(factor) or factor < 1:
        raise MethodError(f"factor must be a number of at least 1; got {factor!r}.")
    score = LastQueries(window=window, kernel=kernel, pooling="max")
    return Method(keep=Evict(score, Budget(int(tokens * factor)), window, evict_generated=False), read=read)
