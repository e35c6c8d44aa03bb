"""MInference: pre-filling with dynamic sparse attention (Jiang et al., NeurIPS 2024, arXiv 2407.02490)."""

from kvote.calibration.file import Calibration
from kvote.calibration.file import load as load_calibration
from kvote.calibration.patterns import KIND, patterns_of
from kvote.errors import MethodError
from kvote.method import Method, published
from kvote.read.patterns import SIZES, Pattern
from kvote.read.prompt_patterns import PromptPatterns


@published(rooms="read", source="Jiang et al. 2024, arXiv 2407.02490")
def minference(
    patterns: str | Calibration | None = None,
    pattern: str = "vertical_slash",
    vertical: int = 1000,
    slash: int = 6096,
    sinks: int = 100,
    local: int = 800,
    blocks: int = 100,
    last: int = 64,
    first: int = 30,
    nearest: int = 100,
    block: int = 64,
) -> Method:
    """Prompts are read in patterns of columns, diagonals, windows or blocks; generated tokens read everything.

    Joined with another reader (``minference | quest``), it reads the prompts and the other one what is generated.
    Keeps everything, so it saves work in prompts and no memory.

    ``patterns``: file that `kvote calibrate --what patterns` wrote for this model, or what it holds: the pattern of
    each query head with its sizes. ``pattern``: that of all heads without it, and of layers that it does not have.
    'vertical_slash': the ``vertical`` columns and ``slash`` diagonals with the largest sums of softmax weights of the
    ``last`` queries of a pass, among them the ``first`` columns and the ``nearest`` diagonals. 'a_shape': ``sinks``
    first tokens and the last ``local``. 'block_sparse': the ``blocks`` blocks of ``block`` tokens, its own among them,
    whose mean key has the largest product with the mean query of the block. The ``block`` rows of a block read alike: a
    diagonal is a square of tokens for them, and their own block is read whole. Prompts that the sizes cover are read
    whole, with the defaults those up to 6,096 tokens.

    Differs from the published code: query heads of a layer read equally many tokens in a block of rows; a head whose
    pattern has fewer is filled up with its next best columns or blocks, or a longer window, so where patterns are
    mixed small ones cost what the largest do. Its own block is always one of a head's blocks. A model's own scale and
    soft cap take the place of 1 / sqrt(d). A prompt in several passes is judged by the last queries of each pass, where
    the code knows only prompts in one; so how it is cut matters, but for 'a_shape'. Columns and diagonals count the
    tokens that are held. Drafts of assisted decoding read as generated tokens do, and so do the last tokens of a prompt
    if the reader joined treats them one by one (tokenselect's ``tail``).

    Readers that must have read a prompt themselves (infllm, actqkv, sentencekv, streamingllm) are refused beside it.

    Missing: the published GPU kernels; tokens are gathered head by head, so the work saved is not the time saved, which
    has not been measured. Patterns published for models, in their own files.
    """
    if pattern not in SIZES:
        raise MethodError(f"pattern must be {', '.join(map(repr, SIZES))}; got {pattern!r}.")
    if patterns is not None and not isinstance(patterns, str | Calibration):
        raise MethodError(f"patterns must be the name of a file; got {patterns!r}.")
    given = {"vertical": vertical, "slash": slash, "sinks": sinks, "local": local, "blocks": blocks}
    default = Pattern(pattern, tuple(given[name] for name in SIZES[pattern]))
    calibration = load_calibration(patterns, KIND) if isinstance(patterns, str) else patterns
    own = {} if calibration is None else patterns_of(calibration)
    reader = PromptPatterns(default, own, last, first, nearest, block)
    return Method(read=reader, calibrations=() if calibration is None else (calibration,))
