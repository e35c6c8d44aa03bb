"""Word-level tokenizers, with and without a chat template, for models of random numbers."""

from typing import Any

import torch

TEXT = " ".join(f"w{i % 47}" for i in range(150))


class Encoded:
    def __init__(self, ids: list[int]) -> None:
        self.input_ids = torch.tensor([ids], dtype=torch.long).reshape(1, -1)


class Words:
    """``w7`` is token 10. ``bos`` and ``eos`` are put around a text, as many tokenizers do."""

    eos_token_id = None
    chat_template: str | None = None

    def __init__(self, bos: int | None = None, eos: int | None = None) -> None:
        self.bos, self.eos = bos, eos

    def __call__(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> Encoded:
        ids = [3 + int(word[1:]) for word in text.split()]
        around = [[each] if each is not None and add_special_tokens else [] for each in (self.bos, self.eos)]
        return Encoded([*around[0], *ids, *around[1]])

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return " ".join(f"w{i - 3}" for i in ids)


class Talks(Words):
    """Messages stand between ``w100`` (system), ``w101`` (user) or ``w102`` (assistant) and ``w103``."""

    chat_template = "marks"
    roles = ("system", "user", "assistant")

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
        marks = [f"w{100 + self.roles.index(each['role'])} {each['content']} w103 " for each in messages]
        return "w99 " + "".join(marks) + "w102 "


def ids(text: str) -> list[int]:
    return [3 + int(word[1:]) for word in text.split()]
