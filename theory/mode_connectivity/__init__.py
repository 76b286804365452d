r"""Explaining Landscape Connectivity of Low-cost Solutions (Kuditipudi et al. 2019, arXiv 1906.06247): the claims.

Statements are checked on small networks trained here (``networks``). ``dropout`` has the path of theorem 1 with its
certificate, ``noise`` what noise stability says, ``polygon`` two minima that no path of low loss connects, with a
barrier that is proved. Of the field around the paper: ``permutations`` of units, ``curves`` and elastic bands, what
``barriers`` obey, the children of one checkpoint (``spawning``), and ``simplexes`` of low loss.
"""

from theory.mode_connectivity import barriers, curves, dropout, noise, permutations, polygon, simplexes, spawning

__all__ = ["CLAIMS"]

CLAIMS = (
    *dropout.CLAIMS,
    *noise.CLAIMS,
    *permutations.CLAIMS,
    *polygon.CLAIMS,
    *curves.CLAIMS,
    *barriers.CLAIMS,
    *spawning.CLAIMS,
    *simplexes.CLAIMS,
)
