"""What a method must know about a model beforehand: measured once, kept in a small file, tied to that model."""

from kvote.calibration.file import Calibration, load, save
from kvote.calibration.fingerprint import Fingerprint

__all__ = ["Calibration", "Fingerprint", "load", "save"]
