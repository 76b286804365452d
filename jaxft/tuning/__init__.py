"""Preference tuning that can be predicted: pairs of responses, losses, likelihood displacement and what foretells it.

Data: ``preferences`` (readers), ``encoding`` (tokens, with boundaries safe from merging), ``packing`` (a prompt and its
responses in one row). Losses: ``losses`` (the table of them), ``margin_losses`` and ``pair_losses`` (their formulas),
``objectives`` (values, slopes, objectives for training), ``reference``. Displacement: ``displacement`` (as it is
measured), ``ches`` and ``similarity`` (scores of pairs), ``selection`` (subsets by score), ``preference_gram`` (rates
of any loss), ``directions`` (of any optimiser), ``gains`` (every token's rate), ``unembedding``.
"""

from jaxft.tuning.ches import ChesTerms, ches_score, ches_scores, ches_terms
from jaxft.tuning.directions import flow_direction, predicted_changes
from jaxft.tuning.displacement import Displacement, DisplacementKind, displacement_kind, likelihood_displacement
from jaxft.tuning.encoding import EncodedPreferences, PairNotes, encode_preferences
from jaxft.tuning.gains import TokenFlow, mass_flow, who_gains
from jaxft.tuning.losses import ALIASES, LOSSES, PreferenceLoss
from jaxft.tuning.margin_losses import GPO_FUNCTIONS
from jaxft.tuning.objectives import (
    PreferenceLabels,
    loss_slopes,
    loss_weights,
    make_preference_objective,
    preference_loss,
)
from jaxft.tuning.packing import (
    BatchShape,
    TokenUse,
    batch_shape,
    make_response_batch,
    response_batch,
    row_lengths,
    token_use,
)
from jaxft.tuning.pair_losses import Pair, PairWeights
from jaxft.tuning.preference_gram import batch_displacement_rate, displacement_rate, preference_gram
from jaxft.tuning.preferences import PreferencePair, Preferences, make_preferences, read_preferences
from jaxft.tuning.reference import reference_log_probs
from jaxft.tuning.selection import filter_by_score, score_percentiles
from jaxft.tuning.similarity import edit_distance, last_hidden_similarity, length_difference
from jaxft.tuning.unembedding import UnembeddingDecomposition, unembedding_decomposition, unembedding_gram

__all__ = [
    "ALIASES",
    "GPO_FUNCTIONS",
    "LOSSES",
    "BatchShape",
    "ChesTerms",
    "Displacement",
    "DisplacementKind",
    "EncodedPreferences",
    "Pair",
    "PairNotes",
    "PairWeights",
    "PreferenceLabels",
    "PreferenceLoss",
    "PreferencePair",
    "Preferences",
    "TokenFlow",
    "TokenUse",
    "UnembeddingDecomposition",
    "batch_displacement_rate",
    "batch_shape",
    "ches_score",
    "ches_scores",
    "ches_terms",
    "displacement_kind",
    "displacement_rate",
    "edit_distance",
    "encode_preferences",
    "filter_by_score",
    "flow_direction",
    "last_hidden_similarity",
    "length_difference",
    "likelihood_displacement",
    "loss_slopes",
    "loss_weights",
    "make_preference_objective",
    "make_preferences",
    "make_response_batch",
    "mass_flow",
    "predicted_changes",
    "preference_gram",
    "preference_loss",
    "read_preferences",
    "reference_log_probs",
    "response_batch",
    "row_lengths",
    "score_percentiles",
    "token_use",
    "unembedding_decomposition",
    "unembedding_gram",
    "who_gains",
]
