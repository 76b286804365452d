"""How well predicted constituents match given ones: by the rules of evalb, and by those of grammar induction."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxft.core.checks import require
from jaxft.structure.trees import Tree, tree_spans


@dataclass(frozen=True)
class BracketConvention:
    """What counts as a constituent, and over what is averaged. Preterminals never count."""

    labelled: bool = True
    """A match needs the same label."""
    average: Literal["corpus", "sentence"] = "corpus"
    """F1 of the counts of the whole corpus, or the mean of the F1 of sentences."""
    multiset: bool = True
    """Two constituents with the same words and label count twice; if false, once."""
    drop_trivial: bool = False
    """Leave out constituents of one word and of the whole sentence."""
    deleted_tags: tuple[str, ...] = ()
    """Words whose tag in the given tree is one of these are cut out of both trees, and what is then empty with them."""
    ignored_labels: tuple[str, ...] = ()
    """Labels that are no constituents."""
    equal_labels: tuple[tuple[str, str], ...] = ()
    """Pairs of labels that match each other."""
    max_length: int | None = None
    """Sentences of more words, those deleted not counted, are skipped."""
    min_length: int = 1
    """Sentences of fewer words are skipped."""


EVALB = BracketConvention(
    deleted_tags=("-NONE-", ",", ":", "``", "''", "."),
    ignored_labels=("TOP", "ROOT", "S1", ""),
    equal_labels=(("ADVP", "PRT"),),
)
"""As evalb with its COLLINS.prm: labelled brackets over the corpus."""

INDUCTION = BracketConvention(labelled=False, average="sentence", multiset=False, drop_trivial=True, min_length=2)
"""As in grammar induction: unlabelled, sentence F1, nothing trivial. Punctuation is taken out of the trees beforehand
(``clean_tree(punctuation=False)``). A sentence where nothing is left on one side scores 1 for it (recall if nothing is
given, precision if nothing is predicted)."""


class BracketScores(NamedTuple):
    """Scores as fractions of 1, and the counts they come from."""

    precision: float
    recall: float
    f1: float
    exact_match: float
    """Sentences whose constituents are all right and all found."""
    crossing: float
    """Predicted constituents that cross a given one, per sentence."""
    no_crossing: float
    """Sentences without such."""
    matched: int
    predicted: int
    gold: int
    sentences: int
    """Scored sentences."""
    skipped: int
    """Sentences beyond the limits of length."""
    failed: int
    """Scored sentences without a predicted parse: nothing is predicted for them."""
    convention: BracketConvention


Brackets = Tree | Sequence[Any] | np.ndarray


def bracket_scores(
    predicted: Sequence[Brackets | None],
    gold: Sequence[Brackets],
    *,
    convention: BracketConvention = EVALB,
    lengths: Sequence[int] | np.ndarray | None = None,
) -> BracketScores:
    """Precision, recall and F1 of constituents.

    Args:
      predicted: A sentence each: a tree, or spans ``(start, end)`` or ``(start, end, label)``, half-open, without
        preterminals; ``None`` where no parse was found.
      gold: The given trees or spans, in the same order.
      convention: What counts: ``EVALB``, ``INDUCTION``, or either changed by ``dataclasses.replace``.
      lengths: Words of each sentence, needed where the given constituents are spans.

    Returns:
      The scores, with their counts and the convention.

    Raises:
      UserError: Sequences of different lengths, trees of different numbers of words, spans outside their sentence, or a
        convention that needs labels or tags which spans do not have.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> gold = parse_tree("(S (NP (DT a) (NN b)) (VP (VB c) (NP (NN d))))")
      >>> guess = parse_tree("(S (NP (DT a) (NN b)) (VB c) (NP (NN d)))")
      >>> scores = bracket_scores([guess], [gold])
      >>> scores.precision, scores.recall
      (1.0, 0.75)

    Reference:
      Black et al. 1991; Sekine and Collins, evalb; Kim et al. 2019, arXiv 1906.10225 (induction).
    """
    where, n = "bracket_scores", len(gold)
    got = f"{len(predicted)} and {n}"
    require(len(predicted) == n, where, "each given parse needs a prediction", got, "Pass None where there is none")
    require(lengths is None or len(lengths) == n, where, "each sentence needs a length", n, "Pass one a sentence")
    rows, skipped, failed = [], 0, 0
    for i, (guess, truth) in enumerate(zip(predicted, gold, strict=True)):
        kept = _kept_words(truth, None if lengths is None else int(lengths[i]), convention, f"sentence {i}")
        if not convention.min_length <= int(kept.sum()) <= (convention.max_length or len(kept)):
            skipped += 1
            continue
        if isinstance(guess, Tree) and isinstance(truth, Tree):
            same = len(guess.leaves()) == len(kept)
            step = "Predict a tree over the given words"
            require(same, where, "trees must have as many words", f"{len(guess.leaves())} and {len(kept)} at {i}", step)
        failed += guess is None
        right = _constituents(truth, kept, convention, f"gold sentence {i}")
        ours = _constituents([] if guess is None else guess, kept, convention, f"predicted sentence {i}")
        crossed = sum(count for (s, e, _), count in ours.items() if any(_cross(s, e, *other[:2]) for other in right))
        rows.append(((ours & right).total(), ours.total(), right.total(), crossed))
    return _scores(np.array(rows, np.int64).reshape(-1, 4), skipped, failed, convention)


def _kept_words(truth: Brackets, length: int | None, convention: BracketConvention, name: str) -> np.ndarray:
    """Which words are not deleted."""
    where = "bracket_scores"
    if isinstance(truth, Tree):
        tags = truth.tags()
        step = "Leave lengths out, or correct it"
        require(length in (None, len(tags)), where, "lengths must be those of the trees", f"{length} at {name}", step)
        return np.array([tag not in convention.deleted_tags for tag in tags])
    require(length is not None, where, "spans need the lengths of their sentences", f"none at {name}", "Pass lengths")
    step = "Set deleted_tags=() or pass trees"
    require(not convention.deleted_tags, where, "words are deleted by the tags of trees", f"spans at {name}", step)
    return np.ones(length or 0, bool)


def _constituents(brackets: Brackets, kept: np.ndarray, convention: BracketConvention, name: str) -> Counter:
    """Spans over the kept words with the labels that are compared, counted."""
    spans = tree_spans(brackets) if isinstance(brackets, Tree) else [tuple(row) for row in brackets]
    short = convention.labelled and any(len(span) < 3 for span in spans)
    step = "Pass (start, end, label), or labelled=False"
    require(not short, "bracket_scores", "labelled scores need labels", f"spans without at {name}", step)
    place = np.concatenate([[0], np.cumsum(kept)])
    total = int(place[-1])
    equal = {b: a for a, b in convention.equal_labels}
    found: Counter = Counter()
    for i, j, *label in spans:
        rule = "spans must be [i, j) within the sentence"
        inside = bool(0 <= i < j <= len(kept))
        require(inside, "bracket_scores", rule, f"[{i}, {j}) of {len(kept)} at {name}", "Count from 0")
        start, end = int(place[i]), int(place[j])
        trivial = end - start == 1 or end - start == total
        text = str(label[0]) if label else None
        if start < end and text not in convention.ignored_labels and not (convention.drop_trivial and trivial):
            found[start, end, equal.get(text, text) if text and convention.labelled else None] += 1
    return found if convention.multiset else Counter(dict.fromkeys(found, 1))


def _cross(a: int, b: int, c: int, d: int) -> bool:
    return a < c < b < d or c < a < d < b


def _scores(rows: np.ndarray, skipped: int, failed: int, convention: BracketConvention) -> BracketScores:
    matched, ours, right, crossed = rows.T
    if convention.average == "corpus":
        parts = _prf(*(column.sum(keepdims=True) for column in (matched, ours, right)))
    else:
        parts = _prf(matched, ours, right)
    exact, clean = (matched == ours) & (matched == right), crossed == 0
    precision, recall, f1, exact_match, crossing, no_crossing = (
        float(x.mean()) if len(rows) else float("nan") for x in (*parts, exact, crossed, clean)
    )
    return BracketScores(
        precision=precision,
        recall=recall,
        f1=f1,
        exact_match=exact_match,
        crossing=crossing,
        no_crossing=no_crossing,
        matched=int(matched.sum()),
        predicted=int(ours.sum()),
        gold=int(right.sum()),
        sentences=len(rows),
        skipped=skipped,
        failed=failed,
        convention=convention,
    )


def _prf(matched: np.ndarray, ours: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1; 1 where there is nothing to be wrong about."""
    precision = np.where(ours > 0, matched / np.maximum(ours, 1), 1.0)
    recall = np.where(right > 0, matched / np.maximum(right, 1), 1.0)
    both = precision + recall
    return precision, recall, np.where(both > 0, 2 * precision * recall / np.where(both > 0, both, 1), 0.0)
