"""Claims on the constructed transformer and on its approximations, each with a control that breaks one assumption."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream
from jaxft.core.types import Params, TokenBatch
from jaxft.nn import ReluAttentionConfig, ReluAttentionStates, make_relu_attention
from jaxft.structure.inside_outside import inside, inside_outside, log_partition
from jaxft.structure.pcfg import PCFG, LowRankPCFG, to_dense
from theory.claims import Claim, Evidence
from theory.pcfg_parsing.approximation import frequent_symbols, projected_inside_outside, width_bases
from theory.pcfg_parsing.compression import project_stream
from theory.pcfg_parsing.construction import Construction, encode_sentences, inside_outside_transformer
from theory.pcfg_parsing.layout import chart_width, embedding_width, head_counts, layer_count
from theory.pcfg_parsing.readouts import read_inside, read_marginals, read_posterior

PAPER = "arXiv 2303.08117"
NONTERMINALS, PRETERMINALS, WORDS, MAX_TOKENS, RANK = 4, 5, 6, 8, 2
LENGTHS = np.array([8, 6, 2, 1], np.int32)
SETTING = {"nonterminals": NONTERMINALS, "preterminals": PRETERMINALS, "max_tokens": MAX_TOKENS}
TILT = 3.0


class Toy(NamedTuple):
    """A random grammar and four sentences for it, three of them with a masked word."""

    grammar: PCFG
    low_rank: LowRankPCFG
    tokens: jax.Array
    lengths: jax.Array
    mask: jax.Array


@functools.cache
def toy(seed: int) -> Toy:
    """Sentences of 8, 6, 2 and 1 words; roots are any symbols."""
    draw = host_stream(seed, "toy")

    def rows(count: int, size: int) -> np.ndarray:
        return draw.dirichlet(np.ones(size), count)

    s, q, a = NONTERMINALS, PRETERMINALS, NONTERMINALS + PRETERMINALS
    root, rule, emit = rows(1, a)[0], rows(s, a * a).reshape(s, a, a), rows(q, WORDS)
    factors = rows(s, RANK), rows(RANK, a), rows(RANK, a)
    log_root, log_rule, log_emit = (jnp.asarray(np.log(part)) for part in (root, rule, emit))
    head, left, right = (jnp.asarray(np.log(part)) for part in factors)
    grammar, low_rank = PCFG(log_root, log_rule, log_emit), LowRankPCFG(log_root, head, left, right, log_emit)
    mask = np.zeros((len(LENGTHS), MAX_TOKENS), bool)
    mask[[0, 0, 1, 3], [1, 4, 5, 0]] = True
    tokens = jnp.asarray(draw.integers(WORDS, size=mask.shape), jnp.int32)
    return Toy(grammar, low_rank, tokens, jnp.asarray(LENGTHS), jnp.asarray(mask))


@functools.partial(jax.jit, static_argnums=0)
def forward(config: ReluAttentionConfig, params: Params, batch: TokenBatch) -> ReluAttentionStates:
    """States of all layers: one compiled program for all models of these sizes."""
    return make_relu_attention(config)[1](params, batch)


def _run(model: Construction, case: Toy) -> tuple[ReluAttentionStates, TokenBatch]:
    batch = encode_sentences(model, case.tokens, case.lengths, mask=case.mask)
    return forward(model.config, model.params, batch), batch


def _flat(found: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(part)) for part in (found.log_z, found.span, found.tag)])


def _construct(case: Toy, **options: Any) -> Construction:
    low = options.get("heads") == "lowrank"
    return inside_outside_transformer(case.low_rank if low else case.grammar, MAX_TOKENS, tilt=TILT, **options)


def equals_program(seed: int, *, removed: bool = False, **options: Any) -> Evidence:
    """Log Z, span and tag posteriors of the model against those of the dynamic program.

    The control removes one head (of the inside layers; with hard attention the one that copies a partner's charts).
    """
    case = toy(seed)
    model = _construct(case, **options)
    if removed:
        output = model.params["stage_1"]["output"]
        model.params["stage_1"]["output"] = output.at[0].set(0)
    states, batch = _run(model, case)
    exact = inside_outside(model.grammar, case.tokens, case.lengths, mask=case.mask)
    setting = SETTING | {"layers": model.config.layers, "heads": max(model.config.heads[1:])}
    measured = _flat(read_marginals(model, states.hidden[-1], batch))
    return Evidence(
        np.nan_to_num(measured, nan=np.nan, neginf=-1e3), _flat(exact), setting=setting | {"width": model.config.width}
    )


def depth_is_width(seed: int, *, fewer: int = 0) -> Evidence:
    """Inside charts after layer m against exact ones of spans of up to m words; the control reads a layer earlier."""
    case = toy(seed)
    model = _construct(case)
    states, _ = _run(model, case)
    exact = jnp.exp(inside(case.grammar, case.tokens, case.lengths, mask=case.mask).log_alpha())
    t, ends = exact.shape[1:3]
    width = np.arange(ends)[None, :] - np.arange(t)[:, None]
    measured, predicted = [], []
    for m in range(2, MAX_TOKENS + 1):
        known = ((width <= m) & (width > 0))[None, :, :, None]
        chart = read_inside(model, states.hidden[m - fewer])[..., :NONTERMINALS]
        # Unscaled, entries of wide spans would not count in a relative difference.
        scale = np.where(known, np.asarray(1 / jnp.where(exact > 0, exact, 1)), 1)
        predicted.append(np.where(known, np.asarray(exact) * scale, 0))
        measured.append(np.asarray(chart) * scale * (1 / TILT) ** np.clip(width, 0, None)[None, :, :, None])
    return Evidence(np.stack(measured), np.stack(predicted), setting=SETTING)


def every_part_is_used(seed: int, *, useless: bool = False) -> Evidence:
    """Layers, heads and coordinates that are ever other than 0, against the formulas.

    The control grammar has a nonterminal without rules.
    """
    case = toy(seed)
    if useless:
        case = case._replace(grammar=case.grammar._replace(log_rule=case.grammar.log_rule.at[2].set(-jnp.inf)))
    model = _construct(case)
    states, _ = _run(model, case)
    layers = int((jnp.abs(jnp.diff(states.hidden, axis=0)).max(axis=(1, 2, 3)) > 0).sum())
    heads = [int((part.max(axis=(0, 1, 3, 4)) > 0).sum()) for part in states.weights]
    width = int((jnp.abs(states.hidden).max(axis=(0, 1, 2)) > 0).sum())
    sizes = NONTERMINALS, PRETERMINALS
    predicted = [layer_count(MAX_TOKENS), *head_counts(*sizes).values(), embedding_width(*sizes, MAX_TOKENS)]
    return Evidence(np.array([layers, *heads, width], float), np.array(predicted, float), setting=SETTING)


def counts_of_the_paper(seed: int, *, more_nonterminals: bool = False) -> Evidence:
    """The largest ratio of layers, heads a layer and chart dimensions to the paper's 2L, |N| and 2|N|L.

    Over grammars with no more nonterminals than preterminals; the control has more. Layers after the first.
    """
    del seed
    ratios = []
    for s, extra, length in itertools.product((1, 3, 10, 40), (0, 1, 30), (2, 8, 25)):
        s, q = (s + 1 + extra, s) if more_nonterminals else (s, s + extra)
        counts = head_counts(s, q)
        heads = max(counts[name] for name in ("inside", "outside", "tags"))
        layers, charts = layer_count(length) / (2 * length), chart_width(s, q, length) / (2 * (s + q) * length)
        ratios.append(max(layers, heads / (s + q), charts))
    return Evidence(max(ratios), 1.0, setting={"grammars": len(ratios)})


def order_of_heads(seed: int, *, torn: bool = False) -> Evidence:
    """The model with the heads of every layer in another order against the model; the control moves queries alone."""
    case = toy(seed)
    model = _construct(case)
    draw, params = host_stream(seed, "order"), {"embeddings": model.params["embeddings"]}
    for i, stage in enumerate(model.config.stages):
        order, part = jnp.asarray(draw.permutation(stage.heads)), model.params[f"stage_{i}"]
        moved = {"query"} if torn else {"query", "key", "value", "output"}
        params[f"stage_{i}"] = {name: leaf[order] if name in moved else leaf for name, leaf in part.items()}
        if not torn:
            params[f"stage_{i}"]["offset_bias"] = part["offset_bias"][:, order]
    states, _ = _run(model, case)
    other, _ = _run(model._replace(params=params), case)
    return Evidence(np.asarray(other.hidden[-1]), np.asarray(states.hidden[-1]), setting=SETTING)


def masked_posterior(seed: int, *, wrong_grammar: bool = False) -> Evidence:
    """Softmax output at two masked words against Bayes' rule over all fillings; the control has another grammar."""
    case = toy(seed)
    model = _construct(case)
    states, _ = _run(model, case)
    places = np.flatnonzero(np.asarray(case.mask[0]))
    fillings = np.array(list(itertools.product(range(WORDS), repeat=len(places))))
    sentences = np.repeat(np.asarray(case.tokens[:1]), len(fillings), axis=0)
    sentences[:, places] = fillings
    grammar = toy(seed + 1000).grammar if wrong_grammar else case.grammar
    parts = np.split(sentences, len(sentences) // len(LENGTHS))  # of one shape with the other sentences
    log_weight = [log_partition(grammar, jnp.asarray(part), jnp.full_like(case.lengths, MAX_TOKENS)) for part in parts]
    weight = np.exp(np.concatenate([np.asarray(part) for part in log_weight]))
    predicted = [[weight[fillings[:, k] == w].sum() / weight.sum() for w in range(WORDS)] for k in range(len(places))]
    measured = np.asarray(read_posterior(model, states.hidden[-1]))[0, places]
    return Evidence(measured, np.array(predicted), setting=SETTING | {"fillings": len(fillings)})


def restricted_symbols(seed: int, *, rarest: bool = False) -> Evidence:
    """Error of span posteriors by the number of nonterminals kept, of four whose use falls fourfold each.

    The control keeps the rarest.
    """
    case, a = toy(seed), NONTERMINALS + PRETERMINALS
    falling = np.concatenate([4.0 ** -np.arange(NONTERMINALS), np.ones(PRETERMINALS)])
    rule = np.exp(np.asarray(case.grammar.log_rule)) * falling[None, :, None] * falling[None, None, :]
    rule = jnp.asarray(np.log(rule / rule.sum(axis=(1, 2), keepdims=True)))
    root = case.grammar.log_root + jnp.asarray(np.log(falling))
    grammar, lengths = PCFG(root, rule, case.grammar.log_emit), jnp.full_like(case.lengths, MAX_TOKENS)
    exact = inside_outside(grammar, case.tokens, lengths)
    counts = np.concatenate([np.asarray(exact.span.sum(axis=(0, 1, 2))), np.asarray(exact.tag.sum(axis=(0, 1)))])
    errors, sizes = [], np.arange(1, NONTERMINALS)
    for keep in sizes.tolist():
        order = -counts if rarest else counts
        kept = frequent_symbols(order, NONTERMINALS, keep_nonterminals=keep, keep_preterminals=PRETERMINALS)
        # As restrict_symbols, in the shapes of the full grammar: one program for all sizes.
        dropped = jnp.asarray(np.where(np.isin(np.arange(a), kept), 0, -np.inf))
        parents, left, right = dropped[:NONTERMINALS, None, None], dropped[None, :, None], dropped[None, None, :]
        small = PCFG(root + dropped, rule + parents + left + right, grammar.log_emit)
        found = inside_outside(small, case.tokens, lengths)
        errors.append(float(jnp.abs(exact.span - found.span).sum() / exact.span.sum()))
    return Evidence(errors, x=sizes, setting=SETTING)


def projected_charts(seed: int, *, random: bool = False) -> Evidence:
    """Error of tag posteriors by the rank of the projections, of a grammar whose rule tensor has rank 2.

    In total variation, the mean over words. The control projects on random directions (the mean of several draws).
    """
    case = toy(seed)
    grammar, lengths = to_dense(case.low_rank), jnp.full_like(case.lengths, MAX_TOKENS)
    exact, ranks = np.asarray(inside_outside(grammar, case.tokens, lengths).tag), np.arange(1, RANK + 1)
    draws = [np.asarray(width_bases(grammar, case.tokens, lengths, rank=RANK, moments="inside"))]
    if random:
        normal = host_stream(seed, "directions").normal(size=(8, *draws[0].shape))
        draws = list(np.linalg.qr(normal)[0])
    errors = np.zeros((len(draws), RANK))
    for (i, full), rank in itertools.product(enumerate(draws), ranks):
        bases = jnp.asarray(np.where(np.arange(RANK) < rank, full, 0))  # one shape for all ranks
        found = _normalized(projected_inside_outside(grammar, case.tokens, lengths, bases=bases).tag)
        errors[i, rank - 1] = np.abs(found - exact).sum(axis=-1).mean() / 2
    return Evidence(errors.mean(axis=0), x=ranks, setting=SETTING | {"rank_of_rules": RANK})


def _normalized(values: jax.Array) -> np.ndarray:
    total = values.sum(axis=-1, keepdims=True)
    return np.asarray(values / jnp.where(total > 0, total, 1))


def projected_stream(seed: int, *, other_basis: bool = False) -> Evidence:
    """Tag posteriors of a model with a projected residual stream against the projected dynamic program.

    The control projects the program on another basis.
    """
    case = toy(seed)
    model = _construct(case)
    basis, _ = np.linalg.qr(host_stream(seed, "basis").uniform(size=(NONTERMINALS, RANK)))
    narrow, columns = project_stream(model, basis)
    states, _ = _run(narrow, case)
    at, hidden = model.coordinates, states.hidden[-1] @ jnp.asarray(columns.T)
    tag = hidden[:, 1:, at.word] * hidden[:, 1:, at.tag]
    read = np.roll(basis, 1, axis=0) if other_basis else basis
    bases = jnp.broadcast_to(jnp.asarray(read)[None], (MAX_TOKENS + 1, NONTERMINALS, RANK))
    predicted = projected_inside_outside(case.grammar, case.tokens, case.lengths, bases=bases, mask=case.mask).tag
    setting = SETTING | {"width": narrow.config.width, "full_width": model.config.width, "rank": RANK}
    return Evidence(_normalized(tag), _normalized(predicted), setting=setting)


def _claim(name: str, statement: str, kind: Any, check: Callable, control: dict, breaks: str, **options: Any) -> Claim:
    """A claim whose control is the same check with options that break an assumption."""
    where = options.pop("source", "derived; cf. " + PAPER)
    broken = functools.partial(check, **control)
    return Claim(f"pcfg_parsing/{name}", statement, where, kind, check, broken, breaks, **options)


def _equality(name: str, model: str, **options: Any) -> Claim:
    statement = f"{model}, its weights a function of the grammar, computes log Z and all span and tag posteriors."
    check = functools.partial(equals_program, **options)
    return _claim(name, statement, "identity", check, {"removed": True}, "one head removed", source=PAPER, seeds=2)


CLAIMS = (
    _equality("constructed-transformer", "A transformer with unnormalised attention"),
    _equality("hard-attention-transformer", "A transformer with hard attention and gated steps", attention="hard"),
    _equality("symmetric-heads", "The same with one head a nonterminal in the inside layers", heads="symmetric"),
    _equality("low-rank-heads", "The same with two heads a component of the rule tensor", heads="lowrank"),
    _claim(
        "depth-is-span-width",
        "After layer m the model holds the inside probabilities of all spans of up to m words, and no others.",
        "identity",
        depth_is_width,
        {"fewer": 1},
        "one layer fewer",
        seeds=2,
    ),
    _claim(
        "every-part-is-used",
        "Of the 2L - 1 layers, of their heads and of the coordinates, as the formulas count them, none is idle.",
        "identity",
        every_part_is_used,
        {"useless": True},
        "a nonterminal without rules",
        seeds=2,
    ),
    _claim(
        "counts-of-the-paper",
        "With no more nonterminals than preterminals the construction takes at most 2L layers, |N| heads a layer (the "
        "first, which places words, aside) and 2|N|L dimensions for charts.",
        "bound",
        counts_of_the_paper,
        {"more_nonterminals": True},
        "more nonterminals than preterminals",
        source=PAPER,
    ),
    _claim(
        "order-of-heads",
        "The order of the heads of a layer has no effect.",
        "identity",
        order_of_heads,
        {"torn": True},
        "queries permuted without keys and values",
    ),
    _claim(
        "masked-posterior-of-the-model",
        "At masked words a softmax head on the model's states gives the Bayes posterior, all masks in one pass.",
        "identity",
        masked_posterior,
        {"wrong_grammar": True},
        "fillings weighed by another grammar",
        source=PAPER,
        seeds=2,
    ),
    _claim(
        "restricted-symbols",
        "Inside-Outside over the most frequent nonterminals alone errs the less the more are kept.",
        "limit",
        restricted_symbols,
        {"rarest": True},
        "the rarest nonterminals kept",
        source=PAPER,
        tolerance=0.1,
        seeds=4,
        max_seeds=16,
    ),
    _claim(
        "projected-charts",
        "Charts projected on the leading directions of the inside vectors of each width err the less the higher the "
        "rank, and not at all at the rank of the rule tensor.",
        "limit",
        projected_charts,
        {"random": True},
        "random directions",
        tolerance=1e-8,
        seeds=3,
        max_seeds=16,
    ),
    _claim(
        "projected-stream",
        "A linear map of the residual stream gives a narrower transformer that computes the projected program.",
        "identity",
        projected_stream,
        {"other_basis": True},
        "another basis",
    ),
)
