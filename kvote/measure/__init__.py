"""Times of this machine, and what follows from them: ``kvote bench``, ``kvote will-it-help`` and ``bench/`` use it.

``clock`` times calls in alternating rounds; ``sweep`` reads memory and so tells the bandwidth; ``geometry`` makes
layers that hold random tokens; ``workload`` is the kernels of a decode step, ``kernels`` their table and ``check`` what
must hold before it. ``shape`` reads a model's config, ``probe`` measures what a token of such a model costs here, and
``forecast`` is arithmetic on the two.
"""

from kvote.measure.clock import Call, Timing, alternating
from kvote.measure.forecast import Machine, Prediction, predict
from kvote.measure.geometry import Geometry
from kvote.measure.sweep import Sweep

__all__ = ["Call", "Geometry", "Machine", "Prediction", "Sweep", "Timing", "alternating", "predict"]
