r"""Likelihood displacement in preference optimisation (Razin et al. 2025, arXiv 2410.08847): claims and controls.

``rates`` has the closed forms of theorems 4 to 9 and propositions 1 and 2, for a model whose hidden states are free
(``ufm``). ``theorems`` and ``propositions`` check them against autodiff, the latter also on networks (``decoders``).
``flows`` integrates one example over time and has its path in closed form, ``phases`` says when its chosen response
falls, and whether for good. ``gram`` is about what the library predicts with, for any model, loss and optimiser, and
``proxies`` about how well CHES and simpler scores do on a decoder trained here (``language``).
"""

from theory.likelihood_displacement import gram, phases, propositions, proxies, theorems
from theory.likelihood_displacement.flows import Pair, closed_form, constructed_pair, integrated
from theory.likelihood_displacement.rates import (
    gain_of_sft,
    rate_chosen,
    rate_other_token,
    rate_response,
    rate_single_token,
    rate_through_unembedding,
    rate_weighted,
    rates_across_examples,
)

__all__ = [
    "CLAIMS",
    "Pair",
    "closed_form",
    "constructed_pair",
    "gain_of_sft",
    "integrated",
    "rate_chosen",
    "rate_other_token",
    "rate_response",
    "rate_single_token",
    "rate_through_unembedding",
    "rate_weighted",
    "rates_across_examples",
]

CLAIMS = (
    *theorems.CLAIMS,
    *propositions.CLAIMS,
    *phases.CLAIMS,
    *gram.CLAIMS,
    *proxies.CLAIMS,
)
