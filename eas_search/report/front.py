"""Numbers on a set of (accuracy, latency) points: accuracy is maximised, latency is minimised.

Units, here and in the whole report: accuracy is a fraction in [0, 1]; latency is a ratio to the baseline
measured in the same run, so 1 is the baseline and 0.8 takes four fifths of its time.  A point with a value
that is not finite (a failed trial) takes no part in anything: it is never on the front and never chosen.
"""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from eas_search.exceptions import ConfigError

# Fixed before any search, so that hypervolumes of different studies on one task can be compared: an accuracy
# of zero at the baseline's latency.  What is slower than the baseline is worth nothing.
REFERENCE = (0.0, 1.0)
_MAXIMISE = [True, False]


def _points(accuracy: ArrayLike, latency: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Both objectives as one array of shape (n, 2), and which of the n rows are finite."""
    values = [np.asarray(v, dtype=np.float64).reshape(-1) for v in (accuracy, latency)]
    points = np.column_stack(values)  # raises ValueError when the lengths differ
    return points, np.isfinite(points[:, 0]) & np.isfinite(points[:, 1])


def non_dominated(accuracy: ArrayLike, latency: ArrayLike) -> NDArray[np.bool_]:
    """Which points are on the front: no other point is at least as good in both objectives and better in one.

    Args:
        accuracy: shape (n,), higher is better.
        latency: shape (n,), ratio to the baseline, lower is better.

    Returns:
        Boolean array of shape (n,).  Of exact duplicates only the first is kept; points that are NaN or
        infinite in either objective are never on the front.  Empty input gives an empty array.

    Raises:
        ValueError: the two arrays differ in length.
    """
    points, finite = _points(accuracy, latency)
    keep = np.zeros(len(points), dtype=np.bool_)
    if finite.any():
        keep[finite] = moocore.is_nondominated(points[finite], maximise=_MAXIMISE, keep_weakly=False)
    return keep


def hypervolume(accuracy: ArrayLike, latency: ArrayLike, reference: tuple[float, float] = REFERENCE) -> float:
    """Area that the points dominate, bounded by `reference` = (worst accuracy, worst latency).

    The unit is accuracy × latency ratio.  With the default reference the value lies in [0, 1]: a single point
    adds accuracy × (1 - latency), its accuracy times the share of the baseline's time that it saves.

    Points at or beyond the reference, and points that are not finite, contribute nothing and raise nothing;
    without any point the area is 0.

    Raises:
        ValueError: the two arrays differ in length.
    """
    points, finite = _points(accuracy, latency)
    if not finite.any():
        return 0.0
    return float(moocore.hypervolume(points[finite], ref=reference, maximise=_MAXIMISE))


def knee_point(accuracy: ArrayLike, latency: ArrayLike, baseline: tuple[float, float] | None = None) -> int:
    """Index of the point with the best compromise: the one that bulges furthest from the chord of the front.

    Dominated points are set aside, both objectives of the others are scaled to [0, 1], and the distance is
    measured from the straight line through the most accurate and the fastest point, towards the ideal corner.
    A front of one point gives that point.  Of equal distances the more accurate point wins; so does it when
    there are two points, and when every inner point lies on the wrong side of the chord.

    With a `baseline` (accuracy, latency) the scales reach to it and it takes part as an end of the chord, but it is
    never the answer.  Without it the most accurate point is an end itself and cannot win, however good it is.

    Raises:
        ConfigError: no point is finite, so there is nothing to choose from.
        ValueError: the two arrays differ in length.
    """
    points, _ = _points(accuracy, latency)
    front = np.flatnonzero(non_dominated(accuracy, latency))
    if front.size == 0:
        raise ConfigError(f"no knee point among {len(points)} points: none is finite; run more trials")
    # Most accurate first, so that argmax settles ties in its favour.
    front = front[np.argsort(-points[front, 0])]
    ends = points[front] if baseline is None else np.vstack([points[front], baseline])
    if len(ends) < 3:
        return int(front[0])
    loss = ends[:, 0].max() - points[front, 0]
    time = points[front, 1] - ends[:, 1].min()
    # In scaled losses the chord runs from (0, 1) to (1, 0).  The constant 1/√2 does not change which is
    # largest; rounding keeps points on the chord from being preferred for their last bit.
    loss_range, time_range = np.ptp(ends[:, 0]), np.ptp(ends[:, 1])
    distance = 1.0 - loss / (loss_range or 1.0) - time / (time_range or 1.0)
    return int(front[np.argmax(np.round(distance, 12))])


def prefer(accuracy: ArrayLike, latency: ArrayLike, minimum_accuracy: float) -> int:
    """Index of the fastest point whose accuracy is at least `minimum_accuracy` (a fraction, not a share).

    Of equally fast points the more accurate wins, of exact duplicates the first.

    Raises:
        ConfigError: no point is accurate enough; the message names the best there is.
        ValueError: the two arrays differ in length.
    """
    points, finite = _points(accuracy, latency)
    good = np.flatnonzero(finite & (points[:, 0] >= minimum_accuracy))
    if good.size:
        return int(good[np.lexsort((-points[good, 0], points[good, 1]))[0]])
    if not finite.any():
        best = "no point has a finite accuracy and latency"
    else:
        best = f"the best available is {points[finite, 0].max():.4f}"
    raise ConfigError(
        f"no point reaches an accuracy of {minimum_accuracy:.4f}: {best}; ask for less or search with a larger budget"
    )
