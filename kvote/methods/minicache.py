"""MiniCache: KV Cache Compression in Depth Dimension for LLMs (Liu et al., NeurIPS 2024, arXiv 2405.14366)."""

from kvote.method import Method, published
from kvote.store.merged import MergedPairs


@published(rooms="store", source="Liu et al. 2024, arXiv 2405.14366")
def minicache(start: float = 0.5, t: float = 0.6, gamma: float = 0.05) -> Method:
    """Holds a prompt in pairs of layers: of each token one direction for both, and a magnitude for each.

    Layers below ``start`` (a share of them) stay as they are; from there on, neighbours form pairs. When a prompt has
    gone through the second layer of a pair, and has been answered exactly, keys and values of a token are split, per
    key head, into length and direction. Both directions are replaced by the one at ``t`` of the way from the first
    layer's to the second's, along the sphere (SLERP); lengths stay, in float32. Tokens whose directions are farthest
    apart stay in both layers as they were: those whose angle lies in the upper ``gamma`` of the range of angles of
    their head, keys and values each by themselves (a share of the range, not of the tokens: few, or many).
    A pair holds 1/2 + 2/(head size in float16) of its bytes, and what is retained; the cache, 3/4 or a little more.

    Differs from the paper: what is generated, and further turns, stay whole (there, each new token is merged as soon as
    the second layer has it); so does a last layer without a partner, and a pair whose layers differ in shape. Angles
    and their range are those of single key heads, which the paper leaves open. Layers are counted among those that
    kvote manages. No range, because all angles are equal: nothing is retained. Merged keys are read back at full size
    for every step, so this saves memory, not time. Rolled back into its prompt, a sequence stays merged. Keepers that
    let layers or heads hold different tokens are refused. Read were the paper's abstract and project page; the rule of
    retention is from a summary of it, and the published repository has no code.

    Missing: the shared direction in 4 bits, with which the paper gets its 5 times; merging layers of three and more.
    """
    return Method(store=MergedPairs(start, t, gamma))
