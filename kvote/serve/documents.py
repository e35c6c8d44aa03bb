"""Documents that clients have sent: read once, asked often."""

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from kvote import Cache
from kvote.serve.errors import ApiError


@dataclass
class StoredDocument:
    """A text and the cache that has read it, which is never changed: answers go on from forks of it. ``owner`` is the
    digest of the key that made it."""

    name: str
    text: str
    system: str | None
    # What was read: the text with the template in front of it.
    read: str
    owner: str
    method: str
    ids: tuple[int, ...]
    cache: Cache
    id: str = field(default_factory=lambda: f"doc-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    nbytes: int = 0

    def __post_init__(self) -> None:
        self.nbytes = self.cache.nbytes()

    @property
    def tokens(self) -> int:
        return len(self.ids)


class Documents:
    """At most ``count`` documents in ``nbytes``; those asked longest ago are forgotten first."""

    def __init__(self, nbytes: int, count: int) -> None:
        self.nbytes, self.count = nbytes, count
        self._held: OrderedDict[str, StoredDocument] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, document: StoredDocument) -> None:
        """Raises ApiError for a document that is larger than all that may be held."""
        if document.nbytes > self.nbytes:
            raise ApiError(
                400,
                f"The document takes {document.nbytes:,} bytes, and this server holds {self.nbytes:,} of documents; "
                "send less text, or name a kv_method that holds less.",
            )
        with self._lock:
            self._held[document.id] = document
            while len(self._held) > self.count or self.total > self.nbytes:
                self._held.popitem(last=False)

    @property
    def total(self) -> int:
        return sum(document.nbytes for document in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def get(self, name: str, owner: str) -> StoredDocument:
        """Raises ApiError, the same one for documents that there are not and for those of others."""
        with self._lock:
            found = self._held.get(name)
            if found is None or found.owner != owner:
                raise ApiError(404, f"There is no document {name[:80]!r}.", param="document", code="document_not_found")
            self._held.move_to_end(name)
            return found

    def of(self, owner: str) -> list[StoredDocument]:
        with self._lock:
            return [document for document in self._held.values() if document.owner == owner]

    def remove(self, name: str, owner: str) -> None:
        """Raises ApiError as ``get``."""
        self.get(name, owner)
        with self._lock:
            self._held.pop(name, None)
