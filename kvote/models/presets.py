"""Parameters that a bare method name means on the command line where its defaults exceed a model's trained length."""

Parameters = dict[str, int | str]

# The embedded model was trained on 1,024 tokens.
_SELECTION: Parameters = {"top_k": 512, "sinks": 16, "window": 256, "chunk": 128}

PRESETS: dict[str, Parameters] = {
    "dense": {},
    "random": _SELECTION,
    "streamingllm": {"sinks": 16, "window": 1008},
    "tokenselect": {**_SELECTION, "sketch": "int8"},
}

# The most that a query reads with a method's defaults: winners, sinks, a window, and the chunk it stands in.
_READ = {"tokenselect": 3200, "random": 3200, "streamingllm": 1024}
# Below, a share of the trained length is less than a token.
_LEAST = 64


def preset(name: str) -> str:
    """The spec of a method with its preset, for ``kvote.Cache``; methods without one keep the paper's defaults."""
    return _spec(name, PRESETS.get(name, {}))


def with_presets(spec: str) -> str:
    """``spec`` with every bare method name replaced by its preset: ``dense | tokenselect(top_k=64)`` stays as it is."""
    parts = spec.split("|")
    return "|".join(preset(part.strip()) if part.strip() in PRESETS else part for part in parts)


def fitted(spec: str, trained: int | None) -> str:
    """``spec`` with every bare method name that would read more tokens than a model was ``trained`` on replaced by the
    same with less: the shares of the trained length that the embedded model's preset has. None: not known."""
    if trained is None or trained < _LEAST:
        return spec
    selection: Parameters = {
        "top_k": trained // 2,
        "sinks": trained // 64,
        "window": trained // 4,
        "chunk": trained // 8,
    }
    recent: Parameters = {"sinks": trained // 64, "window": trained - trained // 64}
    parts = spec.split("|")
    for i, part in enumerate(parts):
        name = part.strip()
        if _READ.get(name, 0) > trained:
            parts[i] = part.replace(name, _spec(name, recent if name == "streamingllm" else selection))
    return "|".join(parts)


def _spec(name: str, parameters: Parameters) -> str:
    return name if not parameters else f"{name}({', '.join(f'{key}={value!r}' for key, value in parameters.items())})"
