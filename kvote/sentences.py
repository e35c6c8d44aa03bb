"""Which tokens end a sentence, as methods want to know it that go by sentences."""

from typing import Any

# The last three are the full-width ones of Chinese.
_STOPS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
_CLOSING = "\"'\u201d\u2019)]\u00bb*_"


def sentence_ends(tokenizer: Any) -> tuple[int, ...]:
    """The ids of tokens whose text ends with a stop, whatever closes behind it, or has an empty line in it.

    Merged tokens such as ``.\\n`` or ``."`` are among them; special ones are not.
    """
    special, found = set(tokenizer.all_special_ids), []
    for i in range(len(tokenizer)):
        text = "" if i in special else tokenizer.decode([i], skip_special_tokens=False)
        if "\n\n" in text or text.rstrip().rstrip(_CLOSING).endswith(_STOPS):
            found.append(i)
    return tuple(found)
