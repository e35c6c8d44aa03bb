"""Every exception kvote raises on purpose. Each message says what was wrong and what to do about it."""


class KvoteError(Exception):
    """Base of all errors raised by kvote."""


class MethodError(KvoteError, ValueError):
    """A method or method spec that does not make sense: unknown name, bad parameter, two answers to one question."""


class UnsupportedModelError(KvoteError, ValueError):
    """The model asks something of attention that kvote, or the chosen method, does not honour."""


class InactiveCacheError(KvoteError, RuntimeError):
    """The model ran without calling kvote's attention, so the cache cannot vouch for the result."""


class CropError(KvoteError, RuntimeError):
    """A rollback needs tokens that the method has already dropped."""


class InterruptedPassError(KvoteError, RuntimeError):
    """A pass was interrupted, so the layers of a cache no longer hold the same text; crop or reset it first."""


class BusyCacheError(KvoteError, RuntimeError):
    """Another thread is in the middle of using the cache."""


class NotFiniteError(KvoteError, ArithmeticError):
    """The model gave numbers that are none: NaN or infinity."""


class OutOfMemoryError(KvoteError, MemoryError):
    """Memory ran out; what was held before is as it was."""


class StorageError(KvoteError, OSError):
    """A disk on which tokens lie is full, or does not give back what was written."""


class InputError(KvoteError, ValueError):
    """A document, question or file that cannot be used as given."""
