"""The trained model that ships with kvote, and the small language it speaks."""

from pathlib import Path


def embedded() -> str:
    """Directory of the shipped model, for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer``."""
    return str(Path(__file__).parent / "embedded")
