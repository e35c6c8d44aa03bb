"""Parameters of each method that fit the embedded model: what a query reads stays within its 1,024 trained tokens."""

Parameters = dict[str, int | str]

_SELECTION: Parameters = {"top_k": 512, "sinks": 16, "window": 256, "chunk": 128}

PRESETS: dict[str, Parameters] = {
    "dense": {},
    "random": _SELECTION,
    "streamingllm": {"sinks": 16, "window": 1008},
    "tokenselect": {**_SELECTION, "sketch": "int8"},
}


def preset(name: str) -> str:
    """The spec of a method with its preset, for ``kvote.Cache``; methods without one keep the paper's defaults."""
    parameters = PRESETS.get(name)
    return name if not parameters else f"{name}({', '.join(f'{key}={value!r}' for key, value in parameters.items())})"


def with_presets(spec: str) -> str:
    """``spec`` with every bare method name replaced by its preset: ``dense | tokenselect(top_k=64)`` stays as it is."""
    parts = spec.split("|")
    return "|".join(preset(part.strip()) if part.strip() in PRESETS else part for part in parts)
