"""Dense attention: what every method must equal when its budget covers everything."""

from kvote.method import Method, published


@published(rooms="none", source="Vaswani et al. 2017, arXiv 1706.03762")
def dense() -> Method:
    """Keeps, stores and reads every token."""
    return Method()
