"""Structured inference over binary trees: grammars, charts, semirings and trees.

Grammars: ``pcfg`` (the types), ``cfg`` and ``grammar_text`` (from rules and from text), ``validate``, ``unary`` (chains
closed). Charts: ``chart`` (the recursion over widths and its derivative), ``semirings``, ``bracketings`` (trees without
symbols), ``rule_trees`` (with the rules of a grammar, any semiring), and the faster routes ``dense``, ``sparse`` and
``low_rank``, of which ``routes`` chooses. Inference: ``inside_outside`` over ``passes``, ``derivations`` (best tree,
posterior samples), ``decode`` (greatest expected recall), ``k_best``, ``masked_words``, ``information``, ``learning``.
Grammars by themselves: ``lengths``, ``sampling``, ``prefix``. Trees: ``trees``, ``tree_distances``, ``binarize``,
``parses``, ``parse_metrics``. ``enumeration`` is the oracle of all this.
"""

from jaxft.structure.binarize import (
    BinarizationScheme,
    binarize,
    clean_tree,
    collapse_unaries,
    from_binary,
    restore_unaries,
    to_binary,
    unbinarize,
)
from jaxft.structure.bracketings import best_bracketing, bracketing_chart
from jaxft.structure.chart import Recursion, by_ends, span_chart
from jaxft.structure.decode import mbr_parse
from jaxft.structure.derivations import sample_trees, viterbi
from jaxft.structure.enumeration import Enumeration, brute_force, enumerated_masked_posterior
from jaxft.structure.grammar_text import format_grammar, parse_grammar, read_grammar
from jaxft.structure.information import tree_cross_entropy, tree_entropy, tree_kl
from jaxft.structure.inside_outside import (
    InsideChart,
    Marginals,
    inside,
    inside_outside,
    log_partition,
    outside,
    span_marginals,
    term_scores,
)
from jaxft.structure.k_best import k_best
from jaxft.structure.learning import (
    ExpectedCounts,
    em_step,
    expected_counts,
    log_likelihood_loss,
    normalize_scores,
    reestimate,
)
from jaxft.structure.lengths import (
    expected_length,
    expected_symbol_counts,
    grammar_entropy,
    is_consistent,
    length_distribution,
    length_log_probs,
    mean_matrix,
    partition_function,
    spectral_radius,
)
from jaxft.structure.masked_words import bayes_loss, excess_loss, masked_word_posterior
from jaxft.structure.parse_metrics import EVALB, INDUCTION, BracketConvention, BracketScores, bracket_scores
from jaxft.structure.parses import Parses, parse_mask, parse_spans, parses_to_trees
from jaxft.structure.pcfg import (
    PCFG,
    Grammar,
    LowRankPCFG,
    SparsePCFG,
    SymbolNames,
    random_pcfg,
    to_dense,
    to_sparse,
)
from jaxft.structure.prefix import next_word_log_probs, prefix_log_probability
from jaxft.structure.routes import Plan, explain
from jaxft.structure.sampling import Samples, SamplingTables, sample_sentences, sampling_tables
from jaxft.structure.semirings import COUNTING, EXPECTATION, LOG, MAX, Semiring, k_best_semiring
from jaxft.structure.tree_distances import (
    branching_tree,
    syntactic_distances,
    tree_depths,
    tree_distances,
    tree_from_distances,
)
from jaxft.structure.trees import Span, Tree, draw_tree, parse_tree, parse_trees, tree_from_spans, tree_spans
from jaxft.structure.validate import grammar_faults, prune, require_valid

__all__ = [
    "COUNTING",
    "EVALB",
    "EXPECTATION",
    "INDUCTION",
    "LOG",
    "MAX",
    "PCFG",
    "BinarizationScheme",
    "BracketConvention",
    "BracketScores",
    "Enumeration",
    "ExpectedCounts",
    "Grammar",
    "InsideChart",
    "LowRankPCFG",
    "Marginals",
    "Parses",
    "Plan",
    "Recursion",
    "Samples",
    "SamplingTables",
    "Semiring",
    "Span",
    "SparsePCFG",
    "SymbolNames",
    "Tree",
    "bayes_loss",
    "best_bracketing",
    "binarize",
    "bracket_scores",
    "bracketing_chart",
    "branching_tree",
    "brute_force",
    "by_ends",
    "clean_tree",
    "collapse_unaries",
    "draw_tree",
    "em_step",
    "enumerated_masked_posterior",
    "excess_loss",
    "expected_counts",
    "expected_length",
    "expected_symbol_counts",
    "explain",
    "format_grammar",
    "from_binary",
    "grammar_entropy",
    "grammar_faults",
    "inside",
    "inside_outside",
    "is_consistent",
    "k_best",
    "k_best_semiring",
    "length_distribution",
    "length_log_probs",
    "log_likelihood_loss",
    "log_partition",
    "masked_word_posterior",
    "mbr_parse",
    "mean_matrix",
    "next_word_log_probs",
    "normalize_scores",
    "outside",
    "parse_grammar",
    "parse_mask",
    "parse_spans",
    "parse_tree",
    "parse_trees",
    "parses_to_trees",
    "partition_function",
    "prefix_log_probability",
    "prune",
    "random_pcfg",
    "read_grammar",
    "reestimate",
    "require_valid",
    "restore_unaries",
    "sample_sentences",
    "sample_trees",
    "sampling_tables",
    "span_chart",
    "span_marginals",
    "spectral_radius",
    "syntactic_distances",
    "term_scores",
    "to_binary",
    "to_dense",
    "to_sparse",
    "tree_cross_entropy",
    "tree_depths",
    "tree_distances",
    "tree_entropy",
    "tree_from_distances",
    "tree_from_spans",
    "tree_kl",
    "tree_spans",
    "unbinarize",
    "viterbi",
]
