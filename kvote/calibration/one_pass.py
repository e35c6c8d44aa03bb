"""The memory of a keeper that measures one text, in one pass, and keeps everything."""


class OnePass:
    """What a ``Remembered`` is asked where sequences are reordered, dropped from or cut, which never happens here."""

    def select(self, index: list[int]) -> None:
        raise NotImplementedError

    def keep(self, row: int, slots: object) -> None:
        raise NotImplementedError

    def truncate(self, row: int, length: int) -> None:
        raise NotImplementedError
