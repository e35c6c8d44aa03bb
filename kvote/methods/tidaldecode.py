"""TidalDecode: position persistent sparse attention (Yang et al., ICLR 2025, arXiv 2410.05076)."""

from kvote.method import Method, published
from kvote.read.persistent import PersistentPositions


@published(rooms="read", source="Yang et al. 2024, arXiv 2410.05076")
def tidaldecode(top_k: int = 256, first: int = 2, correction: int | None = None) -> Method:
    """Generated tokens choose what to read in two layers, and all other layers read the same; keeps everything.

    Layers up to ``first`` (counted from 0) and the ``correction`` layer attend to everything. ``first`` and
    ``correction`` also choose, for every query head, the ``top_k`` tokens with the largest logits; the layers after
    each read just those, head by head, at their own positions. Nothing else is read: no sinks, no recent tokens, and
    the query's own only if it is among them. Nothing is carried from one step to the next.

    ``correction``: None takes layer 13 of 32, as published for Llama 3 8B, and as deep in other models, at least
    ``first`` + 2; none where no layer would come after it. 0 is for none. The best one depends on the model's
    family. Of hybrid models, only layers with full attention are counted, and only they share tokens.

    Prompts, further turns and drafts of assisted decoding (any pass of several tokens, and any that ``Cache.expect``
    announced) are read whole. The published code treats a later turn like generated tokens, with a mask. It is a
    simulation; here other tokens are not touched.
    """
    return Method(read=PersistentPositions(top_k, first, correction))
