"""TidalDecode: position persistent sparse attention (Yang et al., ICLR 2025, arXiv 2410.05076)."""

from kvote.method import Method, published
from kvote.read.persistent import PersistentPositions


@published(rooms="read", source="Yang et al. 2024, arXiv 2410.05076")
def tidaldecode(top_k: int = 256, first: int = 2, reselect: int | None = None) -> Method:
    """Generated tokens choose what to read in two layers, and all other layers read the same; keeps everything.

    Layers up to ``first`` (counted from 0) and the ``reselect`` layer attend to everything. ``first`` and ``reselect``
    also choose, for every query head, the ``top_k`` tokens with the largest logits; the layers after each read just
    those, head by head, at their own positions. Nothing else is read: no sinks, no recent tokens, and the query's own
    only if it is among them. Nothing is carried from one step to the next.

    ``reselect``: the layer that chooses anew (``correction_layer`` in the published code). None takes layer 13 of 32,
    as published for Llama 3 8B, and as deep in other models, at least ``first`` + 2; none where no layer would come
    after it. 0 is for none. The best one depends on the model's family. Of hybrid models, only layers with full
    attention are counted, and only they share tokens.

    Prompts, further turns and drafts of assisted decoding (any pass of several tokens, and any that ``Cache.expect``
    announced) are read whole. The published code treats a later turn like generated tokens, with a mask. It is a
    simulation; here other tokens are not touched.

    Missing: the paper's correction of the cache, which from time to time makes the keys and values of generated tokens
    anew with full attention, since those of sparse steps drift. It takes a pass of the whole model, so it is the
    caller's: ``cache.crop(-n)``, and the last n tokens once more in one pass, which reads everything. The published GPU
    kernels always read the newest token besides; here, as in the published model code, it has to win.
    """
    return Method(read=PersistentPositions(top_k, first, reselect))
