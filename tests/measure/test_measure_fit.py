import pytest

from kvote.measure.fit import Fit

GIB = 2**30


def needed(**changes) -> Fit:
    return Fit(**{"weights": 4 * GIB, "cache": GIB, "reading": GIB, "total": 8 * GIB, "free": 8 * GIB, **changes})


@pytest.mark.parametrize(
    ("changes", "fits", "sentence"),
    [
        ({}, True, "It fits: weights of 4.0 GiB and a cache of 1.0 GiB, and this machine has 8.0 GiB."),
        ({"free": 2 * GIB}, True, "this machine has 8.0 GiB, of which 2.0 GiB are free now."),
        ({"cache": 5 * GIB, "reading": 5 * GIB}, False, "It does not fit: weights of 4.0 GiB and a cache of 5.0 GiB"),
        ({"reading": 5 * GIB}, False, "a cache of 1.0 GiB (up to 5.0 GiB while the prompt is read), and this machine"),
        ({"cache": 2**20, "reading": 2**20}, True, "a cache of 1.0 MiB,"),
        ({"total": 0, "free": 0}, None, "this system does not say how much memory it has."),
    ],
    ids=range(6),
)
def test_whether_it_fits_is_said(changes, fits, sentence):
    made = needed(**changes)
    assert made.fits is fits
    assert sentence in str(made)
