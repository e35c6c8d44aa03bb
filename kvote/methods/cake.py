"""CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences (Qin et al., ICLR 2025, arXiv 2503.12491)."""

from kvote.keep.allocate.cascade import Cascade
from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.dispersion import Dispersion
from kvote.method import Method, published


@published(rooms="keep", source="Qin et al. 2025, arXiv 2503.12491")
def cake(
    budget: int | float | str = 1024,
    window: int = 32,
    gamma: float = 200.0,
    kernel: int = 5,
    tau1: float = 1.0,
    tau2: float = 1.0,
    per_head: bool = True,
    evict_generated: bool = True,
    burst: int | None = None,
) -> Method:
    """Gives layers whose attention is spread and shifts more of one budget, while the prompt goes through the layers.

    The last ``window`` queries of a prompt are looked at, without the columns of the window. A layer's preference is
    the entropy of their attention to the power of 1 / ``tau1``, times its variance from query to query, summed over
    tokens, to the power of 1 / ``tau2``. A token is worth the mean of the attention that they pay to it plus ``gamma``
    times its variance, averaged over the heads of a key head and over ``kernel`` neighbours. After each layer, the
    layers so far divide the whole budget by their preferences, and each keeps its most worthy tokens and the window.
    Shares only shrink on the way: what is dropped does not come back. So a prompt in one pass never holds more than
    the budget of all layers, their windows and one layer's prompt.

    ``budget``: tokens per layer on average, windows included, as a number (1024), a fraction of the tokens seen when
    the prompt ended (0.25) or bytes for all layers ("512MiB"). ``evict_generated``: a generated token that makes a
    layer longer than its share lets it drop what that token looks at least (pooled, the window apart); with False,
    tokens are dropped with prompts only, and generated ones stay on top. ``per_head``: every key head keeps its own
    tokens; with False all keep the same, by the mean over heads, which readers such as ``tokenselect`` need.

    ``burst``: so many tokens go at once while generating (64 at most): what stays is moved once in so many steps, and a
    layer is up to ``burst`` - 1 tokens shorter than its share in between. None is a 64th of the share without the
    window, which below 128 tokens is one per step, as in the paper; 1 is that for any share. A burst changes which
    tokens stay, not only when they go: all of it are what the token at its end looks at least, where in the paper every
    step drops by its own token.

    Exponents that were published, (``tau1``, ``tau2``) for budgets of 1024 and of 128 tokens:

    ==================  ============  ============
    Llama-3.1-8B        (1.6, 0.4)    (1.6, 0.6)
    Llama-2-7B          (1.9, 1.8)    (0.9, 2.3)
    Llama-2-13B         (0.5, 0.4)    (1.8, 2.0)
    Mistral-7B-v0.3     (0.8, 0.5)    (1.0, 0.8)
    Qwen2.5-7B          (1.5, 0.6)    (0.4, 0.6)
    ==================  ============  ============

    A prompt that ``Cache.expect`` announced in several passes is cut down in its last pass: each layer as that pass
    goes through it, so that until then all layers hold all tokens. The end of every other pass counts as a prompt's
    end. Sequences of a batch have preferences and shares of their own (the published code adds them up). Attention
    stays in float32 (published: in the model's dtype). Tokens stay in the text's order, and the budget is kept as
    soon as a prompt exceeds it (published: exceeds it by a window). A turn shorter than the window votes with the
    queries it has; one query alone shows no variance, and then all layers count alike. Several tokens generated in
    one pass (drafts) are followed by one drop, by what the last of them looks at. ``tau1`` and ``tau2`` are 1 unless
    given, which is what the published code takes for a model that it does not know. Missing: its other order, in which
    all layers are cut down after the last (the result is the same where no layer had dropped more before).
    """
    score = Dispersion(
        window=window,
        gamma=gamma,
        kernel=kernel,
        tau1=tau1,
        tau2=tau2,
        generated=evict_generated,
        per_head=per_head,
    )
    limit, share = read_budget(budget), Cascade()
    return Method(keep=Evict(score, limit, window, evict_generated=evict_generated, burst=burst, allocate=share))
