"""KIVI: a tuning-free asymmetric 2-bit quantisation of the KV cache (Liu et al., ICML 2024, arXiv 2402.02750)."""

from kvote.errors import MethodError
from kvote.kernels.packing import GROUP_SIZES
from kvote.method import Method, published
from kvote.store.quantised import Quantised

_BITS = (2, 4)


@published(rooms="store", source="Liu et al. 2024, arXiv 2402.02750")
def kivi(bits: int = 2, group: int = 32, residual: int = 128) -> Method:
    """Holds keys and values in 2 or 4 bits, and the most recent tokens as they are; reads all of them.

    A number becomes the nearest of 2^``bits`` equal steps between the minimum and the maximum of its group, which are
    kept beside the codes in the model's dtype: with 16 bits a number costs ``bits`` + 32 / ``group`` bits (3.0 with the
    defaults). Keys, whose large numbers stay in the same few channels, form groups of ``group`` consecutive tokens
    of one channel; values form groups of ``group`` consecutive channels of one token. Of n tokens, the values of the
    last ``residual`` and the keys of the last n mod ``residual`` are not packed. A prompt reads itself unpacked, so its
    logits are exact; each token is packed once. The authors advise 4 bits for models whose query heads share keys.

    Missing: 8 bits, which the published packer knows but its kernels do not; the fused GPU kernels of the paper (those
    of kvote are others). Where this differs from the published code: a group whose numbers are all the same decodes to
    that number (there it divides by zero); the last group of channels may be shorter; padding is never part of a group;
    the codes are read in place by queries of any number of heads; and up to ``residual`` packed keys are held unpacked
    too, as they decode, until their values are packed, in pages of 64 tokens. A prompt announced with ``Cache.expect``
    stays unpacked until its last pass, in all layers at once. Without an announcement every pass is a prompt: the next
    one reads codes, as turns of a conversation do.

    A rollback (``crop``) always works. Where it cuts a group of packed keys, what is left of the group is unpacked and
    packed again with the tokens that come then, a second rounding that the published code, which cannot roll back, does
    not know. Dropping tokens does the same from the first token on that moves. A reader that places tokens anew
    (``kivi() | tokenselect()``) has keys packed before their rotation instead of after it, votes with the codes and
    unpacks what it reads.
    """
    if bits not in _BITS:
        raise MethodError(f"kivi: bits must be 2 or 4; got {bits!r}.")
    if group not in GROUP_SIZES:
        raise MethodError(
            f"kivi: group must be {', '.join(map(str, GROUP_SIZES[:-1]))} or {GROUP_SIZES[-1]}; got {group!r}."
        )
    if not isinstance(residual, int) or residual < 1 or residual % group:
        raise MethodError(f"kivi: residual must be a multiple of the group of {group} tokens; got {residual!r}.")
    return Method(store=Quantised(bits, group, residual))
