"""xKV: Cross-Layer SVD for KV-Cache Compression (Chang et al. 2025, arXiv 2503.18893)."""

from kvote.method import Method, published
from kvote.store.low_rank import SharedLowRank


@published(rooms="store", source="Chang et al. 2025, arXiv 2503.18893", needs="rotary positions")
def xkv(group: int = 4, key_rank: int | float = 0.125, value_rank: int | float = 0.1875) -> Method:
    """Holds a prompt as one basis over its tokens that a group of layers shares, and a block of channels per layer.

    Keys before rotation, and values, of ``group`` neighbouring layers stand side by side and are replaced by their best
    approximation of rank ``key_rank`` and ``value_rank`` (a share of the group's channels such as 0.125, or a number),
    computed per sequence when the prompt has gone through the last layer of the group; the prompt itself is answered
    exactly. What is generated stays whole. Tokens times rank plus rank times channels are held: of a long prompt, 8
    times less for the keys and 5.3 times less for the values. The shares are the paper's ranks for Llama-3.1-8B, 512
    and 768 of 4,096 channels in a group of 4 layers.

    It is read in factored form: values are never made where few queries read, keys are made and rotated some thousands
    at a time. With 32 query heads there that is 67 times the multiplications of dense attention, so this saves memory,
    not time; with a reader that selects (``tokenselect``), votes meet the basis and only the winners' keys are made.

    A prompt for which the factors would not be smaller stays whole, until the end of a later turn has enough tokens;
    with ranks as shares, also one that they would not halve (the published code takes any). What comes after a prompt
    that was encoded, further turns too, stays whole (the published code would encode all anew, and writes reconstructed
    tokens back). Groups are counted among the layers that kvote manages; the last may be smaller. Rolled back into its
    prompt, a sequence stays approximated as it is. Keepers that let layers or heads hold different tokens are refused.
    Singular vectors come from a Gram matrix in float32, the same in every run (published: a full singular value
    decomposition).

    Missing: models that cache latents (MLA), whose latents the paper compresses; a choice of the layers that are
    grouped (all are); the later version that aligns singular vectors (which was not read); fused kernels, which the
    published code lacks, too: it writes whole keys and values back, and saves nothing.
    """
    return Method(store=SharedLowRank(group, key_rank, value_rank))
