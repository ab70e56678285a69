"""Bounds of the histograms' buckets: times in seconds, and lengths in tokens."""

from __future__ import annotations

# fmt: off
TTFT = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
# A speculating model emits a token every few milliseconds, so the scale starts well below them.
INTER_TOKEN = (
    .0005, .001, .002, .004, .006, .008, .01, .015, .02, .025, .03, .04, .05, .075, .1, .15, .2, .3, .5, .75, 1, 2.5, 5, 10,
)
LATENCY = (
    .01, .05, .1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
# fmt: on


def up_to(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 and so on, the last one below `most`, then `most`."""
    bounds: list[float] = []
    scale = 1
    while scale < most:
        bounds += [float(scale * step) for step in (1, 2, 5) if scale * step < most]
        scale *= 10
    return (*bounds, float(most))
