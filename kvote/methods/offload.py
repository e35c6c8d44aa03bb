"""Offloading: the cache on a disk. No published system: what engines call a tier."""

from kvote.calibration.file import files_allowed
from kvote.errors import MethodError
from kvote.method import Method, published
from kvote.store.offloaded import Offloaded
from kvote.store.spill import check_folder


@published(rooms="store", source="none: a tier as serving engines have it")
def offload(folder: str | None = None, recent: int = 1024) -> Method:
    """Holds all but the most recent tokens in a file on a disk, as they are, and fetches those that are read.

    ``folder``: where the file is made, /var/tmp unless given; it must lie on a disk and not in memory, as /tmp often
    does. The last ``recent`` tokens, and up to 64 more, stay in main memory. The file has no name: nobody else can open
    it, and it is gone with the cache or the process.

    Nothing is rounded, so answers are those of the method that it is joined with, to rounding of sums. What is read is
    fetched every time, by ``preadv``: readers of everything stream all tokens through, `tidaldecode` and other lists
    fetch their rows, and `tokenselect` streams the keys, scores them, and fetches what wins. Keepers that drop tokens
    read back what is behind the first token that goes. A disk that is full, or does not give back what was written, is
    a StorageError, and nothing is attended that was not read whole. ``cache.report()`` counts what lies on the disk and
    what was fetched.

    Missing: indexes of readers (sketches, page bounds), which are kept beside tokens in memory only, and main memory as
    the tier of a GPU.
    """
    if not files_allowed():
        raise MethodError("offload writes to the disk of the server; its operator chooses such methods.")
    return Method(store=Offloaded(check_folder("offload", folder), recent))
